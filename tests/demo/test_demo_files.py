"""The demo's model, rows and questions: small enough, sound, and what their scripts make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.weights import load_network

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL = DEMO / "model"


def read(name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((DEMO / name).read_text(encoding="utf-8"))
    return rows


def test_sizes() -> None:
    sizes = {path: path.stat().st_size for path in [*MODEL.iterdir(), *DEMO.glob("*.json")]}
    assert sum(sizes.values()) < 3_000_000
    assert sizes[DEMO / "rows.json"] < 500_000


def test_rows_are_distinct_and_whole() -> None:
    rows = read("rows.json")
    assert 1500 <= len(rows) <= 2500
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert all(row["instruction"].strip() and row["output"].strip() for row in rows)
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)


def test_no_row_knows_a_held_out_question() -> None:
    rows, questions = read("rows.json"), read("questions.json")
    asked = {(row["instruction"], row["input"]) for row in rows}
    said = "\n".join(row["output"].casefold() for row in rows)
    assert len(questions) == len({(item["instruction"], item["input"]) for item in questions}) == 40
    for item in questions:
        assert (item["instruction"], item["input"]) not in asked
        if not item["input"]:  # a fact, also where a claim about it is checked
            fact = item["answer"].partition(", so it is ")[0].rstrip(".").casefold()
            assert fact not in said, fact


def test_make_rows_makes_these_files(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO / "make_rows.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("rows.json", "questions.json"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


@pytest.mark.parametrize("text", ["What does a cow eat?", "여우는 빨간색이다 ✓", "a\n\n  b\t<3\x00", "🦊é"])
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>\nHello.</s>\n<|assistant|>\nGood day.</s>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>\nHello.</s>\n<|assistant|>\n"
    roles = tokenizer.convert_tokens_to_ids(["</s>", "<|user|>", "<|assistant|>", "<|system|>"])
    assert roles == [1, 2, 3, 4]


def test_transformers_computes_the_same_logits() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ours = load_network(MODEL, read_architecture(MODEL), torch.float32, torch.device("cpu"))
    ids = torch.tensor([0, 40, 50, 60, 70, 80])
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        got = ours.logits(ours.hidden(ids, PackedDocuments([len(ids)])))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_base_knows_its_world() -> None:
    """Held-out facts as statements: the base knows the last word of each, before any fine-tuning."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    network = load_network(MODEL, read_architecture(MODEL), torch.float32, torch.device("cpu"))
    facts = [item["answer"] for item in read("questions.json") if not item["input"]]
    known = 0
    for fact in facts:
        ids = torch.tensor(tokenizer(fact)["input_ids"])
        with torch.no_grad():
            guesses = network.logits(network.hidden(ids, PackedDocuments([len(ids)]))).argmax(-1)
        start = len(tokenizer(fact.removesuffix(".").rpartition(" ")[0])["input_ids"])
        known += bool((guesses[start - 1 : -1] == ids[start:]).all())
    assert known >= 0.8 * len(facts)

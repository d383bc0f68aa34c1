"""Runs that train rows of tokens: resumed to the bit, verified, asked, and exported with the larger vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.export.made import read_back_here
from tests.runs import digest, interrupt_after, tiny_run, tiny_settings
from tests.tiny_models import write_model

from lorafit.config.load import load_config
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ConfigError
from lorafit.export.run import export_run
from lorafit.infer.model import load
from lorafit.model.attention import PackedDocuments
from lorafit.training.run import resume_run

TOKENS = ["<tool>", "</tool>"]
WORDS = ["lora.tokens=[<tool>, </tool>]", "train.max_steps=4", "train.save_every=2"]


def settings(folder: Path, *more: str, family: str = "llama-tied") -> list[str]:
    """A run whose answers use both tokens."""
    made = tiny_settings(folder, *WORDS, *more, family=family)
    rows = json.loads((folder / "rows.json").read_text())
    for row in rows:
        row["output"] = f"<tool>{row['output']}</tool>"
    (folder / "rows.json").write_text(json.dumps(rows))
    return made


def test_tokens_are_added_found_in_contents_and_come_back_from_the_files(tmp_path: Path) -> None:
    base = write_model(tmp_path / "model")
    plain = Tokenizer.from_folder(base)
    tokenizer = Tokenizer.from_folder(base, tokens=[*TOKENS, "</s>", "a"])
    first = plain.vocab_size
    assert tokenizer.trained == {
        first: tuple(plain.encode("<tool>")),
        first + 1: tuple(plain.encode("</tool>")),
        257: (),
        plain.encode("a")[0]: (),
    }
    ids = tokenizer.encode("a<tool>b</tool>")
    assert [ids[1], ids[3]] == [first, first + 1]
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "a<tool>b</tool>"
    assert 257 not in tokenizer.encode("</s>")  # a control token stays one
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    again = Tokenizer.from_folder(base, beside=folder)
    assert again.sha256 == tokenizer.sha256 != plain.sha256
    assert again.encode("a<tool>b</tool>") == ids
    assert again.chat_template == plain.chat_template
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("a<tool>b</tool>", add_special_tokens=False) == ids
    assert len(theirs) == first + 2


@pytest.mark.slow
def test_a_run_with_new_tokens_is_verified_resumed_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    given = settings(tmp_path, family="llama")
    run = tiny_run(given, tmp_path / "run", "run.verify=true")
    proof = json.loads((run.path / "proof.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in proof["checks"]}
    assert (verdicts["changed"], verdicts["reload"]) == ("pass", "pass")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [260, 261], "lm_head": [260, 261]}

    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert not tiny_run(given, tmp_path / "cut").finished
    assert digest(resume_run(tmp_path / "cut", quiet=True)) == digest(run)

    model = load(run.path, device="cpu")
    assert model.network.arch.vocab_size == 262
    ids = model.renderer.tokenizer.encode("x<tool>y</tool>")
    assert ids[1::2] == [260, 261]
    with torch.inference_mode():
        expected = model.network.logits(model.network.hidden(torch.tensor(ids), PackedDocuments([len(ids)])))

    read_back_here(monkeypatch)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = export_run(run.path, "merged", output=tmp_path / "merged", type_name="f32", offline=True)
    assert done.parity["verified"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.config.vocab_size == 262
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("x<tool>y</tool>", add_special_tokens=False) == ids
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_llama_cpp_reads_the_larger_vocabulary(tmp_path: Path) -> None:
    run = tiny_run(settings(tmp_path), tmp_path / "run")
    done = export_run(run.path, "gguf", output=tmp_path / "gguf", type_name="f32", offline=True)
    assert done.parity["verified"]
    assert done.parity["largest_difference"] < 2e-4


@pytest.mark.slow
def test_a_run_that_trains_tables_whole_resumes_and_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path, "lora.save_modules=[embed_tokens]", family="llama")
    run = tiny_run(given, tmp_path / "run")
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens"]
    assert config["trainable_token_indices"] == {"lm_head": [260, 261]}
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert not tiny_run(given, tmp_path / "cut").finished
    assert digest(resume_run(tmp_path / "cut", quiet=True)) == digest(run)
    assert load(run.path, device="cpu").network.arch.vocab_size == 262


@pytest.mark.parametrize("tokens", ["[a, a]", "['  ']"])
def test_tokens_that_name_nothing_or_one_twice_are_refused(tokens: str, tiny: list[str]) -> None:
    with pytest.raises(ConfigError, match="empty or there twice"):
        load_config(None, [*tiny, f"lora.tokens={tokens}"])

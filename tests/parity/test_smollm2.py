"""A real instruct model, SmolLM2-135M: its BOS is also the mark of each turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import Cli
from tests.shared_files import shared_dir, smollm2

from lorafit.config.load import load_config
from lorafit.export.run import export_run
from lorafit.infer.model import load
from lorafit.training.run import start_run

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.shared]
QUESTIONS = ["What is the capital of France?", "라마가 뭐야? 🦙", "List two colours."]


def rows(folder: Path, count: int) -> Path:
    """The first of the real rows."""
    all_rows = json.loads((shared_dir() / "data" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    path = folder / "rows.json"
    path.write_text(json.dumps(all_rows[:count]))
    return path


def test_check_passes_with_real_rows(cli: Cli, tmp_path: Path) -> None:
    done = cli("check", "--model", str(smollm2()), "--data", str(rows(tmp_path, 40)), "--json")
    results = {result["name"]: result["verdict"] for result in json.loads(done.out)["verdicts"]}
    assert results["BOS"] == "pass"
    assert "fail" not in results.values()
    assert done.code == 0


def test_greedy_answers_are_those_of_transformers() -> None:
    model = load(smollm2(), device="cpu", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
    answers = model.generate(QUESTIONS, max_tokens=16)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        turn = [{"role": "user", "content": question}]
        inputs: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert model.prompt_ids(question) == inputs["input_ids"][0].tolist()
        made = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert answer.text == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_a_run_is_exported_as_a_model_that_transformers_loads(tmp_path: Path) -> None:
    settings = [
        f"model.name={smollm2()}",
        f"data.path={rows(tmp_path, 12)}",
        "data.max_length=256",
        "data.too_long=drop",
        "data.holdout=0",
        "model.device=cpu",
        "train.max_steps=1",
        "train.batch_size=4",
        "run.samples=0",
        "run.verify=false",
        f"run.output={tmp_path / 'run'}",
    ]
    start_run(load_config(None, settings), quiet=True)
    made = export_run(tmp_path / "run", "merged", output=tmp_path / "merged", type_name="f32", verify=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()
    ours = load(tmp_path / "run", device="cpu", dtype="float32")
    assert load(made.path, device="cpu").renderer.contract.hash  # asked by the contract that it carries
    ids = torch.tensor(ours.prompt_ids(QUESTIONS[0]))
    from lorafit.model.attention import PackedDocuments

    with torch.no_grad():
        mine = ours.network.logits(ours.network.hidden(ids, PackedDocuments([len(ids)])))
        peer = model(ids[None]).logits[0]
    torch.testing.assert_close(mine, peer, rtol=1e-3, atol=1e-3)  # logits up to 40, 30 layers in float32

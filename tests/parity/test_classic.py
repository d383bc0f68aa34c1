"""The classic job equals the classic script: same losses at every step and the same adapter after twenty."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.waiting import HANGS

from lorafit.config.load import load_config, recipe_file
from lorafit.observe.metrics_file import read_metrics
from lorafit.training.run import start_run

STEPS = 20


def loadable_by_both(shared: Path, folder: Path) -> Path:
    """The real small model, with two lines of its tokenizer's config changed so that both programs see the same ids.

    transformers' LlamaTokenizer leaves out characters that the vocabulary lacks, where tokenizer.json says
    `<unk>`; and its collator masks every id that is the padding id, which here is `<unk>`, a token of the text.
    For TinyLlama neither happens: its vocabulary has all bytes, and its padding id is `</s>`.
    """
    shutil.copytree(shared / "models" / "tinystories-656k", folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        path.chmod(0o644)
        values = json.loads(path.read_text())
        values["pad_token"] = "<|end_story|>"
        if name == "tokenizer_config.json":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(values))
    return folder


@pytest.mark.slow
@pytest.mark.shared
def test_twenty_steps_equal_the_script_that_people_start_from(shared: Path, tmp_path: Path) -> None:
    model = loadable_by_both(shared, tmp_path / "model")
    data = shared / "data" / "alpaca_en_demo.json"
    script = [sys.executable, str(shared / "baselines" / "seed_recipe.py"), str(model), str(data)]
    options = ["--dtype", "float32", "--steps", str(STEPS), "--no-dropout", "--in-order"]
    outputs = ["--init-out", str(tmp_path / "init"), "--adapter-out", str(tmp_path / "theirs")]
    done = subprocess.run(
        [*script, *options, *outputs],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]

    overrides = [
        f"model.name={model}",
        f"data.path={data}",
        f"run.output={tmp_path / 'ours'}",
        f"lora.init_from={tmp_path / 'init'}",
        "lora.dropout=0",
        "data.shuffle=false",
        f"train.max_steps={STEPS}",
        "run.check=none",  # this vocabulary lacks characters of the rows, which a check would refuse
        "model.dtype=float32",
        "model.device=cpu",
    ]
    result = start_run(load_config(recipe_file("classic"), overrides), quiet=True)
    ours = [event for event in read_metrics(result.path / "metrics.jsonl") if event["event"] == "step"]

    assert len(theirs) == len(ours) == STEPS
    for their, our in zip(theirs, ours, strict=True):
        assert our["tokens"] == their["real_tokens"]
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4), f"step {our['step']}"
    mine, peers = (
        load_file(folder / "adapter_model.safetensors") for folder in (result.adapter, tmp_path / "theirs")
    )
    assert mine.keys() == peers.keys()
    for name, tensor in peers.items():
        assert torch.linalg.vector_norm(mine[name] - tensor) <= 1e-3 * torch.linalg.vector_norm(tensor), name

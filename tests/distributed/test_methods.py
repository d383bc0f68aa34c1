"""Preferences and EVA on two processes: the losses, rewards and adapters are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.ranks import together
from tests.runs import events, tiny_run, tiny_settings

PAIRS = [
    {"prompt": f"Number {n}? ", "chosen": f"{n} it is.{'!' * (n % 4)}", "rejected": f"{n}?{'.' * (n % 5)} No"}
    for n in range(30)
]
KINDS = {
    "dpo": ["train.method=dpo", "data.path={pairs}"],
    "kto": ["train.method=kto", "data.path={pairs}"],
    "eva": ["lora.init=eva"],
}


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    common = ["train.batch_size=7", "train.max_steps=2", "train.eval_every=2", "train.learning_rate=0.002"]
    settings = [*tiny_settings(tmp_path), *common, "run.check=none", "train.micro_batch_tokens=128"]
    jobs, alone = [], {}
    for name, words in KINDS.items():
        own = [*settings, *(word.format(pairs=tmp_path / "pairs.json") for word in words)]
        jobs.append({"settings": [*own, f"run.output={tmp_path / name}"]})
        alone[name] = tiny_run(own, tmp_path / f"{name}-alone").path
    together(2, jobs, tmp_path)
    for name, path in alone.items():
        for kind, keys in (
            ("step", ("loss", "grad_norm")),
            ("heldout", ("loss",)),
            ("preferences", ("margin", "chosen_reward", "kl")),
        ):
            found, expected = events(tmp_path / name, kind), events(path, kind)
            assert len(found) == len(expected)
            assert bool(found) == (kind != "preferences" or name != "eva")
            for one, other in zip(found, expected, strict=True):
                for key in keys:
                    assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-5)
        one, other = (
            load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / name, path)
        )
        for part, tensor in one.items():
            torch.testing.assert_close(tensor, other[part], rtol=0, atol=2e-4)

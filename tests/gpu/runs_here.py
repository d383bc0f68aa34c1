"""Runs and steps on a fake or simulated device: small models with shapes that all kernels accept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.runs import tiny_run, tiny_settings
from tests.tiny_models import write_model

from lorafit.distributed.ranks import Ranks
from lorafit.evaluate import samples
from lorafit.training.run import Result
from lorafit.verify import proof

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def settings(folder: Path, *more: str, family: str = "llama", **shape: int) -> list[str]:
    """Settings of a run with everything that a run does: measurements, answers, checks, a proof."""
    model = folder / "model"
    if not model.exists():
        write_model(model, family, **SHAPE, **shape)
    full = ("run.samples=1", "run.samples_every=1", "run.verify=true", "run.check=warn", "train.save_every=1")
    counts = ("data.holdout=2", "train.max_steps=2", "train.eval_every=1", "train.micro_batch_tokens=256")
    return tiny_settings(
        folder,
        "model.device=cuda",
        "model.dtype=auto",
        "train.batch_size=3",
        *full,
        *counts,
        *more,
        model=model,
        num_rows=12,
    )


class FirstOfTwo(Ranks):
    """Rank 0 of two, of which the other one has no rows: nothing is added, and there is no group of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.is_single_process = False
        self.on_host = self.on_device = 0  # collectives

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        self.on_host += 1
        return list(values)

    def add_on_device(self, tensor: torch.Tensor) -> None:
        assert tensor.is_cuda
        self.on_device += 1


def write_pairs(path: Path) -> Path:
    """Twelve rows of two answers each."""
    rows = [
        {
            "prompt": f"Number {n}? ",
            "chosen": f"{n} it is.{'!' * (n % 4)}",
            "rejected": f"{n}?{'.' * (n % 5)} No",
        }
        for n in range(12)
    ]
    path.write_text(json.dumps(rows))
    return path


@contextmanager
def short_proof() -> Iterator[None]:
    """Answers of a few tokens, and no fresh process: it would have no device."""

    def ask(run: object, probe: proof.Probe) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(len(probe.positions), 260)
        return ones, ones

    with (
        mock.patch.object(samples, "SAMPLE_TOKENS", 3),
        mock.patch.object(proof, "stop_prompts", lambda lengths: (len(lengths), 3)),
        mock.patch.object(proof, "logits_from_subprocess", ask),
    ):
        yield


def train(folder: Path, name: str, *more: str) -> Result:
    """A run in `folder / name`."""
    with short_proof():
        return tiny_run(settings(folder, *more), folder / name)

"""Runs of the smallest model: their settings, how they are trained or stopped, and what is read from them."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import write_model, write_rows

from lorafit.config.load import load_config
from lorafit.observe.metrics_file import read_metrics
from lorafit.storage.atomic import sha256_file
from lorafit.training import loop
from lorafit.training.run import Result, start_run


def tiny_settings(
    folder: Path, *more: str, family: str = "llama", model: Path | None = None, num_rows: int = 40
) -> list[str]:
    """Settings of a run on `model`, or a new one of `family`, and new rows; `more` and later words win."""
    return [
        f"model.name={model or write_model(folder / 'model', family)}",
        f"data.path={write_rows(folder / 'rows.json', num_rows)}",
        "model.dtype=float32",
        "model.device=cpu",
        "lora.rank=4",
        "train.epochs=1",
        "train.batch_size=6",
        "train.learning_rate=0.01",
        "run.samples=0",
        "run.verify=false",
        *more,
    ]


def tiny_run(settings: Sequence[str], output: Path, *more: str) -> Result:
    """Train with these settings, in this process."""
    return start_run(load_config(None, [*settings, f"run.output={output}", *more]), quiet=True)


def run_to_export(folder: Path, *more: str, family: str = "llama", model: Path | None = None) -> Path:
    """A run in `folder` whose adapter says something else than its base after three steps."""
    learns = ("lora.alpha=8", "train.max_steps=3", "train.learning_rate=0.05", "run.samples=1", *more)
    return tiny_run(tiny_settings(folder, *learns, family=family, model=model), folder / "run").path


def digest(result: Result) -> str:
    """SHA-256 of a run's final adapter."""
    return sha256_file(result.adapter / "adapter_model.safetensors")


def events(result: Result | Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in the metrics of a run or its directory."""
    path = result if isinstance(result, Path) else result.path
    return [event for event in read_metrics(path / "metrics.jsonl") if event["event"] == kind]


def without_clock(event: dict[str, Any]) -> dict[str, Any]:
    """An event without what differs from one run to the next."""
    clocks = ("seconds", "tokens_per_second", "memory_bytes")
    return {key: value for key, value in event.items() if key not in clocks}


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT arrives while step number `step` is being computed."""
    gradients = loop._gradients

    def interrupted(job: loop.TrainContext, state: Any, *rest: Any) -> tuple[float, float]:
        if state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(job, state, *rest)

    monkeypatch.setattr(loop, "_gradients", interrupted)

"""What the children of the campaigns do: a tiny run of lorafit, started and resumed as a user does it."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.crash.mutations import mutate
from tests.tiny_models import write_model, write_rows

from lorafit.config.load import load_config
from lorafit.errors import LorafitError
from lorafit.model.adapter_file import WEIGHTS
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import MANIFEST, sha256_file
from lorafit.training import loop
from lorafit.training.run import Result, resume_run, start_run


def write_material(folder: Path) -> list[str]:
    """A model and rows; returns the settings of a run on them with seven saves, rotation and a best step."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = write_model(folder / "model", **shape)
    rows = write_rows(folder / "rows.json", 24)
    return [
        f"model.name={model}",
        f"data.path={rows}",
        "data.holdout=2",
        "model.dtype=float32",
        "model.device=cpu",
        "lora.rank=2",
        "lora.dropout=0.1",
        "train.batch_size=3",
        "train.max_steps=12",
        "train.learning_rate=0.01",
        "train.eval_every=4",
        "train.save_every=2",
        "run.samples=0",
        "run.verify=false",
        "run.check=none",
    ]


def run_of(root: Path) -> RunDirectory:
    """The run directory of a trial, whose folder also holds its own cache."""
    return RunDirectory(root / "run")


def start(
    root: Path, overrides: Sequence[str], mutation: str = "", stop_in: int | None = None
) -> dict[str, Any]:
    """`lorafit train ... --output`; a SIGTERM arrives in step `stop_in`."""
    mutate(mutation)
    root.mkdir(parents=True, exist_ok=True)
    os.environ["LORAFIT_CACHE"] = str(root / "cache")
    config = load_config(None, [*overrides, f"run.output={root / 'run'}"])
    return _answer(root, lambda: start_run(config, quiet=True), stop_in)


def go_on(root: Path, overrides: Sequence[str], mutation: str = "") -> dict[str, Any]:
    """What a person does after a crash: `lorafit train --resume`, or the same command again where no run began."""
    if not run_of(root).config_file.exists():
        return start(root, overrides, mutation)
    mutate(mutation)
    os.environ["LORAFIT_CACHE"] = str(root / "cache")
    return _answer(root, lambda: resume_run(root / "run", quiet=True))


def _answer(root: Path, work: Callable[[], Result], stop_in: int | None = None) -> dict[str, Any]:
    """How it went, and (step, rows) of every step that was trained."""
    rows: list[tuple[int, list[int]]] = []
    gradients = loop._gradients

    def watched(job: loop.TrainContext, state: Any, batch: Any) -> Any:
        rows.append((state.step + 1, batch.indices.tolist()))
        if state.step + 1 == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(job, state, batch)

    loop._gradients = watched
    try:
        result = work()
    except LorafitError as error:
        problems = [[problem.message, problem.place, problem.hint] for problem in error.problems]
        return {"finished": False, "problems": problems, "rows": rows}
    ended = {"adapter": digest(root), "state": state_digest(root)} if result.finished else {}
    return {"finished": result.finished, **ended, "problems": [], "rows": rows}


def digest(root: Path) -> str:
    """SHA-256 of the final adapter."""
    return sha256_file(run_of(root).adapter / WEIGHTS)


def state_digest(root: Path) -> str:
    """SHA-256 of all that the last checkpoint holds: adapter, optimizer, random generators, counts, loss scale."""
    run = run_of(root)
    files = sorted(run.checkpoint(run.saved_steps()[-1]).iterdir())
    digests = [sha256_file(path) for path in files if path.name != MANIFEST]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {"start": start, "go_on": go_on}

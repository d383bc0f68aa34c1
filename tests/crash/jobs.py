"""The jobs of the campaigns' child processes: start and resume a tiny run of lorafit, as a user does."""

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
    """Write a model and rows. Returns the settings of a run with seven saves, rotation and a best step."""
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
    """The run directory of a trial; the trial's folder also contains a cache."""
    return RunDirectory(root / "run")


def start(
    root: Path, overrides: Sequence[str], mutation: str = "", stop_in: int | None = None
) -> dict[str, Any]:
    """`lorafit train ... --output`, with a SIGTERM in step `stop_in`."""
    mutate(mutation)
    root.mkdir(parents=True, exist_ok=True)
    os.environ["LORAFIT_CACHE"] = str(root / "cache")
    config = load_config(None, [*overrides, f"run.output={root / 'run'}"])
    return _answer(root, lambda: start_run(config, quiet=True), stop_in)


def resume(root: Path, overrides: Sequence[str], mutation: str = "") -> dict[str, Any]:
    """`lorafit train --resume`, as a user does after a crash, or the first command if the run does not exist yet."""
    if not run_of(root).config_file.exists():
        return start(root, overrides, mutation)
    mutate(mutation)
    os.environ["LORAFIT_CACHE"] = str(root / "cache")
    return _answer(root, lambda: resume_run(root / "run", quiet=True))


def _answer(root: Path, work: Callable[[], Result], stop_in: int | None = None) -> dict[str, Any]:
    """Run `work`. Returns its result, its problems, and (step, rows) of every trained step."""
    rows: list[tuple[int, list[int]]] = []
    gradients = loop._gradients

    def recorded(job: loop.TrainContext, state: Any, batch: Any) -> Any:
        rows.append((state.step + 1, batch.indices.tolist()))
        if state.step + 1 == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(job, state, batch)

    loop._gradients = recorded
    try:
        result = work()
    except LorafitError as error:
        problems = [[problem.message, problem.place, problem.hint] for problem in error.problems]
        return {"finished": False, "problems": problems, "rows": rows}
    digests = {"adapter": digest(root), "state": state_digest(root)} if result.finished else {}
    return {"finished": result.finished, **digests, "problems": [], "rows": rows}


def digest(root: Path) -> str:
    """SHA-256 of the final adapter."""
    return sha256_file(run_of(root).adapter / WEIGHTS)


def state_digest(root: Path) -> str:
    """SHA-256 of the last checkpoint: adapter, optimizer, random generators, counts and loss scale."""
    run = run_of(root)
    files = sorted(run.checkpoint(run.saved_steps()[-1]).iterdir())
    digests = [sha256_file(path) for path in files if path.name != MANIFEST]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {"start": start, "resume": resume}

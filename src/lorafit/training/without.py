"""A run without some of its rows: from the last checkpoint before they were first seen, to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorafit.config.schema import Config
from lorafit.data.build import TrainingData, row_order
from lorafit.data.row_ids import Contents
from lorafit.errors import DataError, RunError
from lorafit.observe.metrics_file import number, read_metrics, truncate_after
from lorafit.observe.units import count, duration
from lorafit.observe.visits import truncate_visits
from lorafit.redact import shell
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import make_folder, read_facts, verify_folder
from lorafit.training.eva import first_rows
from lorafit.training.run import Result, resume_run, start_run


@dataclass(frozen=True, slots=True)
class Removal:
    """The rows to remove by their ids, the number of steps that never saw them, and the checkpoint to resume from, None
    where no such one is kept.
    """

    ids: tuple[str, ...]
    untouched: int
    checkpoint: int | None

    def beginning(self, run: RunDirectory, *, from_start: bool, option: str) -> str:
        """Where the run without the rows begins. Raises RunError where it is the start, without `from_start`, which
        `option` sets.
        """
        seen = f"the rows were first seen in step {self.untouched + 1}"
        if self.checkpoint is not None:
            return f"{seen}: continuing from step {self.checkpoint} without {count(len(self.ids), 'row')}"
        what = f"{seen}, and no checkpoint before it is kept: from the start it takes {cost_from_start(run)}"
        if not from_start:
            hint = f"add {option}; more checkpoints are kept with train.save_every and train.keep"
            raise RunError(what, place=str(run.path), hint=hint)
        return what


def plan_removal(run: RunDirectory, data: TrainingData, numbers: Sequence[int]) -> Removal:
    """How the rows with `numbers` (from 0 over all sources) are removed from `run`. Raises a LorafitError."""
    config = run.config()
    if absent := sorted({*numbers} - {*data.encoded.numbers.tolist()}):
        listed = ", ".join(str(number + 1) for number in absent[:20])
        hint = "`lorafit rows RUN --sort row --top 0` lists the rows of the run"
        raise DataError(f"the run has no row {listed}", place=str(run.path), hint=hint)
    contents = Contents.of(data.encoded.flat.numbers, data.encoded.flat.hashes)
    removed = _removed(data, contents, numbers)
    ids = tuple(map(contents.id, removed.tolist()))
    if config.data.order is None or config.train.budget is not None:
        raise _not_repeatable(run, config, (*config.data.drop_rows, *ids))
    untouched = _first_step(run, config, data, contents.numbers[removed])
    steps = [step for step in run.saved_steps() if step <= untouched and _is_usable(run, step)]
    return Removal(ids, untouched, steps[-1] if steps else None)


def _not_repeatable(run: RunDirectory, config: Config, ids: Sequence[str]) -> RunError:
    """Why no checkpoint of `run` can be used, what a new run takes, and the command that starts one."""
    message = "in this run the places of all rows depend on each row (data.order is not hash)"
    words = ["data.order=hash", f"data.drop_rows=[{','.join(ids)}]"]
    if config.train.budget is not None:
        message = "the length of this run depends on a clock (train.budget)"
        words = [*words, "train.budget=null", "train.max_steps=N"]
    return RunError(
        f"{message}, so that a run without some rows begins at the start: {cost_from_start(run)}",
        place=str(run.path),
        hint=shell("lorafit", "train", run.config_file, *words, "--output", f"{run.path}-without"),
    )


def cost_from_start(run: RunDirectory) -> str:
    """What a run from the start takes, from the times of the steps of `run`."""
    steps = [event for event in read_metrics(run.metrics_file) if event["event"] == "step"]
    return f"{count(len(steps), 'step')}, about {duration(sum(number(step.get('seconds')) or 0 for step in steps))}"


def train_without(run: RunDirectory, removal: Removal, output: Path, quiet: bool) -> Result:
    """Train the new run in `output` from the checkpoint of `removal`, or from the start. Raises a LorafitError."""
    config = run.config()
    new = RunDirectory.new(str(output), config.model.name)
    data = config.data.model_copy(update={"drop_rows": (*config.data.drop_rows, *removal.ids)})
    own = config.run.model_copy(update={"output": str(output)})
    config = config.model_copy(update={"data": data, "run": own})
    if removal.checkpoint is None:
        return start_run(config, quiet=quiet)
    for folder in (new.path, new.checkpoints):
        make_folder(folder)
    best = read_facts(run.checkpoint(removal.checkpoint)).get("best_step")
    for step in {removal.checkpoint, removal.checkpoint if best is None else int(best)}:
        shutil.copytree(run.checkpoint(step), new.checkpoint(step))
    for file in (run.prompt_file, run.env_file, run.metrics_file, run.visits_file):
        if file.exists():
            shutil.copyfile(file, new.path / file.name)
    truncate_after(new.metrics_file, removal.checkpoint)
    if new.visits_file.exists():
        truncate_visits(new.visits_file, removal.checkpoint)
    new.write_config(config)  # last: this file makes the folder a run
    return resume_run(new.path, accept_changes=True, quiet=quiet)


def _first_step(run: RunDirectory, config: Config, data: TrainingData, wanted: NDArray[np.int64]) -> int:
    """The number of steps before the first one that sees a row with a number in `wanted`, in training or measuring."""
    steps: dict[str, list[int]] = {}
    for event in read_metrics(run.metrics_file):
        steps.setdefault(event["event"], []).append(int(number(event.get("step")) or 0))
    last = min([max(steps.get("step", [0])), *steps.get("refit", [])])  # the second phase has another order
    if np.isin(data.heldout.numbers, wanted).any():
        last = min([last, *(step - 1 for step in steps.get("heldout", []))])
    order = row_order(config, data)
    indices = np.flatnonzero(np.isin(data.training.numbers, wanted))
    if config.lora.init == "eva" and np.isin(first_rows(data.training, order), indices).any():
        return 0  # the start has seen them
    return next((step for step in range(last) if np.isin(order.rows(step), indices).any()), last)


def _is_usable(run: RunDirectory, step: int) -> bool:
    """Whether the checkpoint of `step` is whole, and that of the best step that it names."""
    folder = run.checkpoint(step)
    if verify_folder(folder):
        return False
    best = read_facts(folder).get("best_step")
    return best is None or not verify_folder(run.checkpoint(best))


def _removed(data: TrainingData, contents: Contents, wanted: Sequence[int]) -> NDArray[np.intp]:
    """The places in `contents` of the rows to remove. Of equal rows the last ones are removed: they cannot be told
    apart, and a file without one of them has the first ones.
    """
    present = np.isin(contents.numbers, data.encoded.numbers)
    hashes = contents.hashes[np.isin(contents.numbers, wanted)]
    return np.concatenate(
        [
            np.flatnonzero(present & (contents.hashes == content))[-times:]
            for content, times in zip(*np.unique(hashes, return_counts=True), strict=True)
        ]
    )


def both_answers(before: RunDirectory, after: RunDirectory) -> list[dict[str, str]]:
    """The prompts that both runs answered, with both answers."""
    first, second = _answers(before), _answers(after)
    return [
        {"prompt": prompt, "before": first[prompt], "after": second[prompt]}
        for prompt in first
        if prompt in second
    ]


def _answers(run: RunDirectory) -> dict[str, str]:
    if not run.samples_file.exists():
        return {}
    return {sample["prompt"]: sample["tuned"]["text"] for sample in run.read_json(run.samples_file)}

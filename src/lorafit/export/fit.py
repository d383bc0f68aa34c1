"""`lorafit export RUN gguf --fit`: tries types from small to large and keeps the first that costs little enough."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.errors import ConfigError, LorafitError, RunError
from lorafit.evaluate.tasks import Task, read_tasks, score
from lorafit.export import parity
from lorafit.export.kinds import EXPORTS
from lorafit.export.number_types import TYPES, Bounds
from lorafit.export.reference import Reference
from lorafit.export.run import Exported, commit, prepare, reference_of
from lorafit.export.run_source import RunSource
from lorafit.infer.model import load
from lorafit.observe.console import table
from lorafit.observe.progress import progress
from lorafit.observe.units import memory_size
from lorafit.storage.atomic import make_folder

MOST_LOSS = 0.01
_MAX_TOKENS = 256  # of the answer to a task
HEADERS = ["type", "size", "tokens/s", "loss", "rise", "same tokens", "answers", "tasks", "result"]


@dataclass(frozen=True, slots=True)
class Tried:
    """One type that was tried. `size` is in bytes, `fault` says why it was not kept, "" if it was."""

    type: str
    size: int
    tokens_per_second: float
    loss: float
    loss_rise: float
    agreement: float
    answers: str
    tasks: str
    fault: str

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The row of a table with HEADERS."""
        numbers = [f"{self.loss:.4f}", f"{self.loss_rise:+.2%}", f"{self.agreement:.1%}"]
        speed = f"{self.tokens_per_second:.1f}"
        result = self.fault or "kept"
        return [self.type, memory_size(self.size), speed, *numbers, self.answers, self.tasks or "-", result]


def fit_run(
    run: str | Path,
    kind: str,
    *,
    output: str | Path | None = None,
    most_loss: float = MOST_LOSS,
    tasks: Sequence[str | Path] = (),
    offline: bool = False,
) -> tuple[Exported | None, list[Tried]]:
    """(the export with the smallest type that raises the loss by at most the share `most_loss` of it, what was tried).

    It also has the adapter's most probable tokens as often as its type needs, and answers as many of the `tasks` as
    the adapter. None, and nothing is written, if no type does. Raises a LorafitError.
    """
    if kind not in EXPORTS or EXPORTS[kind].reader != "llama.cpp" or EXPORTS[kind].is_adapter:
        raise ConfigError(
            f"a {kind} export has no types to choose from", place="--fit", hint="gguf or ollama"
        )
    questions = [task for file in tasks for task in read_tasks(Path(file))]
    export, source = prepare(run, kind, offline=offline)
    if why := parity.missing(export):
        raise ConfigError(f"types cannot be compared: {why}", place="--fit")
    asked = _Asked.of(run, questions, offline) if questions else _Asked((), (), 0)
    reference = reference_of(source, export, "q4_k_m")
    if not reference.rows.texts:
        raise RunError(f"there are no rows to measure on: {reference.rows.name}", hint="give a --type")
    source = replace(source, importance=reference.importance)
    tried: list[Tried] = []
    parent = source.run.exports if output is None else Path(output).expanduser().absolute().parent
    make_folder(parent)
    blocks = (name for name in export.types if TYPES[name].has_blocks)
    for name in sorted(blocks, key=lambda name: TYPES[name].bits):
        with tempfile.TemporaryDirectory(prefix=".lorafit-fit-", dir=parent) as scratch:
            folder = Path(scratch)
            with progress(f"writing {name}") as advance:
                export.write(source, folder, name, advance)
            one, outcome = _try(source, reference, kind, name, folder, most_loss, asked)
            tried.append(one)
            if outcome is not None:
                return commit(source, kind, name, output, (folder, outcome)), tried
    return None, tried


@dataclass(frozen=True, slots=True)
class _Asked:
    """Tasks, their prompts as ids, and how many the adapter answers right, computed on the CPU as the exports are."""

    tasks: Sequence[Task]
    ids: Sequence[Sequence[int]]
    right: int

    @classmethod
    def of(cls, run: str | Path, tasks: Sequence[Task], offline: bool) -> _Asked:
        with progress("answering the tasks with the adapter"):
            model = load(run, device="cpu", offline=offline)
            right = score(model, tasks, max_tokens=_MAX_TOKENS).right
            return cls(tasks, [model.prompt_ids(task.prompt) for task in tasks], right)

    def count_right(self, source: RunSource, answers: Sequence[Sequence[int]]) -> int:
        stops, decode = set(source.contract.stop_ids), source.renderer.tokenizer.decode
        texts = (decode([token for token in ids if token not in stops], skip_special=True) for ids in answers)
        return sum(task.is_right(text) for task, text in zip(self.tasks, texts, strict=True))


def _try(
    source: RunSource,
    reference: Reference,
    kind: str,
    name: str,
    folder: Path,
    most_loss: float,
    asked: _Asked,
) -> tuple[Tried, dict[str, Any] | None]:
    """(what the file of type `name` in `folder` costs, the content of parity.json if that is little enough)."""
    export = EXPORTS[kind]
    with progress(f"reading {name} back") as advance:
        ask = (asked.ids, _MAX_TOKENS)
        result, scores = parity.read_back(source, reference, export, folder, None, advance, ask)
    record = replace(TYPES[name], bounds=Bounds(most_loss, TYPES[name].bounds.agreement))
    cost, _ = parity.cost_of(reference, record, scores)
    right = asked.count_right(source, result["answers"])
    fault, outcome = "", None
    if cost.rise > most_loss:
        fault = "the loss rises too much"
    elif right < asked.right:
        fault = f"the adapter has {asked.right} tasks right"
    elif cost.agreement < record.bounds.agreement:
        fault = "too many other tokens"
    else:
        try:
            outcome = parity.outcome(source, reference, export, record, result, scores)
        except LorafitError as error:
            fault = error.problems[0].message
    tried = Tried(
        type=name,
        size=next(folder.glob("*.gguf")).stat().st_size,
        tokens_per_second=result["tokens_per_second"],
        loss=cost.loss,
        loss_rise=cost.rise,
        agreement=cost.agreement,
        answers=f"{cost.equal} of {len(reference.prompts)}",
        tasks=f"{right} of {len(asked.tasks)}" if asked.tasks else "",
        fault=fault,
    )
    return tried, outcome


def fit_or_fail(run: str | Path, kind: str, *, most_loss: float, **settings: Any) -> Exported:
    """As `fit_run`, with the table on stderr; RunError if no type is good enough."""
    done, tried = fit_run(run, kind, most_loss=most_loss, **settings)
    table(HEADERS, [one.cells() for one in tried], stream=sys.stderr)
    if done is None:
        message = f"no type with blocks keeps the loss within {most_loss:.2%} and the answers"
        raise RunError(
            message, place="--fit", hint=f"`lorafit export {run} {kind} --type bf16`, or a larger --max-loss"
        )
    return done


def share(text: str | None) -> float:
    """`0.5%` or `0.005` as a number; MOST_LOSS for None. Raises ConfigError."""
    if text is None:
        return MOST_LOSS
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"`{text}` is not a share", place="--max-loss", hint="such as 0.5% or 0.005")
    return value

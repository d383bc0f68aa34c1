"""The content of a report, read from the files of a run. Missing and damaged files are left out and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorafit.data.ledger import Ledger
from lorafit.observe.metrics_file import STEP, event_of, read_raw_lines, series
from lorafit.observe.run_summary import Summary, summarize
from lorafit.report.curves import StepCurves
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import MANIFEST
from lorafit.storage.safe_read import read_bytes, read_json

MOST_JSON_BYTES = 20_000_000  # of a small file; a larger one is not of lorafit
MOST_EVENT_BYTES = 20_000_000  # of the lines of all events but steps


@dataclass(frozen=True, slots=True)
class CheckLine:
    """One result of the checks before a run or of the proof after it."""

    name: str
    verdict: str  # pass, warn, fail, skip
    text: str


@dataclass(slots=True)
class Facts:
    """The content of a run's files. `missing` names those that could not be read."""

    name: str
    path: str
    summary: Summary
    metrics: Metrics = field(default_factory=lambda: Metrics())
    config: str = ""
    env: Mapping[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    rows: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    row_list: Mapping[str, Any] = field(default_factory=dict)
    explained: Sequence[Mapping[str, Any]] = ()
    proof: Mapping[str, Any] = field(default_factory=dict)
    checks: Sequence[CheckLine] = ()
    prompt: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def steps(self) -> StepCurves:
        """The curves of all steps."""
        return self.metrics.steps

    @property
    def events(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """All events but steps, by kind."""
        return self.metrics.events

    def series(self, kind: str, name: str) -> list[tuple[float, float]]:
        """(step, value) of the events of `kind` in order, where both are numbers that can be shown."""
        return series(self.events.get(kind, ()), name)

    @property
    def newest_step(self) -> Mapping[str, Any]:
        """The last step as an event, empty where there is none."""
        return event_of(self.metrics.newest) or {}

    def last(self, kind: str) -> Mapping[str, Any]:
        """The newest event of `kind`, empty where there is none."""
        events = self.events.get(kind, ())
        return events[-1] if events else {}

    @property
    def proven(self) -> Sequence[CheckLine]:
        """The checks of the proof."""
        return _check_lines(self.proof)


class Metrics:
    """The events of a metrics file, line by line; only what a page shows is kept."""

    def __init__(self) -> None:
        self.steps = StepCurves()
        self.events: dict[str, list[Mapping[str, Any]]] = {}
        self.newest = b""  # the line of the last step
        self._num_damaged = self._num_left_out = self._num_bytes = 0

    def add(self, line: bytes) -> None:
        """Take the next line. Those of steps count after `flush` of the curves."""
        if line.startswith(STEP):
            self.steps.add(line)
            self.newest = line
        elif (event := event_of(line)) is None:
            self._num_damaged += 1
        elif event.get("event") == "step":
            self.steps.add(line)
        else:
            self._num_bytes += len(line)
            kept = self.events.setdefault(str(event.get("event")), [])
            if self._num_bytes > MOST_EVENT_BYTES and kept:
                self._num_left_out += 1
                kept.pop()  # the newest one stays
            kept.append(event)

    def missing(self, name: str) -> list[str]:
        """What of the file `name` is not shown."""
        said = []
        if num_damaged := self._num_damaged + self.steps.num_damaged:
            said.append(f"{num_damaged:,} damaged lines of {name}")
        if self._num_left_out:
            said.append(f"{self._num_left_out:,} later events of {name}, which are too many")
        return said


def read_facts(run: RunDirectory, metrics: Metrics | None = None, summary: Summary | None = None) -> Facts:
    """The facts of `run`; `metrics` and `summary`, where the caller has them, are not read again.

    Raises RunError when the metrics exist and cannot be read.
    """
    if metrics is None:
        metrics = Metrics()
        for line in read_raw_lines(run.metrics_file):
            metrics.add(line)
        metrics.steps.flush()
    facts = Facts(run.path.resolve().name, str(run.path), summary or summarize(run), metrics)
    facts.missing += metrics.missing(run.metrics_file.name)
    try:
        facts.config = read_bytes(run.config_file, MOST_JSON_BYTES).decode(errors="replace")
    except OSError:
        facts.missing.append(run.config_file.name)
    facts.env = _mapping(run.env_file, facts)
    facts.rows = _mapping(run.rows_file, facts)
    facts.prompt = _mapping(run.prompt_file, facts)
    facts.proof = _mapping(run.proof_file, facts, expected=False)
    facts.checks = _check_lines(_json(run.check_file, facts, expected=False))
    facts.samples = _mappings(run.samples_file, facts)
    facts.explained = _mappings(run.why_file, facts)
    facts.row_list = _mapping(run.row_list_file, facts, expected=False)
    facts.ledger = _ledger(run.ledger_file, facts)
    facts.hashes = _hashes(run)
    return facts


def _json(path: Path, facts: Facts, *, expected: bool = True) -> Any:
    try:
        return read_json(path, MOST_JSON_BYTES)
    except (OSError, ValueError) as error:
        if expected or not isinstance(error, FileNotFoundError):
            facts.missing.append(path.name)
    return None


def _mapping(path: Path, facts: Facts, *, expected: bool = True) -> Mapping[str, Any]:
    value = _json(path, facts, expected=expected)
    return value if isinstance(value, dict) else {}


def _mappings(path: Path, facts: Facts) -> list[Mapping[str, Any]]:
    values = _json(path, facts, expected=False)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _ledger(path: Path, facts: Facts) -> Ledger | None:
    """The ledger, if its sums close."""
    value = _mapping(path, facts)
    try:
        ledger = Ledger.from_json(value)
        ledger.check()
        halves = (ledger.trained, ledger.held_out)
        counts = [ledger.num_rows, *(n for half in halves for n in asdict(half).values())]
        counts += [n for rows in ledger.dropped.values() for n in (rows.rows, *rows.first)]
        counts += ledger.held_out_rows
        if all(type(count) is int and 0 <= count < 10**15 for count in counts):
            return ledger
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, OverflowError):
        pass
    if path.name not in facts.missing:
        facts.missing.append(path.name)
    return None


def _check_lines(value: object) -> list[CheckLine]:
    """The checks in check.json or proof.json."""
    listed = value.get("checks") if isinstance(value, Mapping) else value
    if not isinstance(listed, list):
        return []
    lines = []
    for check in listed:
        if isinstance(check, dict):
            text = str(check.get("text") or check.get("message") or "")
            place, hint = str(check.get("place") or ""), str(check.get("hint") or "")
            text += f" ({place})" if place else ""
            text += f": {hint}" if hint else ""
            lines.append(CheckLine(str(check.get("name", "")), str(check.get("verdict", "skip")), text))
    return lines


def _hashes(run: RunDirectory) -> dict[str, str]:
    """The hashes in the manifest of the final adapter, else of the newest checkpoint."""
    steps = run.saved_steps()
    folders = [run.adapter, *(run.checkpoint(step) for step in steps[-1:])]
    for folder in folders:
        try:
            manifest = read_json(folder / MANIFEST, MOST_JSON_BYTES)
            stored = manifest["facts"]
            hashes = {
                "base model": stored.get("base_model"),
                "data": stored.get("data"),
                "prompt contract": stored.get("prompt_contract"),
                "adapter": manifest["files"]["adapter_model.safetensors"]["sha256"],
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return {name: str(value) for name, value in hashes.items() if value}
    return {}

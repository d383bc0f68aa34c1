"""Several runs over each other: curves, keys that differ, answers side by side, proof and exports; and sweeps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorafit.errors import LorafitError
from lorafit.run_dir import RunDirectory
from lorafit.storage.safe_read import read_json, read_text
from lorafit.studio.folder import Folder, note_of
from lorafit.studio.web import html

MOST_RUNS, MOST_PROMPTS, MOST_EXPORTS, COLOURS = 24, 20, 20, 9
SWEEP = "sweep.json"
_MAX_JSON = 2_000_000


@dataclass(frozen=True, slots=True)
class Compared:
    """One of the runs; `style` is the CSS class of its colour."""

    id: str
    name: str
    style: str
    facts: Any
    keys: Mapping[str, str]
    exports: Sequence[Exported]
    note: str

    @property
    def loss(self) -> float | None:
        """The lowest held-out loss, else the last training loss."""
        summary = self.facts.summary
        return summary.loss if summary.heldout_loss is None else summary.heldout_loss  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Exported:
    """An export of a run: whether its file of parity says verified (None: no file), why not, and its card."""

    name: str
    verified: bool | None = None
    text: str = ""
    card: str = ""


def keys_of(run: RunDirectory) -> dict[str, str]:
    """The config of a run as texts by `section.key`; nothing where it cannot be read."""
    with suppress(LorafitError):
        config = run.config().model_dump(mode="json")
        return {
            f"{section}.{key}": _text(value)
            for section, held in config.items()
            for key, value in held.items()
        }
    return {}


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differing(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the keys that are not the same in all; the name of the output always is not."""
    known = dict.fromkeys(key for run in runs for key in run.keys if key != "run.output")
    rows = [(key, [run.keys.get(key, "") for run in runs]) for key in known]
    return [row for row in rows if len(set(row[1])) > 1]


def answers(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """The prompts of all runs, each with its right answer, the base's, and the answer of each run (None: not asked)."""
    found: dict[str, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        for sample in run.facts.samples:
            prompt = str(sample.get("prompt", ""))
            base = sample.get("base")
            entry = found.setdefault(
                prompt, {"prompt": prompt, "right": str(sample.get("answer", "")), "base": ""}
            )
            entry["base"] = entry["base"] or (str(base.get("text", "")) if isinstance(base, dict) else "")
            tuned = sample.get("tuned")
            entry.setdefault("runs", [None] * len(runs))[index] = (
                str(tuned.get("text", "")) if isinstance(tuned, dict) else ""
            )
    return list(found.values())[:MOST_PROMPTS]


def exports_of(run: RunDirectory) -> list[Exported]:
    """The exports in a run directory, at most MOST_EXPORTS."""
    found = []
    for path in sorted(run.exports.glob("*/"))[:MOST_EXPORTS]:
        verified, text, card = None, "", ""
        with suppress(OSError, ValueError):
            parity = read_json(path / "parity.json", _MAX_JSON)
            if isinstance(parity, dict):
                verified, text = parity.get("verified") is True, str(parity.get("why", ""))
        with suppress(OSError, ValueError):
            card = read_text(path / "README.md", _MAX_JSON)
        found.append(Exported(path.name, verified, text, card))
    return found


def sweeps_of(folder: Folder) -> dict[str, tuple[str, list[str]]]:
    """The sweeps below the folder: by id, the name and the ids of the trials that have begun."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, run in sorted(folder.known().items(), key=lambda item: str(item[1].path)):
        parent: Path = run.path.parent
        if (parent / SWEEP).is_file():
            found.setdefault(folder.id_of(parent), (parent.name, []))[1].append(name)
    return found


def _heldout(facts: Any) -> list[tuple[float, float]]:
    """The held-out losses; that of the base comes first."""
    base, points = facts.summary.base_loss, facts.series("heldout", "loss")
    return points if base is None or not points or points[0][0] == 0 else [(0, base), *points]


async def _compare(request: Request) -> Response:
    return html(request, "compare.html", **await asyncio.to_thread(_content, request))


def _content(request: Request) -> dict[str, Any]:
    from lorafit.report.plot import Line, line_chart, smoothed
    from lorafit.studio.setting_charts import Trial, setting_charts

    state = request.app.state
    folder: Folder = state.folder
    folder.scan()
    sweeps = sweeps_of(folder)
    names = [name for name in request.query_params.getlist("run") if name]
    if (sweep := request.query_params.get("sweep")) in sweeps:
        names = sweeps[sweep][1]
    runs = []
    for index, name in enumerate(list(dict.fromkeys(names))[:MOST_RUNS]):
        run = folder.run(name)
        facts = state.live.of(run).facts()
        shown = folder.name_of(run)
        runs.append(
            Compared(name, shown, f"c{index % COLOURS}", facts, keys_of(run), exports_of(run), note_of(run))
        )
    charts = []
    for title, points in (
        ("Held-out loss", _heldout),
        ("Training loss, smoothed", lambda facts: smoothed(facts.steps.curves["loss"].means(), 20)),
        ("Gradient norm", lambda facts: smoothed(facts.steps.curves["grad_norm"].means(), 20)),
        ("Learning rate", lambda facts: facts.steps.curves["learning_rate"].points()),
    ):
        dots = title == "Held-out loss"
        lines = [Line(run.name, run.style, points(run.facts), dots=dots) for run in runs]
        if chart := line_chart(title, lines, lambda value: f"{value:.3g}", tall=dots):
            charts.append(chart)
    known = [(name, folder.name_of(run)) for name, run in folder.known().items()]
    differ = differing(runs)
    trials = [Trial(run.name, run.style, run.loss, run.keys) for run in runs if run.loss is not None]
    return {
        "runs": runs,
        "known": known,
        "charts": charts,
        "differing": differ,
        "settings": setting_charts(trials, [key for key, _ in differ]),
        "answers": answers(runs),
        "sweeps": sweeps,
    }


ROUTES = [Route("/compare", _compare)]

"""The page: report.html, whole, from the facts of a run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from lorafit.observe.metrics_file import number
from lorafit.observe.units import duration, memory_size, short_count
from lorafit.report import sections
from lorafit.report.escape import html
from lorafit.report.run_data import Facts, read_facts
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import write_file
from lorafit.version import __version__

_HERE = Path(__file__).parent


def write_report(run: RunDirectory, output: Path | None = None) -> Path:
    """Write the report of `run`, into its directory unless `output` says where; returns its path. Raises RunError."""
    path = output or run.report_file
    write_file(path, page(read_facts(run)))
    return path


def page(facts: Facts) -> str:
    """The whole page. Its one script is allowed by its hash, so that nothing else in it can run, whatever it holds."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    made = [(title, name, make(facts)) for title, name, make in SECTIONS]
    shown = [(title, name, body) for title, name, body in made if body]
    links = "".join(f'<a href="#{name}">{title}</a>' for title, name, _ in shown)
    bodies = "\n".join(
        f'<section id="{name}"><h2>{title}</h2>\n{body}\n</section>' for title, name, body in shown
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html(facts.name)} · lorafit</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
{_head(facts)}
<nav>{links}</nav>
</header>
<main>
{bodies}
</main>
{_foot(facts)}
<script>{script}</script>
</body>
</html>
"""


SECTIONS = [
    ("Proof", "proof", sections.proof),
    ("Loss", "loss", sections.loss),
    ("Progress", "progress", sections.progress),
    ("Answers", "answers", sections.answers),
    ("Data", "data", sections.data),
    ("Rows as trained", "rows", sections.rows),
    ("Notes", "notes", sections.notes),
    ("Reproduce", "reproduce", sections.reproduce),
]


def _head(facts: Facts) -> str:
    start = facts.last("run_started")
    parameters, trained = number(start.get("num_parameters")), number(start.get("num_trainable"))
    said = [facts.model]
    if parameters and trained is not None:
        said.append(f"{short_count(parameters)} parameters, {short_count(trained)} trained")
    said += [f"{start[key]}" for key in ("device", "dtype") if start.get(key)]
    said.append(f"started {facts.started}")
    verdict = str(facts.proof.get("verdict"))
    badges = [(facts.state, facts.state)]
    if verdict in sections.PROOF_WORDS:
        badges.append((verdict, sections.PROOF_WORDS[verdict]))
    shown = " ".join(f'<span class="badge {style}">{html(text)}</span>' for style, text in badges)
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in _tiles(facts)
    )
    return (
        f"<h1>{html(facts.name)}</h1> {shown}\n"
        f'<p class="sub">{" · ".join(html(text) for text in said if text)}</p>\n<div class="tiles">{tiles}</div>'
    )


def _tiles(facts: Facts) -> Sequence[tuple[str, str]]:
    """(value as HTML, label) of what one wants to know first."""
    tiles = []
    if (best := facts.heldout_loss) is not None:
        base = f"<small>{facts.base_loss:.3f} →</small> " if facts.base_loss is not None else ""
        tiles.append((f"{base}{best:.3f}", "held-out loss"))
    elif losses := facts.series("step", "loss"):
        tiles.append((f"{losses[-1][1]:.3f}", "loss of the last step"))
    for told in facts.proof.get("checks", ()) if isinstance(facts.proof.get("checks"), list) else ():
        values = told.get("values") if isinstance(told, dict) and told.get("name") == "stop" else None
        if isinstance(values, dict) and number(values.get("prompts")):
            ended, prompts = (int(number(values.get(key)) or 0) for key in ("ended", "prompts"))
            tiles.append((f"{ended} <small>of {prompts}</small>", "answers ended"))
    of = f" <small>of {facts.num_steps:,}</small>" if facts.num_steps else ""
    tiles.append((f"{facts.step:,}{of}", "steps"))
    steps = facts.events.get("step", ())
    seconds = [number(event.get("seconds")) or 0.0 for event in steps]
    tokens = [number(event.get("tokens")) or 0.0 for event in steps]
    supervised = sum(number(event.get("supervised_tokens")) or 0.0 for event in steps)
    memory = max((number(event.get("memory_bytes")) or 0.0 for event in steps), default=0.0)
    if sum(seconds):
        tiles.append(
            (
                f"{short_count(supervised)} <small>of {short_count(sum(tokens))}</small>",
                "trained of all tokens",
            )
        )
        speed = f"{sum(tokens) / sum(seconds):,.0f} tokens/s"
        tiles.append((duration(sum(seconds)), f"at {speed}"))
    if memory:
        tiles.append((memory_size(memory), "peak memory"))
    return tiles


def _foot(facts: Facts) -> str:
    missing = f" Not shown, missing or damaged: {html(', '.join(facts.missing))}." if facts.missing else ""
    return f"<footer><div>Made by lorafit {__version__} from the files of {html(facts.path)}.{missing}</div></footer>"

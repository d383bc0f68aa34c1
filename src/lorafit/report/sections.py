"""The sections of the page, each a function from the facts to HTML; an empty one has nothing to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.ledger import Tokens
from lorafit.observe.metrics_file import number
from lorafit.observe.units import memory_size
from lorafit.report import plot
from lorafit.report.escape import cut, html
from lorafit.report.run_data import CheckLine, Facts

PROOF_WORDS = {"pass": "proven", "warn": "proven, with warnings", "fail": "proof failed"}
PROMPT_KEYS = {
    "template": "template",
    "system": "system prompt",
    "bos": "begins with",
    "eos": "ends with",
    "stop_ids": "stop tokens",
    "train_on": "trained on",
    "max_length": "longest row",
}
VERDICTS = ("pass", "warn", "fail", "skip")
MOST_PROMPTS, MOST_MOMENTS, MOST_NOTES, MOST_DROPS = 50, 12, 100, 20
ANSWER_CHARACTERS, MOMENT_CHARACTERS = 3000, 500
_GOING_ON = '<span class="badge small warn">did not end</span>'


def proof(facts: Facts) -> str:
    """What was proven after training, and what was checked before it."""
    parts = []
    if facts.proven:
        parts.append(_list("After training", facts.proven))
    elif facts.state == "finished":
        parts.append('<div class="card empty">This run was not verified (run.verify=false).</div>')
    if facts.checks:
        wrong = [told for told in facts.checks if told.verdict != "pass"]
        right = [told for told in facts.checks if told.verdict == "pass"]
        inner = f"<ul class='told'>{_items(wrong)}</ul>" if wrong else ""
        if right:
            summary = f"{len(right)} of {len(facts.checks)} checks pass"
            inner += f"<details><summary>{summary}</summary><ul class='told'>{_items(right)}</ul></details>"
        parts.append(f'<div class="card"><h3>Before training</h3>{inner}</div>')
    return "".join(parts)


def loss(facts: Facts) -> str:
    """Training loss, held-out loss and the base's, over the steps."""
    raw = facts.series("step", "loss")
    held, base = facts.series("heldout", "loss"), facts.base_loss
    lines = []
    if len(raw) >= plot.SMOOTHED_FROM:
        lines += [
            plot.Line("each step", "raw", raw),
            plot.Line("training, smoothed", "train", plot.smoothed(raw)),
        ]
    else:
        lines.append(plot.Line("training", "train", raw, dots=True))
    if base is not None and raw:
        steps = [step for step, _ in [*raw, *held]]
        ends = (min(steps), max(steps))
        lines.append(plot.Line("held out, base", "base", [(step, base) for step in ends]))
    lines.append(plot.Line("held out", "held", held, dots=True))
    chart = plot.line_chart("Loss, mean over supervised tokens", lines, lambda value: f"{value:.3g}")
    return chart.replace('class="chart"', 'class="chart tall"', 1)


def progress(facts: Facts) -> str:
    """Learning rate, gradient norm, throughput and memory."""
    speed = [
        (step, tokens / seconds)
        for (step, tokens), (_, seconds) in zip(
            facts.series("step", "tokens"), facts.series("step", "seconds"), strict=False
        )
        if seconds > 1e-9
    ]
    norms = facts.series("step", "grad_norm")
    charts = [
        plot.line_chart("Learning rate", [_one(facts.series("step", "learning_rate"))], _short),
        plot.line_chart("Gradient norm", _smooth(norms), _short, log=True),
        plot.line_chart("Tokens a second", _smooth(speed), lambda value: f"{value:,.0f}"),
        plot.line_chart("Peak memory", [_one(facts.series("step", "memory_bytes"))], memory_size),
    ]
    shown = "".join(charts)
    return f'<div class="two">{shown}</div>' if shown else ""


def answers(facts: Facts) -> str:
    """Held-out prompts: the right answer, the base's and the tuned model's, and how it came about."""
    moments = facts.events.get("answers", ())
    if facts.samples:
        asked = [_sample(sample, moments) for sample in facts.samples[:MOST_PROMPTS]]
    else:
        base: Any = next((event["base"] for event in moments if event.get("base")), [])
        prompts = moments[-1].get("prompts") if moments else []
        asked = [
            _card(str(prompt), [("base", _at(base, index), None)], _over_time(index, moments))
            for index, prompt in enumerate(_sequence(prompts)[:MOST_PROMPTS])
        ]
    return "".join(asked)


def data(facts: Facts) -> str:
    """The ledger, whose sums close, and how long rows are."""
    parts = []
    if (ledger := facts.ledger) is not None:
        buckets = [
            ("trained", "train", ledger.trained.rows),
            ("held out", "held", ledger.held_out.rows),
            ("dropped", "cut", ledger.num_dropped),
        ]
        drops = "".join(
            f"<tr><th></th><td>{html(cut(reason, 200))}: {html(_rows_named(rows.first, rows.rows))}</td>"
            f'<td class="n">{rows.rows:,}</td></tr>'
            for reason, rows in list(ledger.dropped.items())[:MOST_DROPS]
        )
        parts.append(_account("Rows", buckets, ledger.num_rows, drops))
        parts.append(_tokens("Tokens of the trained rows", ledger.trained))
        if ledger.held_out.rows:
            parts.append(_tokens("Tokens of the held-out rows", ledger.held_out))
    lengths = facts.rows.get("lengths")
    if isinstance(lengths, Mapping):
        edges, training, heldout = (_numbers(lengths.get(key)) for key in ("edges", "training", "heldout"))
        counts = [
            ("trained", "train", [int(n) for n in training]),
            ("held out", "held", [int(n) for n in heldout]),
        ]
        chart = plot.bars("Rows by their length in tokens", edges, counts)
        parts.append(chart)
    shown = "".join(parts)
    return f'<div class="two">{shown}</div>' if shown else ""


def rows(facts: Facts) -> str:
    """Some rows exactly as the model reads them, with what is trained marked."""
    shown = []
    for row in _sequence(facts.rows.get("rows"))[:10]:
        if not isinstance(row, Mapping):
            continue
        spans = [span for span in _sequence(row.get("spans")) if isinstance(span, list) and len(span) == 2]
        text = "".join(f"<mark>{html(t)}</mark>" if trained is True else html(t) for t, trained in spans)
        count = f"{_count(row.get('tokens'))} tokens, {_count(row.get('trained'))} trained"
        shown.append(
            f'<div class="card"><div class="place">{html(row.get("place", ""))} · {count}</div>'
            f'<div class="row">{text}</div></div>'
        )
    if not shown:
        return ""
    said = "The tokens of a row, decoded. <mark>Marked</mark> is what carries loss."
    return f'<p class="lead">{said}</p><div class="two">{"".join(shown)}</div>'


def notes(facts: Facts) -> str:
    """What the curves deserve, warnings, then what else was said."""
    said = [
        (str(event.get("level", "info")), str(event.get("text", "")))
        for event in facts.events.get("note", ())
    ]
    wrong = list(dict.fromkeys(text for level, text in said if level != "info"))
    other = [text for level, text in said if level == "info"]
    found = [
        f"step {number(event.get('step')) or 0:,.0f}: {event.get('text', '')}: {event.get('hint', '')}"
        for event in facts.events.get("diagnosis", ())
    ]
    inner = "".join(
        f'<li><span class="badge small warn">curve</span><span>{html(cut(text, 1000))}</span></li>'
        for text in found[:MOST_NOTES]
    )
    inner += "".join(
        f'<li><span class="badge small warn">warning</span><span>{html(cut(text, 1000))}</span></li>'
        for text in wrong[:MOST_NOTES]
    )
    inner = f"<ul class='told'>{inner}</ul>" if inner else "<p class='empty'>No warnings.</p>"
    if other:
        lines = html("\n".join(cut(text, 1000) for text in other[:MOST_NOTES]))
        inner += f"<details><summary>everything that was said</summary><br><pre>{lines}</pre></details>"
    return f'<div class="card">{inner}</div>' if said or found else ""


def reproduce(facts: Facts) -> str:
    """The command, versions, hashes and the whole config."""
    env = facts.env
    packages = env.get("packages")
    versions = {"lorafit": env.get("lorafit"), "Python": env.get("python")}
    versions |= dict(packages) if isinstance(packages, Mapping) else {}
    versions |= {"platform": env.get("platform"), "threads": env.get("threads")}
    parts = []
    if env.get("command"):
        parts.append(f'<div class="card"><h3>Command</h3><pre>{html(env["command"])}</pre></div>')
    tables = _table("Versions", versions) + _table("SHA-256", facts.hashes, code=True)
    prompt = {
        label: facts.prompt.get(key) for key, label in PROMPT_KEYS.items() if facts.prompt.get(key) != ""
    }
    tables += _table("Prompt contract", prompt)
    if tables:
        parts.append(f'<div class="two">{tables}</div>')
    if facts.config:
        text = html(cut(facts.config, 40_000))
        parts.append(
            f'<div class="card"><h3>Config, every key</h3><details><summary>config.yaml</summary><br><pre>{text}</pre>'
            "</details></div>"
        )
    return "".join(parts)


def _list(title: str, told: Sequence[CheckLine]) -> str:
    return f'<div class="card"><h3>{title}</h3><ul class="told">{_items(told)}</ul></div>'


def _items(told: Sequence[CheckLine]) -> str:
    return "".join(
        f'<li><span class="badge small {_known(item.verdict)}">{html(item.verdict)}</span>'
        f'<span><span class="name">{html(item.name)}</span>{html(cut(item.text, 2000))}</span></li>'
        for item in told
    )


def _known(verdict: str) -> str:
    return verdict if verdict in VERDICTS else "skip"


def _sample(sample: Mapping[str, Any], moments: Sequence[Mapping[str, Any]]) -> str:
    prompt = str(sample.get("prompt", ""))
    given = [("right answer", str(sample.get("answer", "")), None)]
    for name in ("base", "tuned"):
        answer = sample.get(name)
        if isinstance(answer, Mapping):
            given.append((name, str(answer.get("text", "")), answer.get("stopped")))
    index = next(
        (
            _sequence(event.get("prompts")).index(prompt)
            for event in moments
            if prompt in _sequence(event.get("prompts"))
        ),
        None,
    )
    return _card(prompt, given, _over_time(index, moments) if index is not None else "")


def _card(prompt: str, given: Sequence[tuple[str, str, object]], after: str) -> str:
    columns = "".join(
        f'<div class="{"base" if name == "base" else "tuned" if name == "tuned" else ""}"><h3>{name}'
        + (f" {_GOING_ON}" if stopped is False else "")
        + f"</h3>{_say(text, ANSWER_CHARACTERS)}</div>"
        for name, text, stopped in given
    )
    question = html(cut(prompt, ANSWER_CHARACTERS))
    return f'<div class="card"><div class="question">{question}</div><div class="answers">{columns}</div>{after}</div>'


def _over_time(index: int, moments: Sequence[Mapping[str, Any]]) -> str:
    """The answer to one prompt while training, at up to MOST_MOMENTS moments; an unchanged one is shown once."""
    said: list[tuple[int, int, tuple[str, bool]]] = []  # first and last step of an answer
    for event in moments:
        stopped = _sequence(event.get("stopped"))
        going = index < len(stopped) and stopped[index] is False
        step, answer = int(number(event.get("step")) or 0), (_at(event.get("tuned"), index), going)
        first = said.pop()[0] if said and said[-1][2] == answer else step
        said.append((first, step, answer))
    lines = "".join(
        f"<dt>step {first:,}{f' – {last:,}' if last != first else ''}</dt>"
        f"<dd>{_say(text, MOMENT_CHARACTERS)}{_GOING_ON if going else ''}</dd>"
        for first, last, (text, going) in plot.thinned(said, MOST_MOMENTS)
    )
    return (
        f'<details open><summary>while training</summary><dl class="time">{lines}</dl></details>'
        if lines
        else ""
    )


def _say(text: str, most: int) -> str:
    return (
        f'<div class="say">{html(cut(text, most))}</div>'
        if text.strip()
        else '<div class="empty">nothing</div>'
    )


def _account(title: str, buckets: Sequence[tuple[str, str, int]], total: int, more: str = "") -> str:
    lines = "".join(
        f'<tr><th><span class="key {style}">{name}</span></th><td></td><td class="n">{count:,}</td>'
        f'<td class="n">{count / total:.1%}</td></tr>'
        for name, style, count in buckets
        if total
    )
    return (
        f'<div class="card"><h3>{title}</h3>{plot.divided(buckets)}<table>{lines}{more}'
        f'<tr class="sum"><th>sum</th><td></td><td class="n">{total:,}</td><td></td></tr></table></div>'
    )


def _tokens(title: str, tokens: Tokens) -> str:
    buckets = [
        ("trained", "train", tokens.trained),
        ("masked", "masked", tokens.masked),
        ("truncated", "cut", tokens.truncated),
    ]
    return _account(title, buckets, tokens.total)


def _rows_named(first: Sequence[int], count: int) -> str:
    named = ", ".join(str(row + 1) for row in first[:8])
    return f"rows {named}" + (" ..." if count > 8 else "")


def _table(title: str, values: Mapping[str, Any], *, code: bool = False) -> str:
    opened, closed = ("<code>", "</code>") if code else ("", "")
    lines = "".join(
        f"<tr><th>{html(name)}</th><td>{opened}{html(cut(value, 300))}{closed}</td></tr>"
        for name, value in values.items()
        if value is not None
    )
    return f'<div class="card"><h3>{title}</h3><table>{lines}</table></div>' if lines else ""


def _one(points: plot.Points) -> plot.Line:
    return plot.Line("value", "one", points)


def _smooth(points: plot.Points) -> list[plot.Line]:
    if len(points) < plot.SMOOTHED_FROM:
        return [_one(points)]
    return [plot.Line("each step", "raw", points), plot.Line("smoothed", "train", plot.smoothed(points))]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return (
        f"{value:.3g}"
        if 1e-3 <= abs(value) < 1e5
        else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _sequence(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: object) -> list[float]:
    found = [number(item) for item in _sequence(value)]
    return [item for item in found if item is not None]


def _at(value: object, index: int) -> str:
    listed = _sequence(value)
    return str(listed[index]) if index < len(listed) else ""


def _count(value: object) -> str:
    return f"{number(value) or 0:,.0f}"

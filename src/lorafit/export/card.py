"""README.md of an export, the model card: base, data, recipe, results and use, in `templates/card.md`.

It is written from the run's files, and contains no row of the data, no secret and no path of the machine.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorafit.data.contract import begins_with
from lorafit.data.ledger import Ledger
from lorafit.export.kinds import Export
from lorafit.export.parity import sentence
from lorafit.export.quoting import code, fenced, yaml_text
from lorafit.export.run_source import RunSource
from lorafit.hub.client import token
from lorafit.observe.metrics_file import read_metrics, series
from lorafit.redact import json_line, redact, shell, without_secrets
from lorafit.report.plot import thinned
from lorafit.version import __version__

FILE = "README.md"
MOST_ROWS = 10
_BARS = "▁▂▃▄▅▆▇█"


def card(
    source: RunSource,
    export: Export,
    type_name: str,
    folder: Path,
    parity: Mapping[str, Any],
    usage: str = "",
) -> str:
    """The model card of the export in `folder`, whose weights are `type_name`; `usage` replaces that of its kind."""
    header: dict[str, Any] = {"library_name": export.library, "tags": ["lora", "lorafit"]}
    if source.base.revision is not None:
        header["base_model"] = source.base_name
        header["base_model_relation"] = "adapter" if export.is_adapter else "finetune"
    file = next((path.name for path in folder.glob("*.gguf")), "")
    contract, decode = source.contract, source.renderer.tokenizer.decode
    text = _TEMPLATE.render(
        source=source,
        export=export,
        type_name=type_name,
        version=__version__,
        front=yaml_text(header),
        usage=usage
        or export.usage.format(
            base=code(source.base_name),
            base_literal=json_line(source.base_name),  # in JSON and in Python
            name=shell(source.name.lower()),
            file=shell(file),
        ),
        contract=contract,
        begins=begins_with(None if contract.bos is None else code(contract.bos), contract.add_bos),
        stops=[f"{code(decode([token]))} ({token})" for token in contract.stop_ids],
        command=_command(source),
        parity=parity,
        cost=sentence(parity) if parity["verified"] else "",
        **_origin(source),
        **_results(source),
    )
    return redacted(text)


def redacted(text: str) -> str:
    """`text` without tokens, passwords and the names of this machine's home and working folders."""
    text = redact(text)
    if stored := token():  # the login of the hub's library has any form
        text = text.replace(stored, "***")
    for folder in sorted({str(Path.cwd()), str(Path.home())} - {"/"}, key=len, reverse=True):
        text = text.replace(folder + os.sep, "").replace(folder, "")
    return text


def nameless(word: str) -> str:
    """A word of a command or config; an absolute path in it, also after `=`, is cut to its last part."""
    key, equals, value = word.rpartition("=")
    path = PureWindowsPath(value) if re.match(r"[A-Za-z]:[\\/]", value) else PurePosixPath(value)
    is_local = path.is_absolute() or value.startswith(("~", "../"))
    return f"{key}{equals}{path.name or '.'}" if is_local else word


def _command(source: RunSource) -> str:
    if source.config is None:
        return ""
    command = str(source.run.read_json(source.run.env_file).get("command", ""))
    try:
        return shell(*map(nameless, without_secrets(shlex.split(command))))
    except ValueError:  # no line of a shell: it is left out
        return ""


def _origin(source: RunSource) -> dict[str, Any]:
    """The run's files of rows, its ledger, and the sections of its config that decide the result, without paths.

    All are empty for an adapter that is not from a run.
    """
    if source.config is None:
        return {"paths": (), "ledger": None, "recipe": ""}
    config = source.config.model_dump(mode="json", exclude_none=True)
    sections = {section: _nameless(config[section]) for section in ("model", "lora", "data", "train")}
    return {
        "paths": [*map(nameless, source.config.data.path)],
        "ledger": Ledger.from_json(source.run.read_json(source.run.ledger_file)),
        "recipe": yaml_text(sections, width=100),
    }


def _nameless(value: Any) -> Any:
    if isinstance(value, str):
        return nameless(value)
    if isinstance(value, dict):
        return {key: _nameless(item) for key, item in value.items()}
    return [_nameless(item) for item in value] if isinstance(value, list) else value


def _results(source: RunSource) -> dict[str, Any]:
    """Losses by step, a line of bars, and some steps as rows of a table."""
    events = read_metrics(source.run.metrics_file) if source.run.metrics_file.is_file() else iter(())
    losses: dict[int, float] = {}
    heldout_events = []
    for event in events:
        if event.get("event") == "heldout":
            heldout_events.append(event)
        elif event.get("event") == "step":
            losses |= {int(step): loss for step, loss in series([event], "loss")}
    heldout = {int(step): loss for step, loss in series(heldout_events, "loss")}
    every, values = max(1, -(-len(losses) // 60)), [*losses.values()]
    means = [fmean(values[start : start + every]) for start in range(0, len(values), every)]
    some_steps = sorted({*thinned([*losses], MOST_ROWS), *thinned([*heldout], MOST_ROWS)})
    columns = [{step: f"{loss:.4f}" for step, loss in column.items()} for column in (losses, heldout)]
    return {
        "losses": losses,
        "heldout": heldout,
        "base": series(heldout_events, "base_loss"),
        "every": every,
        "curve": _curve(means),
        "rows": [[step, *(column.get(step, "") for column in columns)] for step in some_steps],
    }


def _curve(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


_ENVIRONMENT = Environment(  # noqa: S701 (Markdown, not HTML)
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"code": code, "fenced": fenced, "quoted": lambda text: code(json_line(text))}
_TEMPLATE = _ENVIRONMENT.get_template("card.md")

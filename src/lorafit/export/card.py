"""README.md of an export, the model card: base, data, recipe, results and use.

It is written from the run's files, and contains no row of the data, no secret and no path of the machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean
from typing import Any

import yaml

from lorafit.data.ledger import Ledger
from lorafit.export.kinds import Export
from lorafit.export.run_source import RunSource
from lorafit.hub.client import token
from lorafit.observe.metrics_file import read_metrics, series
from lorafit.redact import redact, without_secrets
from lorafit.version import __version__

FILE = "README.md"
MOST_ROWS = 10
_BARS = "▁▂▃▄▅▆▇█"


def card(source: RunSource, export: Export, type_name: str, folder: Path, parity: Mapping[str, Any]) -> str:
    """The model card of the export in `folder`, whose weights are `type_name`."""
    header: dict[str, Any] = {"library_name": export.library, "tags": ["lora", "lorafit"]}
    if source.base.revision is not None:
        header["base_model"] = source.base_name
        header["base_model_relation"] = "adapter" if export.is_adapter else "finetune"
    front = yaml.safe_dump(without_secrets(header), sort_keys=False, allow_unicode=True)
    revision = f" at `{source.base.revision}`" if source.base.revision else ""
    file = next((path.name for path in folder.glob("*.gguf")), "")
    usage = export.usage.format(base=source.base_name, name=source.name.lower(), file=file)
    parts = [
        f"---\n{front}---\n\n# {source.name}",
        f"A {export.title} ({type_name}) of `{source.base_name}`{revision}, fine-tuned with LoRA by lorafit "
        f"{__version__}.",
        f"## How to use it\n\n{usage}",
        f"## Prompt\n\n{_prompt(source)}",
        f"## Data\n\n{_data(source)}",
        f"## Recipe\n\n{_recipe(source)}",
        f"## Results\n\n{_results(source)}",
        f"## Is it the adapter that was trained?\n\n{_parity(parity)}",
        "## Licence\n\n"
        f"This export is derived from the base model, `{source.base_name}`, so the licence of the base applies. "
        "lorafit does not know the licence of the data. Whoever publishes this export checks it and states the "
        "licence as `license:` in the header of this file.",
    ]
    return redacted("\n\n".join(parts) + "\n")


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


def _prompt(source: RunSource) -> str:
    contract, tokenizer = source.contract, source.renderer.tokenizer
    stops = ", ".join(f"`{tokenizer.decode([token])}` ({token})" for token in contract.stop_ids) or "none"
    rows = [
        ["template", contract.template],
        [
            "system prompt",
            json.dumps(redact(contract.system), ensure_ascii=False) if contract.system else "none",
        ],
        ["begins with", f"`{contract.bos}`" if contract.add_bos else "no BOS"],
        ["ends an answer", stops],
        ["trained on", "the answers" if contract.train_on == "response" else "the whole text"],
        ["longest row", f"{contract.max_length:,} tokens"],
        ["contract", f"`prompt.json`, SHA-256 {contract.hash[:16]}"],
    ]
    return _table(["", ""], rows)


def _data(source: RunSource) -> str:
    paths = ", ".join(f"`{nameless(path)}`" for path in source.config.data.path)
    ledger = Ledger.from_json(source.run.read_json(source.run.ledger_file))
    return f"{paths}\n\n```text\n" + "\n".join(ledger.lines()) + "\n```"


def _recipe(source: RunSource) -> str:
    config = source.config.model_dump(mode="json")
    kept = {
        section: {key: _nameless(value) for key, value in config[section].items() if value is not None}
        for section in ("model", "lora", "data", "train")
    }
    text = yaml.safe_dump(without_secrets(kept), sort_keys=False, allow_unicode=True, width=100)
    command = str(source.run.read_json(source.run.env_file).get("command", ""))
    try:
        command = shlex.join(map(nameless, without_secrets(shlex.split(command))))
    except ValueError:  # no line of a shell: it is left out
        command = ""
    block = f"```bash\n{command}\n```\n\n" if command else ""
    return f"{block}Every key, as the run resolved it:\n\n```yaml\n{text}```"


def _nameless(value: Any) -> Any:
    if isinstance(value, str):
        return nameless(value)
    return [_nameless(item) for item in value] if isinstance(value, list) else value


def _results(source: RunSource) -> str:
    events = read_metrics(source.run.metrics_file) if source.run.metrics_file.is_file() else []
    steps, heldout = (
        [event for event in events if event.get("event") == kind] for kind in ("step", "heldout")
    )
    losses, held = ({int(step): loss for step, loss in series(group, "loss")} for group in (steps, heldout))
    base = series(heldout, "base_loss")
    lines = []
    if held:
        before = f" (base {base[-1][1]:.4f})" if base else ""
        best = min(held.values())
        lines.append(
            f"Lowest loss on held-out rows: {best:.4f}{before}. The adapter is from step {source.step}."
        )
    if losses:
        every, values = max(1, -(-len(losses) // 60)), [*losses.values()]
        means = [fmean(values[start : start + every]) for start in range(0, len(values), every)]
        lines.append(f"Training loss, each bar the mean of {every} steps:\n\n`{_curve(means)}`")
        some_steps = sorted({*_thinned([*losses]), *_thinned([*held])})
        rows = [[str(step), _number(losses.get(step)), _number(held.get(step))] for step in some_steps]
        lines.append(_table(["step", "loss", "held-out loss"], rows))
    return "\n\n".join(lines) or "Nothing was measured."


def _parity(parity: Mapping[str, Any]) -> str:
    if not parity["verified"]:
        return f"Not verified: {parity['why']}."
    return (
        f"Read back in a fresh process by {parity['program']} and compared with the adapter as it was trained, on "
        f"{parity['prompts']} prompts: same text, same token ids, same ends; {parity['same_greedy_answers']} of "
        f"{parity['prompts']} greedy answers equal to the token; logits within "
        f"{parity['largest_logit_difference']:.2g} (bound {parity['bound']:.2g}; they span "
        f"{parity['logit_spread']:.3g}). `parity.json` has the numbers."
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [headers, ["---"] * len(headers), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _curve(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def _thinned(steps: Sequence[int]) -> list[int]:
    every = max(1, -(-len(steps) // MOST_ROWS))
    return [*steps[::every], *steps[-1:]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

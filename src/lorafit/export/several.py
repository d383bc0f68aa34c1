"""Several adapters of one base in one folder of GGUF-LoRAs: which runs go together, and how llama.cpp picks one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import ConfigError, Problem
from lorafit.export.chat_template import chat_template
from lorafit.export.quoting import code
from lorafit.export.run_source import RunSource, open_source
from lorafit.model.weights import fingerprint
from lorafit.redact import shell

KIND = "gguf-lora"
_USAGE = """```bash
llama-server -m BASE.gguf {loras} --lora-init-without-apply --jinja
```

`BASE.gguf` is {base} in GGUF. A request names one adapter by its number, `"lora": [{{"id": 0, "scale": 1}}]`:

{numbers}"""


def open_others(
    source: RunSource, kind: str, others: Sequence[str | Path], *, offline: bool = False
) -> list[RunSource]:
    """The runs whose adapters go into the folder of `source`. Raises ConfigError naming all that do not fit."""
    if others and kind != KIND:
        message = f"a {kind} export has one adapter"
        raise ConfigError(message, place="--with", hint=f"lorafit export RUN {KIND} --with RUN2")
    found: list[RunSource] = []
    problems = []
    for path in others:
        other = open_source(path, offline=offline)
        for fault, hint in _faults([source, *found], other):
            problems.append(Problem(fault, str(path), hint))
        found.append(other)
    if problems:
        raise ConfigError.of(problems)
    return found


def _faults(before: Sequence[RunSource], other: RunSource) -> list[tuple[str, str]]:
    """Why an adapter cannot be in one folder with those before it, and what to do."""
    first, faults = before[0], []
    if any(one.name.lower() == other.name.lower() for one in before):
        faults.append((f"another run is named `{other.name}` too", "rename the folder of one run"))
    if fingerprint(first.base.path) != fingerprint(other.base.path):
        message = f"it was trained on another base than `{first.name}`: {other.base_name}"
        faults.append((message, "export it alone"))
    elif _asks(first) != _asks(other):
        message = f"it was trained with another template, system prompt or end than `{first.name}`"
        faults.append((message, "export it alone: one server has one template"))
    return faults


def _asks(source: RunSource) -> tuple[str, frozenset[int]]:
    return chat_template(source.renderer), frozenset(source.contract.stop_ids)


def usage(source: RunSource, others: Sequence[RunSource]) -> str:
    """How llama.cpp loads all of them and uses one, as Markdown."""
    names = [f"{one.name}-lora.gguf" for one in (source, *others)]
    return _USAGE.format(
        loras=" ".join(f"--lora {shell(name)}" for name in names),
        base=code(source.base_name),
        numbers="\n".join(f"- {number}: {code(name)}" for number, name in enumerate(names)),
    )

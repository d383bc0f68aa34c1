"""One base model with several adapters, each served by a name and with the prompt contract of its training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.data.prompt import Renderer
from lorafit.errors import ConfigError, ModelError, Problem
from lorafit.hub.client import adapter_folder
from lorafit.infer.model import ModelSource, find_source
from lorafit.model.build import build_saved
from lorafit.model.device import pick_device
from lorafit.model.llama import Llama
from lorafit.model.multi_lora import Adapters
from lorafit.model.quant import Quantize
from lorafit.model.saved_adapter import read_adapter
from lorafit.observe.progress import progress

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """An adapter on the base, or the base itself (`adapter` None), and its prompt contract."""

    name: str
    adapter: str | None
    renderer: Renderer


@dataclass(frozen=True, slots=True)
class Models:
    """The network with all its adapters, and the served models by name."""

    network: Llama
    adapters: Adapters
    named: dict[str, ServedModel]


def load_many(
    words: Sequence[str],
    *,
    device: str = "auto",
    offline: bool = False,
    quantize: Quantize | None = None,
    other_base: bool = False,
) -> Models:
    """Load runs, PEFT adapter folders or a model, each given as `SOURCE` or `NAME=SOURCE`.

    All must have the base model of the first (unless `other_base`), which also decides type and quantization. The base
    is served too, by its own name and chat template, unless an adapter changes more than linears of layers. Raises
    ConfigError with all words that cannot be served together with the first.
    """
    pick_device(device)  # before anything is downloaded
    sources: dict[str, ModelSource] = {}
    problems: list[Problem] = []
    for index, word in enumerate(words):
        match = None if Path(word).expanduser().exists() else _NAMED.fullmatch(word)
        name, path = match.groups() if match else ("", word)
        if index and not Path(path).expanduser().exists():
            path = str(adapter_folder(path, offline=offline).path)
        source = find_source(path, offline=offline, quantize=quantize)
        name = name or _default_name(path, source)
        if name in sources:
            problems.append(Problem(f"two models have the name `{name}`", hint=f"rename one: NAME={path}"))
        sources[name] = source
    if problems:
        raise ConfigError.of(problems)
    first = next(iter(sources.values()))
    base = first.base_folder()
    for name, source in sources.items():
        if source.adapter is None and source is not first:
            problems.append(Problem(f"`{name}` is a base model", hint="serve one base, and adapters on it"))
        try:
            source.check_base(base, first.base, other_base)
        except ModelError as error:
            problems += error.problems
    if problems:
        raise ConfigError.of(problems)
    named = {
        name: ServedModel(name, name if source.adapter else None, source.renderer(base))
        for name, source in sources.items()
    }
    folders = {name: source.adapter for name, source in sources.items() if source.adapter}
    if first.adapter is not None and not any(read_adapter(folder).tables for folder in folders.values()):
        folder = Path(first.base).expanduser()
        name = folder.resolve().name if folder.exists() else first.base
        alone = dataclasses.replace(first, adapter=None, prompt=None)
        named.setdefault(name, ServedModel(name, None, alone.renderer(base)))
    with progress("loading the model") as advance:
        network, _ = build_saved(base, None, device, first.dtype, advance, first.quantize, first.offload)
        adapters = Adapters(network, folders)
    return Models(network, adapters, named)


def _default_name(path: str, source: ModelSource) -> str:
    """A run's folder name, also for its adapter; a checkpoint's with its step; else the last part or the hub id."""
    folder = Path(path).expanduser()
    if not folder.exists():
        return path
    folder = folder.resolve()
    if source.adapter is not None and folder.name == "adapter" and source.prompt is not None:
        return folder.parent.name
    if source.adapter is not None and folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


def check_context(context: int | None, network: Llama) -> int:
    """Most tokens of a prompt with its answer. Raises ConfigError for more than the model can read."""
    longest = network.arch.max_position_embeddings
    if context is None:
        return min(longest, 4096)
    if context > longest:
        raise ConfigError(f"--context {context:,} is more than the model can read, {longest:,}")
    return context

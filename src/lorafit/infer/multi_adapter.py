"""One base model and several adapters on it, loaded to be asked by name; each is asked as it was trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.data.prompt import Renderer
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ConfigError, Problem
from lorafit.hub.client import adapter_folder, model_folder
from lorafit.infer.model import ModelSource, default_contract, find_source
from lorafit.model.build import build_saved
from lorafit.model.llama import Llama
from lorafit.model.multi_lora import Adapters
from lorafit.model.quant import Quantize
from lorafit.observe.progress import progress

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What one name stands for: an adapter on the base (None is the base itself), and how it is asked."""

    name: str
    adapter: str | None
    renderer: Renderer


@dataclass(frozen=True, slots=True)
class Models:
    """The network with all its adapters, and the names that can be asked."""

    network: Llama
    adapters: Adapters
    named: dict[str, ServedModel]


def load_many(
    words: Sequence[str],
    *,
    device: str = "auto",
    offline: bool = False,
    quantize: Quantize | None = None,
) -> Models:
    """What `words` ask for, each a run, a PEFT adapter folder or a model, as `SOURCE` or `NAME=SOURCE`.

    All must be on the base model of the first, which also says how the base is held. The base can be asked too, by its
    own name and chat template. Raises ConfigError with every word that cannot be served beside the first.
    """
    sources: dict[str, ModelSource] = {}
    problems: list[Problem] = []
    for at, word in enumerate(words):
        name, source = _name_and_source(word)
        found = _find(source, is_first=at == 0, offline=offline, quantize=quantize)
        name = name or _default_name(source, found)
        if name in sources:
            problems.append(
                Problem(f"two models would be called `{name}`", hint=f"give one another name: NAME={source}")
            )
        sources[name] = found
    if problems:
        raise ConfigError.of(problems)
    first = next(iter(sources.values()))
    base = _base_folder(first)
    for name, found in list(sources.items())[1:]:
        if found.adapter is None:
            problems.append(Problem(f"`{name}` is a base model", hint="serve one base, and adapters on it"))
        elif (other := _base_folder(found)) != base:
            problems.append(
                Problem(
                    f"`{name}` is not on the base of the others",
                    f"{other}, the first is on {base}",
                    "serve it in a process of its own",
                )
            )
    if problems:
        raise ConfigError.of(problems)
    tokenizer = Tokenizer.from_folder(base)
    own = default_contract(tokenizer)
    named = {
        name: ServedModel(name, name if found.adapter else None, Renderer(found.prompt or own, tokenizer))
        for name, found in sources.items()
    }
    if first.adapter is not None:
        name = _short(first.base)
        named.setdefault(name, ServedModel(name, None, Renderer(own, tokenizer)))
    with progress("loading the model") as advance:
        network, _ = build_saved(base, None, device, first.dtype, advance, first.quantize)
        folders = {name: found.adapter for name, found in sources.items() if found.adapter}
        adapters = Adapters(network, folders)
    return Models(network, adapters, named)


def _find(source: str, *, is_first: bool, offline: bool, quantize: Quantize | None) -> ModelSource:
    if not is_first and not Path(source).expanduser().exists():
        source = str(adapter_folder(source, offline=offline).path)
    return find_source(source, offline=offline, quantize=quantize)


def _base_folder(source: ModelSource) -> Path:
    return model_folder(source.base, revision=source.revision, offline=source.offline).path.resolve()


def _name_and_source(word: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(word)
    if match is None or Path(word).expanduser().exists():
        return "", word
    return match[1], match[2]


def _default_name(source: str, found: ModelSource) -> str:
    """A run's folder name, also for its adapter; a checkpoint's with its step; else the last part or the hub id."""
    folder = Path(source).expanduser()
    if not folder.exists():
        return source
    folder = folder.resolve()
    if found.adapter is not None and folder.name == "adapter" and found.prompt is not None:
        return folder.parent.name
    if found.adapter is not None and folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}-{folder.name}"
    return folder.name


def _short(base: str) -> str:
    """What a base model is called: the hub id, or the name of its folder."""
    folder = Path(base).expanduser()
    return folder.resolve().name if folder.exists() else base


def check_context(context: int | None, network: Llama) -> int:
    """How many tokens a prompt and its answer may have together. Raises ConfigError for more than the model reads."""
    longest = network.arch.max_position_embeddings
    if context is None:
        return min(longest, 4096)
    if context > longest:
        raise ConfigError(f"--context {context:,} is more than the model reads, {longest:,}")
    return context

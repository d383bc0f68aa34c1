"""Reads adapter folders as PEFT reads them, also those that lorafit would not train, to answer and to export.

The tensors of the file say which modules are adapted. Low-rank pairs of the layers' linears become adapted linears;
whatever else an adapter changes (the head, the embedding, norms, biases) becomes another weight in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ModelError, Problem, several
from lorafit.hub.folder_keys import ADAPTER, NOT_TRAINED, UNSET, refused, residual_init
from lorafit.model.adapter_file import CONFIG, PREFIX, WEIGHTS, fill_adapter, open_weights, refuse_faults
from lorafit.model.architecture import Architecture
from lorafit.model.llama import Llama
from lorafit.model.lora import (
    VARIANTS,
    LoraSpec,
    attach,
    change_weights,
    ends_soon,
    layer_number,
    match_targets,
    weight_of,
)
from lorafit.model.tables import TOKENS as _TOKENS
from lorafit.model.tables import grow, grown
from lorafit.model.weights import plain_name
from lorafit.storage.safe_read import MB, read_json

MAX_CONFIG = 16 * MB
HEAD = "lm_head"
_OF_PEFT = {"default", "base_layer"}  # the name of an adapter in memory, and a module below an adapted one
_PART = re.compile(rf"(.+)\.(lora_\w+|{re.escape(_TOKENS)})(\.weight)?")
_MERGE = "merge it with PEFT (merge_and_unload), and give the merged model"


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter folder. `spec` has its low-rank linears by full name. `parts` are the tensors of each adapted module,
    `whole` those that replace a weight of the base; both have names in the file as values.
    """

    path: Path
    config: Mapping[str, Any]
    spec: LoraSpec
    parts: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]

    @property
    def tables(self) -> list[str]:
        """The weights that it changes other than by an adapted linear of a layer."""
        modules = [f"{module}.weight" for module in self.parts if module not in self.spec.targets]
        return sorted({*modules, *self.whole})

    @property
    def changes(self) -> frozenset[str]:
        """The weights that it changes."""
        return frozenset([*(f"{module}.weight" for module in self.spec.targets), *self.tables])

    def vocabulary(self, arch: Architecture) -> int:
        """The rows of both tables with this adapter: those of new tokens too.

        Raises ModelError where a row is missing between those of the base and those of the adapter.
        """
        size = arch.vocab_size
        for module in (arch.embedding, HEAD):
            rows = self._rows_of(f"{module}.weight")
            is_new = rows > arch.vocab_size and _TOKENS in self.parts.get(module, {})
            if is_new and not set(self._tokens(module)).issuperset(range(arch.vocab_size, rows)):
                message = (
                    f"`trainable_token_indices` has ids beyond the {arch.vocab_size:,} embeddings of the base"
                )
                raise ModelError(message, place=str(self.path / CONFIG), hint=_MERGE)
            size = max(size, rows)
        return size

    def unties(self, arch: Architecture) -> bool:
        """Whether head and embedding, one table in the base, are two with this adapter."""
        embedding = arch.embedding
        own = {module for module in (HEAD, embedding) if f"{module}.weight" in self.tables}
        only_rows = f"{embedding}.weight" not in self.whole and set(self.parts.get(embedding, ())) == {
            _TOKENS
        }
        return arch.tie_word_embeddings and bool(own) and not (own == {embedding} and only_rows)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of an adapted module by part (`lora_A`), float32."""
        return {part: tensor.float() for part, tensor in self.stored(module).items()}

    def stored(self, module: str) -> dict[str, Tensor]:
        """The same as the file has them."""
        with open_weights(self.path) as file:
            return {part: file.get_tensor(name) for part, name in self.parts.get(module, {}).items()}

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight `name` of the base with the adapter in it, float32."""
        if _is_table(name.removesuffix(".weight")):
            weight = grown(weight, self._rows_of(name))
        if name in self.whole:
            with open_weights(self.path) as file:
                own: Tensor = file.get_tensor(self.whole[name])
            refuse_faults({name: own}, {name: list(weight.shape)}, self.path / WEIGHTS)
            weight = own
        module, _, part = name.rpartition(".")
        tensors = self.tensors(module) if part == "weight" else {}
        rows = tensors.pop(_TOKENS, None)
        is_embedding = "lora_embedding_A" in tensors
        if tensors:
            low = {key.replace("embedding_", ""): tensor for key, tensor in tensors.items()}
            weight = weight.t() if is_embedding else weight
            self._check(module, low, weight)
            weight = VARIANTS[self.spec.variant].merge(weight, low, self.spec.of(module).scale)
            weight = weight.t().contiguous() if is_embedding else weight
        if rows is not None:
            indices = torch.tensor(self._tokens(module))
            shape = [len(indices), weight.shape[1]]
            refuse_faults({f"{module}.{_TOKENS}": rows}, {f"{module}.{_TOKENS}": shape}, self.path / WEIGHTS)
            if len(indices) and int(indices.min()) < 0:
                raise ModelError("`trainable_token_indices` has a negative id", place=str(self.path / CONFIG))
            weight = weight.float().index_copy(0, indices, rows)
        return weight.float()

    def _rows_of(self, name: str) -> int:
        """The rows that a table has at least."""
        if name in self.whole:
            with open_weights(self.path) as file:
                return int(file.get_slice(self.whole[name]).get_shape()[0])
        module = name.removesuffix(".weight")
        return max(self._tokens(module), default=0) + 1 if _TOKENS in self.parts.get(module, {}) else 0

    def _check(self, module: str, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        rank = self.spec.of(module).rank
        shapes = {"lora_A": [rank, weight.shape[1]], "lora_B": [weight.shape[0], rank]}
        if "lora_magnitude_vector" in VARIANTS[self.spec.variant].parts:
            shapes["lora_magnitude_vector"] = [weight.shape[0]]
        named = {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        refuse_faults(
            named, {f"{module}.{part}": shape for part, shape in shapes.items()}, self.path / WEIGHTS
        )

    def _tokens(self, module: str) -> list[int]:
        """The ids of the embeddings that have rows of their own."""
        value = self.config.get("trainable_token_indices")
        if isinstance(value, dict):
            value = next((ids for key, ids in value.items() if _ends_in(module, key)), None)
        if not isinstance(value, list) or not all(type(index) is int for index in value):
            raise ModelError("`trainable_token_indices` is no list of ids", place=str(self.path / CONFIG))
        return value


def read_adapter(folder: Path) -> SavedAdapter:
    """The adapter in a PEFT folder. Raises ModelError naming each key that lorafit does not support."""
    path = folder / CONFIG
    try:
        raw = read_json(path, MAX_CONFIG)
        if not isinstance(raw, dict):
            raise TypeError
    except FileNotFoundError:
        hint = "give a PEFT adapter folder"
        raise ModelError(f"there is no {CONFIG}", place=str(folder), hint=hint) from None
    except (OSError, ValueError, TypeError):
        raise ModelError(f"{CONFIG} cannot be read", place=str(path)) from None
    marked = [name for name, variant in VARIANTS.items() if variant.peft_keys.items() <= raw.items()]
    variant = max(marked, key=lambda name: len(VARIANTS[name].peft_keys))
    known = dict(ADAPTER) | dict.fromkeys(VARIANTS[variant].peft_keys, "used")
    problems = refused(raw, known, str(path), _MERGE)
    if kind := residual_init(raw.get("init_lora_weights")):
        message = (
            f"`init_lora_weights` is {raw['init_lora_weights']!r}: the adapter belongs to a base from which PEFT took "
            "a part"
        )
        convert = (
            "save it as plain LoRA, in PEFT: model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion="
            "ADAPTER_BEFORE_TRAINING); or "
        )
        problems.append(Problem(message, str(path), ("" if kind == "loftq" else convert) + _MERGE))
    if raw.get("peft_type") != "LORA":
        problems.append(Problem(f"`peft_type` is {raw.get('peft_type')!r}, not LORA", str(path), _MERGE))
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout")
    if not _is_rank(rank):
        problems.append(Problem(f"`r` is {rank!r}, not a rank", str(path)))
    if not _is_alpha(alpha):
        problems.append(Problem(f"`lora_alpha` is {alpha!r}, not a positive number", str(path)))
    targets = raw.get("target_modules")
    if (
        not targets
        or not isinstance(targets, str | list)
        or not all(isinstance(item, str) for item in targets)
    ):
        problems.append(Problem("`target_modules` names no modules", str(path)))
    problems += _pattern_problems(raw, str(path))
    if problems:
        raise ModelError.of(problems)
    parts, whole = _tensors_of(folder)
    linears = tuple(sorted(m for m in parts if not _is_table(m) and _TOKENS not in parts[m]))
    spec = LoraSpec(
        rank=int(raw["r"]),
        alpha=float(raw["lora_alpha"]),
        dropout=float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0,
        targets=linears,
        rslora=bool(raw.get("use_rslora")),
        variant=variant,
        exceptions=_exceptions(raw, parts),
    )
    return SavedAdapter(folder, raw, spec, parts, whole)


def read_spec(folder: Path) -> LoraSpec:
    """The spec of an adapter to continue. Raises ModelError naming each key that lorafit does not train."""
    saved = read_adapter(folder)
    raw, targets = saved.config, saved.config["target_modules"]
    hint = "lorafit answers with such an adapter and exports it; to go on from it, train on its merged export"
    problems = [
        Problem(f"`{key}` is {repr(raw[key])[:60]}, which lorafit does not train", str(folder / CONFIG), hint)
        for key in NOT_TRAINED
        if raw.get(key) not in (*UNSET, "none")
    ]
    if not problems and saved.tables:
        message = f"the adapter changes {several(saved.tables)}, which lorafit does not train"
        problems.append(Problem(message, str(folder / WEIGHTS), hint))
    if problems:
        raise ModelError.of(problems)
    if targets == "all-linear":
        targets = [targets]
    are_all = not any(raw.get(key) for key in ("layers_to_transform", "exclude_modules", "layers_pattern"))
    # not by a regular expression: it may never end
    simple = are_all and isinstance(targets, list)
    return replace(saved.spec, targets=tuple(sorted(targets)) if simple else saved.spec.targets)


def put_on(network: Llama, saved: SavedAdapter) -> None:
    """Attach the adapter to `network`. Raises ModelError naming every tensor that is missing or does not fit."""
    attach_linears(network, saved)
    put_tables(network, saved)


def put_tables(network: Llama, saved: SavedAdapter) -> None:
    """Put the weights that the adapter changes as a whole into `network`. Raises as `put_on` does."""
    grow(network, saved.vocabulary(network.arch))
    new = {}
    for name in saved.tables:
        new[name] = saved.merged(name, weight_of(network, name).detach().float().cpu())
    change_weights(network, new)
    embedding = f"{network.arch.embedding}.weight"
    if network.arch.tie_word_embeddings and embedding in new and not saved.unties(network.arch):
        network.changed[f"{HEAD}.weight"] = network.changed[embedding]
        change_weights(network, {})


def attach_linears(network: Llama, saved: SavedAdapter) -> None:
    """Attach the low-rank linears alone. Raises as `put_on` does."""
    modules = dict(network.named_modules())
    parameters = {*(name for name, _ in network.named_parameters()), f"{HEAD}.weight"}
    linears = set(match_targets(network, ["all-linear"]))
    strange = [m for m in saved.parts if m not in linears and (not _is_table(m) or m not in modules)]
    if names := sorted([*strange, *(saved.whole.keys() - parameters)]):
        message = f"adapter tensor {several(names)} fits nothing in this model"
        raise ModelError(message, place=str(saved.path / WEIGHTS), hint="is it the adapter of another model?")
    if missing := _missing(network, saved):
        message = (
            f"adapter tensor {several(missing)} is missing, which `target_modules` or `modules_to_save` names"
        )
        raise ModelError(
            message, place=str(saved.path / WEIGHTS), hint="the file is not complete: save it again"
        )
    attach(network, saved.spec, seed=0)
    stored = {
        f"{PREFIX}{module}.{part}.weight": tensor
        for module in saved.spec.targets
        for part, tensor in saved.stored(module).items()
    }
    fill_adapter(network, stored, saved.path / WEIGHTS)


def _tensors_of(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The tensors of the file: of each module by part, and those that replace a weight; without foreign prefixes."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    with open_weights(folder) as file:
        names: Sequence[str] = list(file.keys())
    for name in names:
        plain = ".".join(word for word in plain_name(name).split(".") if word not in _OF_PEFT)
        while plain.startswith(PREFIX):
            plain = plain.removeprefix(PREFIX)
        match = _PART.fullmatch(plain)
        group, key = (parts.setdefault(match[1], {}), match[2]) if match else (whole, plain)
        if key in group:
            raise ModelError(f"`{group[key]}` and `{name}` are the same tensor", place=str(folder / WEIGHTS))
        group[key] = name
    return parts, whole


def _pattern_problems(raw: Mapping[str, Any], place: str) -> list[Problem]:
    problems = []
    checks: dict[str, Callable[[object], bool]] = {"rank_pattern": _is_rank, "alpha_pattern": _is_alpha}
    for key, is_valid in checks.items():
        pattern = raw.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
            problems.append(Problem(f"`{key}` is {str(pattern)[:60]}, not a number by module", place))
        elif slow := [name for name in pattern if not _is_pattern(name)]:
            message = f"`{key}` has {slow[0][:60]!r}, a regular expression that is not valid or may never end"
            problems.append(Problem(message, place))
    return problems


def _exceptions(raw: Mapping[str, Any], modules: Mapping[str, object]) -> dict[str, tuple[int, float]]:
    """The rank and alpha of each module with its own, as PEFT finds them: the first pattern that ends its name."""
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    tables = [
        [(re.compile(rf"(.*\.)?({key})"), value) for key, value in table.items()] for table in (ranks, alphas)
    ]
    found = {}
    for module in modules:
        rank, alpha = (
            next((value for pattern, value in table if pattern.fullmatch(module)), None) for table in tables
        )
        if rank is not None or alpha is not None:
            found[module] = (rank or raw["r"], float(alpha or raw["lora_alpha"]))
    return found


def _missing(network: Llama, saved: SavedAdapter) -> list[str]:
    """The modules that the config names and the file does not have; none where only an expression could say it."""
    raw = saved.config
    saves = raw.get("modules_to_save") or []
    present = {*saved.whole, *(f"{module}.weight" for module in saved.parts)}
    lost = [word for word in saves if not any(_ends_in(name.rpartition(".")[0], word) for name in present)]
    targets, excluded, layers = (
        raw.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    targets = [targets] if targets == "all-linear" else targets
    if not isinstance(targets, list) or isinstance(excluded, str) or raw.get("layers_pattern"):
        return lost
    names = [name for name in targets if not _is_table(name)]
    layers = [layers] if isinstance(layers, int) else layers
    for name in match_targets(network, names):
        number = layer_number(name)
        if (layers and number not in layers) or any(_ends_in(name, word) for word in excluded or []):
            continue
        if name not in saved.parts and not any(_ends_in(name, word) for word in saves):
            lost.append(name)
    return lost


def _is_table(module: str) -> bool:
    return module.rpartition(".")[2] in (HEAD, "embed_tokens")


def _ends_in(module: str, word: str) -> bool:
    return module == word or module.endswith(f".{word}")


def _is_pattern(name: object) -> bool:
    try:
        return isinstance(name, str) and bool(re.compile(name)) and ends_soon(name)
    except (re.error, RecursionError, OverflowError):
        return False


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= 4096


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9  # type: ignore[operator]

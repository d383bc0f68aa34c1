"""LoRA: a frozen linear plus a low-rank path with two float32 matrices (Hu et al., 2021), and the door for variants."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import ConfigError, Problem
from lorafit.model.linear import Frozen, replace_module
from lorafit.model.llama import Llama
from lorafit.model.lora_linear import Identity, project
from lorafit.model.lora_start import of_columns, of_singular_values
from lorafit.model.tables import detach_tables, stored_tables, table_rows


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """An adapter without its weights."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # as in the config: names, full names, `all-linear` or `re:...`
    rslora: bool
    variant: str = "lora"  # a name of VARIANTS
    exceptions: Mapping[str, tuple[int, float]] = field(
        default_factory=dict
    )  # full name: its own rank and alpha
    tokens: tuple[int, ...] = ()  # ids whose rows of embedding and head are trained
    ranks: Mapping[str, int] = field(
        default_factory=dict
    )  # as in the config; `attach` makes exceptions of both
    alphas: Mapping[str, float] = field(default_factory=dict)
    layers: int | None = None  # how many of the upper layers `attach` adapts; None for all

    def of(self, module: str) -> LoraSpec:
        """The spec of one module, by its full name."""
        if module not in self.exceptions:
            return self
        rank, alpha = self.exceptions[module]
        return replace(self, rank=rank, alpha=alpha, exceptions={})

    def saved(self) -> LoraSpec:
        """The spec of the folder: some variants are plain LoRA of another rank there."""
        if not VARIANTS[self.variant].is_doubled:
            return self
        factor = math.sqrt(2) if self.rslora else 2  # the scale stays
        doubled = {name: (2 * rank, factor * alpha) for name, (rank, alpha) in self.exceptions.items()}
        return replace(
            self, variant="lora", rank=2 * self.rank, alpha=factor * self.alpha, exceptions=doubled
        )

    @property
    def scale(self) -> float:
        """The factor of the low-rank path: alpha / r, or alpha / sqrt(r) (Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """base(x) + scale * B A dropout(x), with A and B cast to the type of x for the products.

    A (rank, in_features) starts uniform, B (out_features, rank) at zero, so that training starts at the base.
    model/lora_linear.py makes the products, together with those of linears that have the same input.

    A variant is a subclass with `is_plain` False and an entry of VARIANTS. It adds parameters in `__init__`, names
    them in `parts`, and overrides `added`, `delta` and `merge`; `peft_keys` mark it in adapter_config.json. One whose
    file has other tensors overrides `stored` and `fill` too.
    """

    is_plain: ClassVar = True  # whether the hand-written passes and kernels of plain LoRA compute it
    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")  # trained parameters; stored as `PART.weight`
    peft_keys: ClassVar[Mapping[str, object]] = {}  # beside those of plain LoRA
    is_doubled: ClassVar = False  # whether its file is that of plain LoRA with twice the rank
    kept: ClassVar = (0, 0)  # inputs and outputs that autograd keeps per token, beside those of plain LoRA

    def __init__(self, base: Frozen, spec: LoraSpec, generator: torch.Generator, like: Tensor) -> None:
        super().__init__()
        self.base = base
        self.scale = spec.scale
        self.dropout = spec.dropout
        parameter = torch.promote_types(like.dtype, torch.float32)
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(spec.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(like.device, parameter))
        self.lora_B = nn.Parameter(
            torch.zeros(base.out_features, spec.rank, device=like.device, dtype=parameter)
        )
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        rows = x.reshape(-1, x.shape[-1])
        return project((self,), Identity(), rows)[0].view(*x.shape[:-1], -1)

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """What the adapter adds to the base's output `out` (tokens, out_features), differentiable.

        x (tokens, in_features) is the input after dropout.
        """
        return F.linear(x, self.lora_A.to(x.dtype)).mul_(self.scale) @ self.lora_B.t().to(x.dtype)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the file by part."""
        return {part: getattr(self, part).detach() for part in self.parts}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file."""
        for part in self.parts:
            getattr(self, part).copy_(tensors[part])

    def delta(self) -> Tensor:
        """What the adapter adds to the base's weight, float32 (out_features, in_features)."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    @staticmethod
    def merge(weight: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
        """A base weight with the adapter merged, float32; `tensors` are the stored parts, float32."""
        return torch.addmm(weight.float(), tensors["lora_B"], tensors["lora_A"], alpha=scale)


class DoraLinear(LoraLinear):
    """DoRA (Liu et al., 2024): each row of the adapted weight has a learned length, as PEFT computes it."""

    is_plain: ClassVar = False
    parts: ClassVar = (*LoraLinear.parts, "lora_magnitude_vector")
    peft_keys: ClassVar = {"use_dora": True}
    kept: ClassVar = (1, 2)

    def __init__(self, base: Frozen, spec: LoraSpec, generator: torch.Generator, like: Tensor) -> None:
        super().__init__(base, spec, generator, like)
        self.lora_magnitude_vector = nn.Parameter(base.dequantize().to(self.lora_A.dtype).norm(dim=1))
        self._lengths: Tensor | None = None  # of the rows; while nothing is trained they are computed once

    def train(self, mode: bool = True) -> Self:
        self._lengths = None
        return super().train(mode)

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        if self.training and self.dropout:  # PEFT scales the product of the dropped input
            (out,) = project((self.base,), Identity(), x)
        product = out if self.base.bias is None else out - self.base.bias
        factor = (self.lora_magnitude_vector / self._row_lengths()).to(x.dtype)
        return (factor - 1) * product + factor * super().added(x, out)

    @torch.no_grad()
    def _row_lengths(self) -> Tensor:
        """The lengths of the rows of W + scale * B A; they count as constants (section 4.3 of the paper)."""
        if self._lengths is None or self.training:
            weight = self.base.dequantize().to(self.lora_A.dtype)
            self._lengths = torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale).norm(dim=1)
        return self._lengths

    def delta(self) -> Tensor:
        weight = self.base.dequantize()
        return (
            self.merge(weight, {part: getattr(self, part).float() for part in self.parts}, self.scale)
            - weight
        )

    @staticmethod
    def merge(weight: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
        whole = LoraLinear.merge(weight, tensors, scale)
        factor: Tensor = tensors["lora_magnitude_vector"] / whole.norm(dim=1)
        return whole * factor[:, None]


class PissaLinear(LoraLinear):
    """PiSSA (Meng et al., 2024): A and B start at the largest singular values of the base's weight W.

    PEFT trains W - scale * B0 A0 + scale * B A. Here W stays as it is and the start B0 A0 is subtracted, so a quantised
    base works too. The file is plain LoRA of twice the rank, [B, -B0] [A; A0], as PEFT converts it.
    """

    is_plain: ClassVar = False
    is_doubled: ClassVar = True
    kept: ClassVar = (1, 0)
    start: ClassVar = staticmethod(of_singular_values)
    first_a: Tensor
    first_b: Tensor

    def __init__(self, base: Frozen, spec: LoraSpec, generator: torch.Generator, like: Tensor) -> None:
        super().__init__(base, spec, generator, like)
        a, b = (part.to(self.lora_A) for part in self.start(base.dequantize(), spec.rank, spec.scale))
        self.register_buffer("first_a", a, persistent=False)
        self.register_buffer("first_b", b, persistent=False)
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def _pair(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.lora_A, self.first_a]), torch.cat([self.lora_B, -self.first_b], dim=1)

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        a, b = self._pair()
        return F.linear(x, a.to(x.dtype)).mul_(self.scale) @ b.t().to(x.dtype)

    def stored(self) -> dict[str, Tensor]:
        return dict(zip(self.parts, map(Tensor.detach, self._pair()), strict=True))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        rank = len(self.lora_A)
        for own, start, stored, sign in (
            (self.lora_A, self.first_a, tensors["lora_A"], 1),
            (self.lora_B.t(), self.first_b.t(), tensors["lora_B"].t(), -1),
        ):
            own.copy_(stored[:rank])
            start.copy_(sign * stored[rank:])

    def delta(self) -> Tensor:
        a, b = self._pair()
        return self.scale * (b.float() @ a.float())


class OloraLinear(PissaLinear):
    """OLoRA (Büyükakyüz, 2024): the same with the first columns of a QR decomposition."""

    start: ClassVar = staticmethod(of_columns)


VARIANTS: dict[str, type[LoraLinear]] = {
    "lora": LoraLinear,
    "dora": DoraLinear,
    "pissa": PissaLinear,
    "olora": OloraLinear,
}


def attach(network: Llama, spec: LoraSpec, seed: int) -> LoraSpec:
    """Freeze `network` and replace every target by an adapted linear.

    Returns the spec with its targets resolved to names that PEFT reads in the same way: `q_proj` if every layer's is
    adapted, full names if only some are. Raises ConfigError naming every target that matches nothing.
    """
    network.requires_grad_(False)
    names = upper(network, match_targets(network, spec.targets), spec.layers)
    spec = with_exceptions(network, spec, names)
    # with a short name PEFT would adapt linears of the other towers too
    targets = tuple(names) if network.arch.is_wrapped else _shortest(names, _linears(network))
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        base = network.get_submodule(name)
        assert isinstance(base, Frozen)
        if network.streamed is not None and not VARIANTS[spec.variant].is_plain:  # it reads the base
            network.streamed.load(layer_number(name), layer_number(name) + 1)
        linear = VARIANTS[spec.variant](base, spec.of(name), generator, like=network.lm_head.weight)
        replace_module(network, name, linear)
    return replace(spec, targets=targets)


def with_exceptions(network: nn.Module, spec: LoraSpec, names: Sequence[str]) -> LoraSpec:
    """The spec with `ranks` and `alphas` by full names; the first name that matches counts, as in PEFT.

    Raises ConfigError for a name that matches none of the targets `names`.
    """
    found: list[dict[str, float]] = []
    for key, values in (("lora.ranks", spec.ranks), ("lora.alphas", spec.alphas)):
        own: dict[str, float] = {}
        for target, value in values.items():
            matches = set(match_targets(network, [target], key)) & set(names)
            if not matches:
                hint = "give values of modules that lora.targets names"
                raise ConfigError(f"`{target}` is not adapted", place=key, hint=hint)
            own = dict.fromkeys(matches, value) | own
        found.append(own)
    ranks, alphas = found
    own_values = {
        name: (int(ranks.get(name, spec.rank)), alphas.get(name, spec.alpha))
        for name in names
        if name in ranks or name in alphas
    }
    return replace(spec, exceptions={**spec.exceptions, **own_values}, ranks={}, alphas={})


def weight_of(network: nn.Module, name: str) -> nn.Parameter:
    """The parameter of the base by its full name, whether its module is adapted or not."""
    module, part = _owner(network, name)
    parameter: nn.Parameter = getattr(module, part)
    return parameter


def change_weights(network: Llama, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` in the place of parameters, as a part of the adapter; `disable_adapter` undoes it for a while."""
    for name, weight in weights.items():
        old = weight_of(network, name)
        new = nn.Parameter(weight.to(old.device, old.dtype), requires_grad=False)
        network.changed[name] = (old, new)
    _put(network, adapter=True)


def _put(network: nn.Module, *, adapter: bool) -> None:
    """Set the weights that an adapter changes to its own ones or to those of the base."""
    for name, (old, new) in getattr(network, "changed", {}).items():
        module, part = _owner(network, name)
        setattr(module, part, new if adapter else old)
    for table in table_rows(network).values():
        table.enabled = adapter


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    name, _, part = name.rpartition(".")
    module = network.get_submodule(name)
    return getattr(module, "base", module), part


def detach(network: nn.Module) -> None:
    """Undo `attach` and `attach_tables`: replace every adapted linear by its base."""
    for name, module in adapted(network).items():
        replace_module(network, name, module.base)
    if isinstance(network, Llama):
        detach_tables(network)


def layer_number(name: str) -> int:
    """The layer of a linear, by its full name."""
    return int(name.partition("layers.")[2].partition(".")[0])


def first_adapted(network: Llama) -> int:
    """The first layer with a trained parameter: what the layers below it compute never changes. 0 where a parameter
    belongs to no layer.
    """
    if network.changed:
        return 0
    return min(layer_number(name) if "layers." in name else 0 for name in adapter_parameters(network))


def upper(network: Llama, names: Sequence[str], layers: int | None) -> list[str]:
    """The linears `names` of the `layers` upper layers. Raises ConfigError where there are none."""
    if layers is None:
        return list(names)
    there = len(network.decoder.layers)
    chosen = [name for name in names if layer_number(name) >= there - layers]
    if layers > there or not chosen:
        what = f"the model has {there}" if layers > there else "none of `lora.targets` is in them"
        raise ConfigError(f"`lora.layers` is {layers}, and {what}", hint="leave it out for all layers")
    return chosen


def match_targets(network: nn.Module, targets: Sequence[str], key: str = "lora.targets") -> list[str]:
    """Full names of the linears that `targets` select, in the network's order. Raises ConfigError."""
    linears = _linears(network)
    short = sorted({name.rpartition(".")[2] for name in linears})
    chosen: set[str] = set()
    problems = []
    for target in targets:
        if target == "all-linear":
            matches = set(linears)
        elif target.startswith("re:"):
            try:
                pattern = re.compile(target[3:])
                if not ends_soon(target[3:]):
                    raise re.error("it may never end; repeat single characters only, three times at most")
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(Problem(f"`{target}` is not a regular expression: {error}", key))
                continue
            matches = {name for name in linears if pattern.fullmatch(name)}
        else:
            matches = {name for name in linears if name == target or name.endswith("." + target)}
        if not matches:
            is_table = target.rpartition(".")[2] in ("lm_head", "embed_tokens")
            what = "is not adapted by lorafit" if is_table else "matches no linear of this model"
            hint = f"linears: {', '.join(short)}, or all-linear"
            problems.append(Problem(f"target `{target}` {what}", key, hint))
        chosen |= matches
    if problems:
        raise ConfigError.of(problems)
    return [name for name in linears if name in chosen]


def adapted(network: nn.Module) -> dict[str, LoraLinear]:
    """The adapted linears of a network by full name, in order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLinear)}


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by full name (`model.layers.0.mlp.up_proj.lora_A`), in order."""
    linears = {
        f"{name}.{part}": getattr(module, part)
        for name, module in adapted(network).items()
        for part in module.parts
    }
    seen = {id(parameter): name for name, parameter in reversed(stored_tables(network).items())}
    return linears | {name: rows for name, rows in stored_tables(network).items() if seen[id(rows)] == name}


@contextmanager
def disable_adapter(network: nn.Module, *, when: bool = True) -> Iterator[None]:
    """Inside the block the network computes exactly what the base does; if `when` is False nothing changes."""
    layers = adapted(network).values() if when else ()
    for layer in layers:
        layer.enabled = False
    if when:
        _put(network, adapter=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        if when:
            _put(network, adapter=True)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block, and the earlier mode after it."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def ends_soon(pattern: str) -> bool:
    """Whether a regular expression has few ways through a name: backtracking comes from repetitions, of groups above
    all, and from alternatives.
    """
    bare = re.sub(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*\]|\(\?", "x", pattern)  # no escapes, sets, `(?:`
    return (
        not re.search(r"\)[*+?{]", bare) and len(re.findall(r"[*+?{]", bare)) <= 3 and bare.count("|") <= 100
    )


def _linears(network: nn.Module) -> list[str]:
    """Full names of the linears that can be adapted, in the network's order: all but the head."""
    return [name for name, module in network.named_modules() if isinstance(module, Frozen)]


def _shortest(names: Sequence[str], linears: Sequence[str]) -> tuple[str, ...]:
    """The last part of a name if every linear with that last part is among `names`, else the full names."""
    last = [name.rpartition(".")[2] for name in names]
    all_last = [name.rpartition(".")[2] for name in linears]
    pairs = zip(last, names, strict=True)
    return tuple(
        sorted({short if last.count(short) == all_last.count(short) else full for short, full in pairs})
    )

"""LoRA: a frozen linear plus a low-rank path whose two matrices are float32 masters (Hu et al., 2021)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError, Problem
from lorafit.model.linear import Frozen
from lorafit.model.llama import Llama
from lorafit.model.lora_linear import Identity, project


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What an adapter is, apart from its numbers."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # as asked for: names, full names, `all-linear` or `re:...`
    rslora: bool

    @property
    def scale(self) -> float:
        """What the low-rank path is multiplied by: alpha / r, or alpha / sqrt(r) (Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """base(x) + scale * B A dropout(x), with A and B cast to the type of x for the products.

    A (rank, in_features) starts uniform, B (out_features, rank) at zero, so that training starts at the base.
    The products are made by model/lora_linear.py, together with those of linears that share the input.
    """

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


def attach(network: Llama, spec: LoraSpec, seed: int) -> LoraSpec:
    """Freeze `network` and put a LoraLinear in place of every target.

    Returns the spec with its targets resolved to what PEFT reads the same way: `q_proj` where every layer's is
    adapted, full names where only some are. Raises ConfigError naming every target that matches nothing.
    """
    network.requires_grad_(False)
    names = match_targets(network, spec.targets)
    targets = _shortest(names, _linears(network))
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        parent, _, child = name.rpartition(".")
        base = network.get_submodule(name)
        assert isinstance(base, Frozen)
        adapted_linear = LoraLinear(base, spec, generator, like=network.lm_head.weight)
        setattr(network.get_submodule(parent), child, adapted_linear)
    return replace(spec, targets=targets)


def detach(network: nn.Module) -> None:
    """Undo `attach`: every target is its frozen base again, and the next adapter can be attached."""
    for name, module in adapted(network).items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module.base)


def match_targets(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the linears that `targets` ask for, in the network's order. Raises ConfigError."""
    linears = _linears(network)
    short = sorted({name.rpartition(".")[2] for name in linears})
    chosen: set[str] = set()
    problems = []
    for target in targets:
        if target == "all-linear":
            found = set(linears)
        elif target.startswith("re:"):
            try:
                pattern = re.compile(target[3:])
                if not _ends_soon(target[3:]):
                    raise re.error("it may take forever; repeat single characters only, three times at most")
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(Problem(f"`{target}` is not a regular expression: {error}", "lora.targets"))
                continue
            found = {name for name in linears if pattern.fullmatch(name)}
        else:
            found = {name for name in linears if name == target or name.endswith("." + target)}
        if not found:
            what = (
                "is not adapted by lorafit"
                if target.rpartition(".")[2] in ("lm_head", "embed_tokens")
                else "matches no linear of this model"
            )
            problems.append(
                Problem(
                    f"target `{target}` {what}", "lora.targets", f"linears: {', '.join(short)}, or all-linear"
                )
            )
        chosen |= found
    if problems:
        raise ConfigError.of(problems)
    return [name for name in linears if name in chosen]


def adapted(network: nn.Module) -> dict[str, LoraLinear]:
    """The adapted linears of a network by full name, in order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def disable_adapter(network: nn.Module, *, when: bool = True) -> Iterator[None]:
    """Inside the block the network is the base model, to the bit; with `when` False nothing changes."""
    layers = adapted(network).values() if when else ()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block (no dropout), the mode of before after it."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def _ends_soon(pattern: str) -> bool:
    """Whether a regular expression cannot try more ways through a name than there is time for: backtracking comes from
    repetitions, of groups above all, and from alternatives.
    """
    bare = re.sub(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*\]|\(\?", "x", pattern)  # no escapes, sets, `(?:`
    return (
        not re.search(r"\)[*+?{]", bare) and len(re.findall(r"[*+?{]", bare)) <= 3 and bare.count("|") <= 100
    )


def _linears(network: nn.Module) -> list[str]:
    """Full names of the linears that can be adapted, in the network's order: all but the head."""
    return [name for name, module in network.named_modules() if isinstance(module, Frozen)]


def _shortest(names: Sequence[str], linears: Sequence[str]) -> tuple[str, ...]:
    """The last part of a name where every linear of that last part is among `names`, else the names in full."""
    last = [name.rpartition(".")[2] for name in names]
    all_last = [name.rpartition(".")[2] for name in linears]
    return tuple(
        sorted(
            {
                short if last.count(short) == all_last.count(short) else full
                for short, full in zip(last, names, strict=True)
            }
        )
    )

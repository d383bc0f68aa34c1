"""Several adapters on one network: each row of a pass takes its own, and the base is in memory once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.model.adapter_file import load_adapter, read_spec
from lorafit.model.decode_linear import Pairs
from lorafit.model.linear import Frozen
from lorafit.model.llama import Llama
from lorafit.model.lora import adapted, attach
from lorafit.model.lora_linear import Identity, project


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """What one adapter has for one linear: A (rank, in_features), B (out_features, rank), and its scale."""

    a: Tensor
    b: Tensor
    scale: float


class MultiLoraLinear(nn.Module):
    """A frozen linear with the pairs of several adapters, of which `take` says who is used; to answer with only."""

    dropout = 0.0

    def __init__(self, base: Frozen, pairs: Mapping[str, LoraWeights]) -> None:
        super().__init__()
        self.base = base
        self.enabled = False
        self.scale = 0.0
        self.lora_A = self.lora_B = next(iter(pairs.values())).a
        self.pairs: Pairs | None = None
        self._all = dict(pairs)
        self._groups: list[tuple[Tensor, LoraWeights]] = []
        self._ranks = torch.tensor([len(pair.a) for pair in pairs.values()])
        self._a = torch.tensor([pair.a.data_ptr() for pair in pairs.values()])
        self._b = torch.tensor([pair.b.data_ptr() for pair in pairs.values()])
        self._scales = torch.tensor([pair.scale for pair in pairs.values()], dtype=torch.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that have something for this linear."""
        return tuple(self._all)

    def take_one(self, name: str | None) -> None:
        """All rows take the adapter `name`, or none."""
        pair = self._all.get(name) if name is not None else None
        self.pairs, self.enabled = None, pair is not None
        if pair is not None:
            self.lora_A, self.lora_B, self.scale = pair.a, pair.b, pair.scale

    def take_each(self, which: Tensor, groups: Sequence[tuple[Tensor, str]]) -> None:
        """Row r takes the adapter names[which[r]], none where that is -1; `groups` has the rows of each one used."""
        self.pairs = Pairs(which, self._ranks, self._a, self._b, self._scales)
        self.enabled = bool(groups)
        self._groups = [(rows, self._all[name]) for rows, name in groups]

    def add_pairs(self, y: Tensor, out: Tensor) -> None:
        """What the compiled product of a few rows does, in torch."""
        for rows, pair in self._groups:
            low = F.linear(y[rows], pair.a.to(y.dtype)).mul_(pair.scale)
            out.index_add_(0, rows, low @ pair.b.t().to(y.dtype))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        rows = x.reshape(-1, x.shape[-1])
        return project((self,), Identity(), rows)[0].view(*x.shape[:-1], -1)


class Adapters:
    """The adapters of `folders` (name to PEFT folder) on a network that had none; they may differ in everything.

    Raises ModelError where a folder cannot be read or does not fit the network, ConfigError where its targets match
    nothing. No row takes any adapter until `take` says so.
    """

    def __init__(self, network: Llama, folders: Mapping[str, Path]) -> None:
        self.names = tuple(folders)
        found: dict[str, dict[str, LoraWeights]] = {}
        for name, folder in folders.items():
            for linear, pair in _read(network, folder).items():
                found.setdefault(linear, {})[name] = pair
        self._linears = []
        for linear, pairs in found.items():
            base = network.get_submodule(linear)
            assert isinstance(base, Frozen)
            many = MultiLoraLinear(base, pairs).eval()
            _put(network, linear, many)
            self._linears.append(many)
        self._device = network.lm_head.weight.device
        self._taken: list[str | None] = []

    def take(self, names: Sequence[str | None]) -> None:
        """The adapter of each row of the following passes, None for the base; a single name is for all rows."""
        if self._taken == list(names):
            return
        self._taken = list(names)
        if len(set(names)) == 1:
            for linear in self._linears:
                linear.take_one(names[0])
            return
        rows = {
            name: torch.tensor([row for row, taken in enumerate(names) if taken == name], device=self._device)
            for name in dict.fromkeys(names)
            if name is not None
        }
        whiches: dict[tuple[str, ...], Tensor] = {}
        for linear in self._linears:
            has = linear.names
            if has not in whiches:
                whiches[has] = torch.tensor([has.index(name) if name in has else -1 for name in names])
            linear.take_each(whiches[has], [(rows[name], name) for name in has if name in rows])


def _read(network: Llama, folder: Path) -> dict[str, LoraWeights]:
    """What the adapter in `folder` has for each linear of `network`, which stays as it was."""
    attach(network, read_spec(folder), seed=0)
    modules = adapted(network)
    try:
        load_adapter(network, folder)
    finally:
        for name, module in modules.items():
            _put(network, name, module.base)
    return {
        name: LoraWeights(module.lora_A.detach(), module.lora_B.detach(), module.scale)
        for name, module in modules.items()
    }


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)

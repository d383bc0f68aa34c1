"""Several adapters on one network: each row of a pass has its own, and the base is in memory once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafit.errors import ModelError, Problem, several
from lorafit.model.decode_linear import Pairs
from lorafit.model.linear import Frozen, replace_module
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraLinear, adapted, detach
from lorafit.model.lora_linear import Identity, project
from lorafit.model.saved_adapter import SavedAdapter, attach_linears, put_tables, read_adapter


class MultiLoraLinear(nn.Module):
    """A frozen linear with several adapters; `take_one` and `take_each` select those in use. For inference only."""

    dropout = 0.0

    def __init__(self, base: Frozen, adapters: Mapping[str, LoraLinear]) -> None:
        super().__init__()
        self.base = base
        self.is_plain = all(adapter.is_plain for adapter in adapters.values())
        self.enabled = False
        self.pairs: Pairs | None = None
        self._adapters = dict(adapters)  # no submodules: the network has no adapter of its own
        self._groups: list[tuple[Tensor | slice, LoraLinear]] = []
        modules = list(adapters.values())
        self._use(modules[0])
        self._ranks = torch.tensor([len(module.lora_A) for module in modules])
        self._a = torch.tensor([module.lora_A.data_ptr() for module in modules])
        self._b = torch.tensor([module.lora_B.data_ptr() for module in modules])
        self._scales = torch.tensor([module.scale for module in modules], dtype=torch.float32)

    def _use(self, adapter: LoraLinear) -> None:
        self.lora_A, self.lora_B, self.scale = adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scale

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that change this linear."""
        return tuple(self._adapters)

    def take_one(self, name: str | None) -> None:
        """All rows have the adapter `name`, or none."""
        adapter = self._adapters.get(name) if name is not None else None
        self.pairs, self.enabled, self._groups = None, adapter is not None, []
        if adapter is not None and self.is_plain:
            self._use(adapter)
        elif adapter is not None:
            self.take_each(torch.empty(0), [(slice(None), str(name))])

    def take_each(self, which: Tensor, groups: Sequence[tuple[Tensor | slice, str]]) -> None:
        """Row r has the adapter names[which[r]], none if that is -1; `groups` has the rows of each adapter in use."""
        self.pairs = Pairs(which, self._ranks, self._a, self._b, self._scales)
        self.enabled = bool(groups)
        self._groups = [(rows, self._adapters[name]) for rows, name in groups]

    def mixed(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """The output for y (rows, in_features) plus `residual`, for any number of rows and any variant."""
        out = self.base.product(y, residual if self.is_plain else None)
        for rows, adapter in self._groups:
            part = out[rows]
            out[rows] = part + adapter.added(y[rows], part)
        return out if self.is_plain or residual is None else out.add_(residual)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        rows = x.reshape(-1, x.shape[-1])
        return project((self,), Identity(), rows)[0].view(*x.shape[:-1], -1)


class Adapters:
    """The adapters of `folders` (name to PEFT folder) on a network without one; they may differ in everything.

    An adapter that changes other weights than linears of layers is the only one, and all rows have these weights.
    Raises ModelError if a folder cannot be read or does not fit the network, ConfigError if its targets match
    nothing. No row has an adapter before the first `take`.
    """

    def __init__(self, network: Llama, folders: Mapping[str, Path]) -> None:
        self.names = tuple(folders)
        by_linear: dict[str, dict[str, LoraLinear]] = {}
        saved = {name: read_adapter(folder) for name, folder in folders.items()}
        if len(saved) > 1 and (alone := {name: one.tables for name, one in saved.items() if one.tables}):
            hint = "serve it in a process of its own"
            raise ModelError.of(
                Problem(
                    f"`{name}` changes {several(tables)}, which all adapters of a process share", hint=hint
                )
                for name, tables in alone.items()
            )
        for name, one in saved.items():
            for linear, adapter in _read(network, one).items():
                by_linear.setdefault(linear, {})[name] = adapter
            put_tables(network, one)
        self._linears = []
        for linear, adapters in by_linear.items():
            base = network.get_submodule(linear)
            assert isinstance(base, Frozen)
            module = MultiLoraLinear(base, adapters).eval()
            replace_module(network, linear, module)
            self._linears.append(module)
        self._device = network.lm_head.weight.device
        self._taken: list[str | None] = []

    def take(self, names: Sequence[str | None]) -> None:
        """Set the adapter of each row of the following passes, None for the base; a single name is for all rows."""
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
        indices: dict[tuple[str, ...], Tensor] = {}
        for linear in self._linears:
            has = linear.names
            if has not in indices:
                indices[has] = torch.tensor([has.index(name) if name in has else -1 for name in names])
            linear.take_each(indices[has], [(rows[name], name) for name in has if name in rows])


def _read(network: Llama, saved: SavedAdapter) -> dict[str, LoraLinear]:
    """The adapted linears of an adapter, each on its base; `network` itself stays as it was."""
    try:
        attach_linears(network, saved)
        modules = adapted(network)
    finally:
        detach(network)
    return {name: module.requires_grad_(False).eval() for name, module in modules.items()}

"""Frozen linears with one input and their low rank as one matrix: their product needs none of its own for B A.

For y = x W^T + s (x A^T) B^T the matrix is [[W, B], [A, 0]], with the weights of all linears one below the other and
their B on a diagonal. Its upper rows times [x, s x A^T] are the outputs, its left columns times [g, s g B] the gradient
of x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.model import gpu_ops
from lorafit.model.linear import Linear, summed

Drop = tuple[float, int]  # probability and seed: the same mask in both directions
_ALIGNED = 8  # ranks are padded to a multiple of it: rows of 16-bit numbers begin at multiples of 16 bytes


def mergeable(linears: Sequence[Any]) -> bool:
    """Whether these are linears in the network's own type, with plain adapters of one scale or without one."""
    adapted = [linear for linear in linears if hasattr(linear, "lora_A")]
    bases = (getattr(linear, "base", linear) for linear in linears)
    return (
        all(type(base) is Linear for base in bases)
        and all(linear.is_plain for linear in adapted)
        and len({(linear.scale, linear.dropout) for linear in adapted}) <= 1
    )


def low_columns(linears: Sequence[Any]) -> int:
    """Columns of the matrix beside those of the weights, for the ranks of all these linears."""
    ranks: int = sum(linear.lora_A.shape[0] for linear in linears if hasattr(linear, "lora_A"))
    return -(-ranks // _ALIGNED) * _ALIGNED


class Merged:
    """The matrix of some linears, which keep their weights as parts of it."""

    def __init__(self, linears: Sequence[Any]) -> None:
        self.linears = list(linears)
        self.bases: list[Linear] = [getattr(linear, "base", linear) for linear in linears]
        self.adapted = [linear for linear in linears if hasattr(linear, "lora_A")]
        like = self.bases[0].weight
        self.ins, self.out = self.bases[0].in_features, sum(base.out_features for base in self.bases)
        self.rank = low_columns(linears)
        self.scale: float = self.adapted[0].scale if self.adapted else 1.0
        matrix = like.new_zeros(self.out + self.rank, self.ins + self.rank)
        self.upper, self.left = matrix[: self.out], matrix[:, : self.ins]
        self.a, self.b = matrix[self.out :, : self.ins], matrix[: self.out, self.ins :]
        self.parts: list[tuple[slice, slice]] = []  # of each adapter: its outputs, its ranks
        at = low = 0
        for linear, base in zip(self.linears, self.bases, strict=True):
            outs = slice(at, at + base.out_features)
            weight = matrix[outs, : self.ins]
            weight.copy_(base.weight)
            base.weight = nn.Parameter(weight, requires_grad=False)
            if hasattr(linear, "lora_A"):
                self.parts.append((outs, slice(low, low + linear.lora_A.shape[0])))
                low = self.parts[-1][1].stop
            at = outs.stop
        self.weights = [base.weight for base in self.bases]
        self.bias = None
        if any(base.bias is not None for base in self.bases):
            biases = [like.new_zeros(b.out_features) if b.bias is None else b.bias for b in self.bases]
            self.bias = torch.cat(biases)

    def is_whole(self) -> bool:
        """Whether the linears still have these weights, and their adapters count."""
        weights = zip(self.bases, self.weights, strict=True)
        return all(base.weight is weight for base, weight in weights) and all(
            linear.enabled for linear in self.adapted
        )

    def drop(self) -> Drop | None:
        """The dropout of the input of A in one pass, by a seed of torch's generator; None if there is none."""
        if not self.adapted or not (self.adapted[0].training and self.adapted[0].dropout):
            return None
        return self.adapted[0].dropout, int(torch.randint(2**62, ()))

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The trained matrices, and their places."""
        for linear, (outs, ranks) in zip(self.adapted, self.parts, strict=True):
            yield linear.lora_A, self.a[ranks]
            yield linear.lora_B, self.b[outs, ranks]

    def room(self, tokens: int) -> Tensor:
        """Memory for inputs (tokens, ins) with their low rank beside them."""
        return self.upper.new_empty(tokens, self.ins + self.rank)

    def room_of_gradients(self, tokens: int) -> Tensor:
        """Memory for gradients of the outputs (tokens, out) with their low rank beside them."""
        return self.upper.new_empty(tokens, self.out + self.rank)

    def product(
        self, room: Tensor, drop: Drop | None, addend: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(Outputs plus `addend` (tokens, out), what `gradients` needs) of the inputs in `room`, which it fills."""
        low = self._low(room[:, : self.ins], room[:, self.ins :], drop)
        out = self._with_bias(addend, room, self.upper)
        return out, None if low is None else low.contiguous()

    def product_apart(self, x: Tensor, drop: Drop | None, addend: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of inputs (tokens, ins) that have no room: one product more."""
        low = self._low(x, x.new_empty(len(x), self.rank), drop)
        start = addend if low is None else torch.addmm(addend, low, self.b.t())
        out = self._with_bias(start, x, self.upper[:, : self.ins])
        return out, low

    def _low(self, x: Tensor, into: Tensor, drop: Drop | None) -> Tensor | None:
        if not self.rank:
            return None
        x = x if drop is None else gpu_ops.dropout(x, *drop)
        return into.addmm_(x, self.a.t(), beta=0, alpha=self.scale)

    def _with_bias(self, addend: Tensor | None, x: Tensor, matrix: Tensor) -> Tensor:
        if addend is None:
            return x @ matrix.t() if self.bias is None else torch.addmm(self.bias, x, matrix.t())
        out = torch.addmm(addend, x, matrix.t())
        return out if self.bias is None else out.add_(self.bias)

    def gradients(self, room: Tensor, low: Tensor | None, drop: Drop | None) -> tuple[Tensor, list[Tensor]]:
        """(The gradient of the input (tokens, ins), that of each B) of the gradients in `room`, which it fills."""
        of_b = []
        if low is not None:
            room[:, self.out :].addmm_(room[:, : self.out], self.b, beta=0, alpha=self.scale)
            of_b = [summed(room[:, outs], low[:, ranks]) for outs, ranks in self.parts]
        if drop is None:
            return room @ self.left, of_b
        of_input = room[:, : self.out] @ self.left[: self.out]
        return gpu_ops.dropout(room[:, self.out :] @ self.a, *drop, added_to=of_input), of_b

    def parameter_gradients(
        self, room: Tensor, y: Tensor, of_b: Sequence[Tensor], drop: Drop | None
    ) -> list[Tensor]:
        """Those of A and B of each adapter: `room` after `gradients`, `y` (tokens, ins) is the input."""
        if not self.adapted:
            return []
        y = y if drop is None else gpu_ops.dropout(y, *drop)
        of_a = summed(room[:, self.out :], y)
        pairs = zip(self.adapted, self.parts, of_b, strict=True)
        return [
            part.to(parameter.dtype)
            for linear, (_, ranks), b in pairs
            for part, parameter in ((of_a[ranks], linear.lora_A), (b, linear.lora_B))
        ]

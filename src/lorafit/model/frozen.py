"""A frozen linear: what its forward and its input gradient are made of; weights in the network's own type.

Nothing here ever forms a weight gradient. model/quant.py has the same interface over fewer bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.model.native import fits, kernels

_MANY = 32  # rows from which laying the weight out for the tiles pays


class Frozen(nn.Module):
    """A frozen linear of `in_features` to `out_features`, y = x W^T + b, for x (tokens, in_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias: nn.Parameter | None = None

    def product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """x W^T + b; with `into` (tokens, out_features) added to it, in place."""
        raise NotImplementedError

    def input_gradient(self, slope: Tensor, into: Tensor | None = None) -> Tensor:
        """slope W for a slope (tokens, out_features); with `into` (tokens, in_features) added to it, in place."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight that the products stand for, (out_features, in_features)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


def times(x: Tensor, weight: Tensor, into: Tensor | None = None, *, turned: bool = False) -> Tensor:
    """x W^T, or with `turned` x W, for a frozen W (out_features, in_features); added to `into`, in place, or new.

    No gradient goes through it. Where the processor has matrix tiles they make many rows of bfloat16 at a time.
    """
    rows, depth = x.shape
    if rows >= _MANY and x.dtype == torch.bfloat16 and depth % 32 == 0 and fits(x, weight):
        compiled = kernels()
        if compiled is not None and compiled.has_tiles:
            out = x.new_empty(rows, weight.shape[1 if turned else 0]) if into is None else into
            shape = rows, depth, out.shape[1]
            compiled.call(
                "product", x.dtype, *shape, x, weight, int(turned), into, out, strips(rows, 2 * depth)
            )
            return out
    factor = weight if turned else weight.t()
    return x @ factor if into is None else into.addmm_(x, factor)


def strips(rows: int, row_bytes: int) -> Tensor:
    """Room for rows laid out for the tiles (model/native/products.cpp)."""
    return torch.empty((rows + 31) // 32 * 32 * row_bytes, dtype=torch.uint8)


class Linear(Frozen):
    """The weight as it is."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        out = times(x, self.weight, into)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(self, slope: Tensor, into: Tensor | None = None) -> Tensor:
        return times(slope, self.weight, into, turned=True)

    def dequantize(self) -> Tensor:
        return self.weight

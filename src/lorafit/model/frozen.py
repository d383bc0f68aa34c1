"""A frozen linear: what its forward and its input gradient are made of; weights in the network's own type.

Nothing here ever forms a weight gradient. model/quant.py has the same interface over fewer bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Linear(Frozen):
    """The weight as it is."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        if into is None:
            return F.linear(x, self.weight, self.bias)
        into.addmm_(x, self.weight.t())
        return into if self.bias is None else into.add_(self.bias)

    def input_gradient(self, slope: Tensor, into: Tensor | None = None) -> Tensor:
        return slope @ self.weight if into is None else into.addmm_(slope, self.weight)

    def dequantize(self) -> Tensor:
        return self.weight

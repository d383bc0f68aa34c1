"""The base's frozen linear layer: its product and its input gradient, with weights in the network's own type.

A frozen linear has no weight gradient. model/quant.py has the same interface for fewer bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lorafit.model.native import fits, kernels

_MANY = 32  # rows from which it is faster to rearrange the weight for the matrix tiles
LowRank = tuple[Tensor, Tensor]  # two factors, contiguous, in the type of the tokens


class Frozen(nn.Module):
    """A frozen linear of `in_features` to `out_features`, y = x W^T + b, for x (tokens, in_features)."""

    streamed: ClassVar[tuple[str, ...]] = ("weight",)  # the large tensors, which model/offload.py moves

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias: nn.Parameter | None = None

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        """x W^T + b + addend + P Q^T for `low` = (P (tokens, rank), Q (out_features, rank)); a new tensor."""
        raise NotImplementedError

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        """grad_output W + P Q, for grad_output (tokens, out_features), P (tokens, rank) and Q (rank, in_features).

        `low` is (P, Q). The result is added to `accumulate_into` (tokens, in_features) in place, if there is one.
        """
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight that the products use, (out_features, in_features)."""
        raise NotImplementedError

    def decode_operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Weight, row scale and column scale for model/decode_linear.py; None if it cannot multiply them."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule with the full name `name`."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def matmul(
    x: Tensor,
    weight: Tensor,
    addend: Tensor | None = None,
    low: LowRank | None = None,
    *,
    transposed: bool = False,
    in_place: bool = False,
) -> Tensor:
    """x W^T, or x W if `transposed`, for a frozen W (out_features, in_features), plus `addend` and `low` as in Frozen.

    It is not differentiable. Matrix tiles of the processor, if it has them, multiply many rows of bfloat16.
    """
    rows, depth = x.shape
    if rows >= _MANY and x.dtype == torch.bfloat16 and depth % 32 == 0 and fits(x, weight):
        compiled = kernels()
        if compiled is not None and compiled.has_products:
            columns = weight.shape[1 if transposed else 0]
            out = addend if in_place and addend is not None else x.new_empty(rows, columns)
            rank, *factors = (0, None, None) if low is None else (low[0].shape[1], *low)
            operands = (x, weight, int(transposed), rank, *factors, addend, out)
            workspace = tile_workspace(rows, 2 * (depth + rank))
            compiled.call("product", x.dtype, rows, depth, columns, *operands, workspace)
            return out
    start = with_low_rank(addend, low, transposed=transposed, in_place=in_place)
    factor = weight if transposed else weight.t()
    if start is None:
        return x @ factor
    own = in_place or low is not None
    return start.addmm_(x, factor) if own else torch.addmm(start, x, factor)


def summed(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, a sum over all tokens. On CUDA that of 16-bit numbers stays float32: float16 could overflow."""
    if a.is_cuda and a.itemsize == 2 and torch.version.hip is None:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t() @ b


def with_low_rank(
    addend: Tensor | None, low: LowRank | None, *, transposed: bool, in_place: bool
) -> Tensor | None:
    """addend + P Q^T, or addend + P Q if `transposed`: a new tensor if there is a `low`, unless `in_place`."""
    if low is None:
        return addend
    p, q = low[0], low[1] if transposed else low[1].t()
    if addend is None:
        return p @ q
    return addend.addmm_(p, q) if in_place else torch.addmm(addend, p, q)


def tile_workspace(rows: int, row_bytes: int) -> Tensor:
    """A buffer for rows rearranged for the matrix tiles (model/native/products.cpp)."""
    return torch.empty((rows + 31) // 32 * 32 * ((row_bytes + 63) // 64 * 64), dtype=torch.uint8)


class Linear(Frozen):
    """A linear in the network's own number type."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        out = matmul(x, self.weight, addend, low)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        return matmul(grad_output, self.weight, accumulate_into, low, transposed=True, in_place=True)

    def dequantize(self) -> Tensor:
        return self.weight

    def decode_operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        return (self.weight, None, None) if self.weight.dtype == dtype else None

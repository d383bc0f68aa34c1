"""Where A and B of LoRA start, if not at zero: a part of the base's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lorafit.errors import ConfigError


def of_singular_values(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in_features) and B (out_features, rank) with scale * B A the best approximation of `weight` (PiSSA).

    The squares of singular values are eigenvalues of the smaller Gram matrix: in float64 this is exact enough, and
    much faster than a decomposition of the weight.
    """
    _check(weight, rank, "pissa")
    wide = weight.double()
    is_tall = wide.shape[0] > wide.shape[1]
    gram = wide.t() @ wide if is_tall else wide @ wide.t()
    values, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -rank:].flip(1)
    roots = values[-rank:].flip(0).clamp_min(torch.finfo(torch.float64).tiny).sqrt()  # singular values
    root = (roots / scale).sqrt()
    if is_tall:
        return root[:, None] * top.t(), wide @ top / roots * root
    return root[:, None] * (top.t() @ wide) / roots[:, None], top * root


def of_columns(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The first rows of R and columns of Q in weight = Q R (OLoRA). Only the first columns of `weight` decide them."""
    _check(weight, rank, "olora")
    wide = weight.double()
    q, _ = torch.linalg.qr(wide[:, :rank])
    return q.t() @ wide, q


def _check(weight: Tensor, rank: int, init: str) -> None:
    if rank > min(weight.shape):
        rows, columns = weight.shape
        message = f"rank {rank} is too large for lora.init={init}: a linear is {columns} -> {rows}"
        raise ConfigError(message, place="lora.rank", hint=f"give at most {min(rows, columns)}")

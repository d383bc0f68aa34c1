"""EVA (Paischer et al., 2024): each A starts at the directions in which the inputs of its linear vary most.

PEFT calls it `init_lora_weights="eva"`; this is its case `rho=1`, in which each module keeps its rank. The inputs are
those of the base for the first rows of the run, at the positions whose next tokens are supervised. B starts at zero.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorafit.data.packing import build_pack
from lorafit.data.row_order import RowOrder
from lorafit.data.token_dataset import TokenDataset
from lorafit.distributed.ranks import Ranks
from lorafit.errors import ConfigError
from lorafit.forward import pack_loss
from lorafit.model.linear import replace_module
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraLinear, adapted, evaluating

TOKENS = 4096  # of the rows that are read, at least
_SEED, _ITERATIONS = 42, 4  # PEFT's, of the randomised decomposition


def first_rows(rows: TokenDataset, order: RowOrder) -> NDArray[np.int64]:
    """The indices of the rows whose inputs decide the start: those of the first steps of an epoch."""
    found: list[int] = []
    tokens = 0
    for step in range(order.steps_per_epoch):
        if tokens >= TOKENS:
            break
        for index in order.rows(step).tolist():
            found.append(index)
            tokens += int(rows.lengths[index])
    return np.array(found, np.int64)


def start_at_inputs(network: Llama, rows: TokenDataset, order: RowOrder, ranks: Ranks) -> None:
    """Set A of all adapted linears of a network without training. Rank 0 computes, all ranks have its values.

    Raises ConfigError where the rows have fewer supervised tokens than an adapter has ranks.
    """
    linears = adapted(network)
    if ranks.is_main:
        pack = build_pack([rows.row(int(index)) for index in first_rows(rows, order)], may_share=False)
        directions = _Directions(torch.from_numpy(pack.predict).to(network.lm_head.weight.device))
        for name, linear in linears.items():
            replace_module(network, name, _Watched(linear, directions))
        try:
            with evaluating(network), torch.no_grad():
                pack_loss(network, pack)
        finally:
            for name, linear in linears.items():
                replace_module(network, name, linear)
    for linear in linears.values():
        ranks.broadcast(linear.lora_A.data)


class _Directions:
    """The main directions of an input at the positions `predict`. Linears of one input follow one another."""

    def __init__(self, predict: Tensor) -> None:
        self._predict = predict
        self._latest = self._top = torch.empty(0)

    def of(self, x: Tensor, rank: int) -> Tensor:
        """(rank, in_features) of x (tokens, in_features) of the whole pass, or of its supervised positions."""
        if x is not self._latest or rank != len(self._top):
            inputs = x if len(x) == len(self._predict) else x[self._predict]
            self._latest, self._top = x, main_directions(inputs, rank)
        return self._top


class _Watched(nn.Module):
    """A linear as model/lora_linear.py reads it: its adapter adds nothing, and A is set by the input."""

    is_plain: ClassVar = False

    def __init__(self, linear: LoraLinear, directions: _Directions) -> None:
        super().__init__()
        self.linear, self.base, self.enabled, self.dropout = linear, linear.base, linear.enabled, 0.0
        self._directions = directions

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """Zero."""
        a = self.linear.lora_A
        a.data.copy_(self._directions.of(x, len(a)))
        return out.new_zeros(())


def main_directions(inputs: Tensor, rank: int) -> Tensor:
    """The first principal components (rank, in_features) of inputs (tokens, in_features), float64 on the CPU.

    Their signs are those of PEFT: the largest element is positive. Raises ConfigError where there are too few.
    """
    x = inputs.detach().to("cpu", torch.float64)
    if rank > min(x.shape):
        message = (
            f"rank {rank} is too large for lora.init=eva: {x.shape[0]} tokens of width {x.shape[1]} are read"
        )
        raise ConfigError(message, place="lora.rank", hint="lora.init=default, or a smaller rank")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        _, _, v = torch.svd_lowrank(x - x.mean(0), q=min(2 * rank, *x.shape), niter=_ITERATIONS)
    top = v.t()[:rank]
    largest = top.gather(1, top.abs().argmax(1, keepdim=True))
    return top * largest.sign()

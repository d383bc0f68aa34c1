"""The log-probabilities of whole answers: in a pass with a gradient, and of many rows without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.batch import balance
from lorafit.data.packing import Pack, TokenRow
from lorafit.data.pair_marks import CHOSEN, REJECTED, marks_of, preferred
from lorafit.distributed.ranks import Ranks
from lorafit.forward import answer_logps, next_logps
from lorafit.model.adapter_file import adapter_tensors, fill_adapter
from lorafit.model.device import uploaded
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating

MOST_DRIFT = 512  # positions whose distributions are compared
Values = NDArray[np.float64]
Advance = Callable[[int, int], None]


def measured(
    network: Llama, packs: Sequence[Pack], num_rows: int, ranks: Ranks, advance: Advance | None = None
) -> Values:
    """(num_rows, 3): the log-probabilities of the chosen and of the rejected answer, and the negative one of all that
    is supervised of the chosen row; NaN where there is none. No dropout, and no gradient.

    Each rank computes some of the packs; every rank has the result. The rows of plain packs count as chosen.
    """
    own = balance([len(pack.ids) for pack in packs], ranks.world_size)[ranks.rank]
    values = np.zeros((num_rows, 3))
    known = np.zeros((num_rows, 3))
    for pack in packs:
        sides = np.zeros(len(pack.rows), np.int64) if pack.sides is None else pack.sides.astype(np.int64)
        known[pack.rows, sides] = known[pack.rows, 2] = 1
    with evaluating(network), torch.inference_mode():
        for done, index in enumerate(own, 1):
            pack = packs[index]
            logps, everything = (one.double().cpu().numpy() for one in answer_logps(network, pack))
            sides = np.zeros(len(pack.rows), np.int64) if pack.sides is None else pack.sides.astype(np.int64)
            values[pack.rows, sides] = logps
            values[pack.rows[sides == 0], 2] = everything[sides == 0]
            if advance is not None:
                advance(done, len(own))
    if not ranks.is_single_process:
        values = np.array(ranks.all_reduce_sum(values.ravel().tolist())).reshape(values.shape)
    values[known == 0] = np.nan
    return values


def mean_log_ratio(network: Llama, packs: Sequence[Pack], start: Values, ranks: Ranks) -> Tensor:
    """The mean over rows, on the network's device, of the log-probability of their answer minus `start` (rows,). The
    host does not wait for it. Each rank computes some of the packs.
    """
    device = network.lm_head.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(network), torch.no_grad():
        for index in balance([len(pack.ids) for pack in packs], ranks.world_size)[ranks.rank]:
            logps, _ = answer_logps(network, packs[index])
            total += (logps.double() - uploaded(start[packs[index].rows], device)).sum()
    ranks.add_on_device(total)
    return total / len(start)


def mismatched(row: TokenRow, other: TokenRow, longest: int) -> TokenRow:
    """The prompt of a preference with the answer of another one, at most `longest` tokens: a row like any other."""
    (ids, own), (_, others) = row, other
    prompt = (marks_of(own) & (CHOSEN | REJECTED)) == 0
    text, trained = preferred(other[0], marks_of(others))
    start = int(np.count_nonzero((marks_of(others) & (CHOSEN | REJECTED)) == 0))
    joined = np.concatenate([ids[prompt], text[start:]])[:longest]
    loss_mask = np.concatenate([np.zeros(int(prompt.sum()), np.bool_), trained[start:]])[:longest]
    return joined, loss_mask


def drift(network: Llama, packs: Sequence[Pack], start: Mapping[str, Tensor]) -> float | None:
    """The mean KL(policy | starting point) of the next token, in nats, along the first answers of `packs`.

    It is exact at each position: a sum over the vocabulary. `start` is the adapter of the starting point. The network
    does not change. None without packs.
    """
    final = {name: tensor.clone() for name, tensor in adapter_tensors(network).items()}
    chosen, left = [], MOST_DRIFT
    for pack in packs:
        if left > 0:
            chosen.append((pack, min(left, len(pack.predict))))
            left -= len(pack.predict)

    def logs() -> list[Tensor]:
        with evaluating(network), torch.inference_mode():
            return [next_logps(network, pack, most).cpu() for pack, most in chosen]

    now = logs()
    fill_adapter(network, start, Path("start"))
    before = logs()
    fill_adapter(network, final, Path("final"))
    if not now:
        return None
    found = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(now, before, strict=True)])
    return float(found.mean())

"""How fast this machine computes a network: one product in a fraction of a second, or real passes of the run."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from lorafit.data.packing import Pack
from lorafit.forward import pack_loss
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import Frozen
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating
from lorafit.model.memory import release_free_memory
from lorafit.plan.machine import watch_peak
from lorafit.plan.predict import Throughput
from lorafit.plan.workload import Workload, evenly_spread

USUAL_EFFICIENCY = 0.7  # of a whole pass, relative to one large product
PRODUCT_ROWS = 256  # of that product
# A pack with less than this part of the heaviest one's tokens serves for the first, slow products.
_SHORT_PACK = 0.2
_MOST_PACKS, _SEVERAL_SECONDS = 12, 2.0  # so many packs are timed while all take less than so many seconds
_LONG_SECONDS = 1.0  # a measurement is not repeated after so long


def quick_rates(network: Llama) -> Throughput:
    """Rates from one product of the first linear: enough for an estimate."""
    started = time.perf_counter()
    base = next(module for module in network.modules() if isinstance(module, Frozen))
    head = network.lm_head.weight
    rows = PRODUCT_ROWS
    x = torch.ones(rows, base.in_features, dtype=head.dtype, device=head.device)
    with torch.inference_mode():
        seconds = best_seconds(lambda: base(x), head.device)
    seconds_per_weight = seconds / (rows * base.in_features * base.out_features)
    products = 3 if network.recompute else 2  # per weight and token, forward and backward
    weights = network.arch.num_linear_weights + head.numel()
    return Throughput(
        seconds_per_token=seconds_per_weight * weights * products / USUAL_EFFICIENCY,
        token_seconds=_token_seconds(network),
        measured=False,
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def _token_seconds(network: Llama) -> float:
    """Seconds of a pass of one token, as decoding makes it: it reads all weights."""
    device = network.lm_head.weight.device
    with evaluating(network):
        ids, attend = torch.zeros(1, dtype=torch.int64, device=device), PackedDocuments([1], device)
        return best_seconds(lambda: network.logits(network.hidden(ids, attend)), device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of three times, or of fewer where they are long. A GPU loads and compiles its kernels before them."""
    if device.type == "cuda":
        work()
    best, started = float("inf"), time.perf_counter()
    for _ in range(3):
        if time.perf_counter() - started > _LONG_SECONDS:
            break
        best = min(best, _seconds(work, device))
    return best


def calibrate(
    network: Llama, work: Workload, heaviest: int, quick: Throughput, pack_of: Callable[[int], Pack]
) -> Throughput:
    """Rates and peak memory from real forward and backward passes over the heaviest pack and, where cheap, others.

    `pack_of(i)` makes the pack of the workload's pass i. Gradients are dropped and the random state is restored, so
    the run that follows is the same with and without this. The adapter must have no gradients.
    """
    started = time.perf_counter()
    device, was_training = network.lm_head.weight.device, network.training

    def timed(index: int) -> float:
        pack = pack_of(index)
        taken = _seconds(lambda: (pack_loss(network, pack) / max(1, len(pack.targets))).backward(), device)
        network.zero_grad()
        return taken

    tokens = work.passes[:, 0]
    shortest = int(np.argmin(tokens))
    network.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            cheap = tokens[shortest] < _SHORT_PACK * tokens[heaviest]
            if cheap:
                timed(shortest)  # the first products of a process set things up
            if device.type == "cuda":
                timed(heaviest)  # a GPU loads and compiles its kernels, some of them for this size
            since = time.perf_counter()
            network.decoder.embed_tokens.weight.count_nonzero()  # mapped from its file; a whole run reads all of it
            with watch_peak(device) as peak:
                seconds = timed(heaviest)
            if not cheap and time.perf_counter() - since < _SEVERAL_SECONDS:
                seconds = timed(heaviest)
            num_tokens = float(tokens[heaviest])
            for index in evenly_spread(len(tokens), _MOST_PACKS):
                if time.perf_counter() - since > _SEVERAL_SECONDS:
                    break
                seconds += timed(index)
                num_tokens += float(tokens[index])
    finally:
        network.zero_grad()
        release_free_memory()
        network.train(was_training)
    return Throughput(
        seconds_per_token=seconds / max(1.0, num_tokens),
        token_seconds=quick.token_seconds,
        measured=True,
        seconds=time.perf_counter() - started,
        peak_bytes=peak.num_bytes,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, with what it started on a GPU."""
    _wait(device)
    before = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

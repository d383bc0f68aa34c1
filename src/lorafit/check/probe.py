"""A trial of the real model before a run: does every adapter tensor get a gradient, is the loss one to expect.

B starts at zero, so at the first step no gradient reaches A: what flows back into A is B's transpose times a slope.
The probe therefore takes two: gradients at the start (B's are looked at, and A's where B is not zero), one step of
AdamW at the peak learning rate, gradients again (A's). Then everything is put back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.check.verdict import Verdict
from lorafit.data.packing import Pack
from lorafit.evaluate.heldout import pack_loss
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraLinear, adapted, set_enabled
from lorafit.model.memory import give_back_memory

_EPS = 1e-8  # AdamW's, as in training/optim.py
_FLOAT16_SCALES = tuple(2.0**power for power in (16, 12, 8, 4, 0))
_KNOWN_BY_HEART = 0.01
_LISTED = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """What the probe saw; losses are means over `targets` supervised tokens.

    `uniform` is the loss of a guess over the whole vocabulary, `base` the model's without adapter, `before` and
    `after` those with it and around the trial step. `dead` and `wild` name adapter tensors whose gradient is zero
    or not finite.
    """

    targets: int
    uniform: float
    base: float
    before: float
    after: float
    num_tensors: int
    dead: tuple[str, ...]
    wild: tuple[str, ...]


def probe(network: Llama, packs: Sequence[Pack], learning_rate: float) -> Measured:
    """Take one trial step on `packs` and put the network back as it was: weights, gradients, mode, random state."""
    layers = adapted(network)
    was_training = network.training
    kept = {name: layer.lora_B.detach().clone() for name, layer in layers.items()}
    started = all(bool(b.any()) for b in kept.values())
    network.eval()  # no dropout: nothing random is drawn
    try:
        base = None
        if any(bool(b.any()) for b in kept.values()):
            set_enabled(network, False)
            base = _loss(network, packs)
            set_enabled(network, True)
        before, gradients = _gradients(network, packs, layers)
        looked_at = (
            dict(gradients) if started else {n: g for n, g in gradients.items() if n.endswith("lora_B")}
        )
        with torch.no_grad():
            for name, layer in layers.items():
                slope = gradients[f"{name}.lora_B"]
                layer.lora_B.sub_(learning_rate * slope / (slope.abs() + _EPS))
        after, gradients = _gradients(network, packs, layers)
        looked_at |= {name: g for name, g in gradients.items() if name not in looked_at}
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_B.copy_(kept[name])
        set_enabled(network, True)
        for parameter in network.parameters():
            parameter.grad = None
        network.train(was_training)
        give_back_memory()
    wild = tuple(name for name, g in looked_at.items() if not bool(torch.isfinite(g).all()))
    dead = tuple(name for name, g in looked_at.items() if name not in wild and not bool(g.any()))
    targets = sum(len(pack.targets) for pack in packs)
    uniform = math.log(network.arch.vocab_size)
    return Measured(
        targets, uniform, before if base is None else base, before, after, len(looked_at), dead, wild
    )


def probe_verdicts(seen: Measured, learning_rate: float) -> list[Verdict]:
    """What the probe says: gradients, loss, and whether the peak learning rate goes downhill."""
    return [_of_gradients(seen), _of_loss(seen), _of_rate(seen, learning_rate)]


def _loss(network: Llama, packs: Sequence[Pack]) -> float:
    with torch.inference_mode():
        total = sum(float(pack_loss(network, pack)) for pack in packs)
    return total / max(1, sum(len(pack.targets) for pack in packs))


def _gradients(
    network: Llama, packs: Sequence[Pack], layers: dict[str, LoraLinear]
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradient of every adapter tensor; zeros where there is none). Float16 is scaled as in training."""
    targets = max(1, sum(len(pack.targets) for pack in packs))
    masters = {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    scales = _FLOAT16_SCALES if network.lm_head.weight.dtype == torch.float16 else (1.0,)
    total, found = math.nan, dict[str, Tensor]()
    for scale in scales:
        for master in masters.values():
            master.grad = None
        total = 0.0
        for pack in packs:
            loss = pack_loss(network, pack)
            (loss * (scale / targets)).backward()
            total += float(loss.detach())
        found = {
            name: torch.zeros_like(m) if m.grad is None else m.grad / scale for name, m in masters.items()
        }
        if all(bool(torch.isfinite(g).all()) for g in found.values()):
            break
    return total / targets, found


def _of_gradients(seen: Measured) -> Verdict:
    name = "gradients"
    for names, what in ((seen.wild, "have a gradient that is not finite"), (seen.dead, "get no gradient")):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            message = f"{len(names)} of {seen.num_tensors} adapter tensors {what}: {', '.join(names[:_LISTED])}{more}"
            hint = "they would never learn; try model.dtype=float32, or other lora.targets"
            return Verdict(name, "fail", message, "lora.targets", hint)
    return Verdict(
        name, "pass", f"all {seen.num_tensors} adapter tensors get one (B at once, A after one step)"
    )


def _of_loss(seen: Measured) -> Verdict:
    name = "loss"
    if not math.isfinite(seen.before):
        hint = "the weights are damaged, or model.dtype=float32 is needed"
        return Verdict(name, "fail", f"it is {seen.before} on the first rows", "model.name", hint)
    message = (
        f"base {seen.base:.3f} on {seen.targets:,} supervised tokens, a blind guess has {seen.uniform:.3f}"
    )
    if seen.before != seen.base:
        message += f", with the adapter to continue {seen.before:.3f}"
    if seen.base > seen.uniform:
        hint = "do weights and tokenizer belong together?"
        return Verdict(name, "warn", f"{message}: worse than guessing", "model.name", hint)
    if seen.base < _KNOWN_BY_HEART:
        message += ": the model knows these rows by heart"
        return Verdict(name, "warn", message, "data.path", "was it trained on them already?")
    return Verdict(name, "pass", message)


def _of_rate(seen: Measured, learning_rate: float) -> Verdict:
    name, key = "trial step", "train.learning_rate"
    message = f"one step at the peak rate {learning_rate:g} takes the loss from {seen.before:.3f} to {seen.after:.3f}"
    if not seen.after <= 1.02 * seen.before + 1e-3:  # also where it is not a number
        return Verdict(name, "warn", f"{message}: too high", key, "a third of it, or longer train.warmup")
    return Verdict(name, "pass", message)

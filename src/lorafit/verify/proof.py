"""Verifies a finished run: the adapter on disk is the trained one, differs from the base, and ends its answers.

Four checks, each with a verdict: `changed`, `reload`, `stop` and `heldout`; docs/report.md defines them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafit.data.formats import Row
from lorafit.data.packing import TokenRow
from lorafit.errors import LorafitError
from lorafit.infer.model import Model
from lorafit.model.adapter_file import PREFIX, WEIGHTS, adapter_tensors
from lorafit.model.dtypes import dtype_name
from lorafit.model.llama import Llama
from lorafit.model.memory import is_out_of_memory, release_free_memory
from lorafit.observe.events import Observer, Progress, Proved
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import sha256_file
from lorafit.verify.logits import difference, rms
from lorafit.verify.reload import Probe, logits_from_subprocess, probe_logits

Verdict = Literal["pass", "warn", "fail", "skip"]
STOP_PROMPTS, STOP_SHARE = 20, 0.8
# limits of an answer that should end, in tokens: twice the longest right one
LEAST_ANSWER, MOST_ANSWER = 64, 256
# By the type of the compute: the largest difference of the base's logits between two processes, and the part of the
# adapter's effect that may be lost between training and loading. Both are relative root mean squares.
NOISE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
SHARE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
NOISES = 4.0  # the tuned logits may differ by this many times the difference of the base's


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its result in words and in `values`."""

    name: str
    verdict: Verdict
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Proof:
    """All checks of a finished run, for proof.json."""

    step: int
    seconds: float
    adapter_sha256: str | None
    checks: Sequence[Check]

    @property
    def verdict(self) -> Literal["pass", "warn", "fail"]:
        """The worst of the checks."""
        verdicts = [check.verdict for check in self.checks]
        return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "pass"

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"schema": 1, "verdict": self.verdict, **asdict(self)}

    def event(self) -> Proved:
        """The event to display: two lines of passed checks, and the failed ones."""
        passed = {check.name: check.text for check in self.checks if check.verdict in ("pass", "skip")}
        halves = [[passed[name] for name in names if name in passed] for names in _HALVES]
        faults = [check.text for check in self.checks if check.verdict in ("warn", "fail")]
        return Proved(self.verdict, ["; ".join(half) for half in halves if half], faults, self.seconds)


_HALVES = (("changed", "reload"), ("stop", "heldout"))


def tensor_digests(network: nn.Module) -> dict[str, str]:
    """SHA-256 of every adapter tensor by its name in the adapter's file."""
    return {name: _digest(tensor) for name, tensor in adapter_tensors(network).items()}


def prove(
    run: RunDirectory,
    model: Model,
    *,
    step: int,
    initial: Mapping[str, str],
    continued: bool,
    rows: Sequence[TokenRow],
    prompts: Sequence[Row],
    trained: bool,
    losses: tuple[float | None, float | None],
    observe: Observer,
) -> Proof:
    """Check the finished `run`, whose final adapter, of `step`, is on `model` too; frees the model's memory.

    `initial` are the digests before the first step; `continued` says that the adapter was not fresh. `rows` are fixed
    texts, held out if there are such rows. `prompts` are the rows of the stop check, held-out ones unless all are
    `trained`. `losses` are the held-out losses of base and tuned. A failed check is in the result, and raises nothing.
    """
    started = time.perf_counter()
    weights = run.adapter / WEIGHTS
    observe(Progress("verifying the adapter", 0, 4))
    changed_check = changed(weights, model.network, initial, only_b=step == 1 and not continued)
    observe(Progress("verifying the adapter", 1, 4))
    stop_check = _with_memory("stop", lambda: stop(model, prompts, trained=trained))
    observe(Progress("verifying the adapter", 2, 4))
    reload_check = _with_memory("reload", lambda: reload(run, model.network, rows))
    checks = [changed_check, reload_check, stop_check, heldout(*losses, trained=trained)]
    observe(Progress("verifying the adapter", 4, 4))
    digest = sha256_file(weights) if weights.is_file() else None
    return Proof(step, round(time.perf_counter() - started, 3), digest, checks)


def _with_memory(name: str, check: Callable[[], Check]) -> Check:
    """The check `name`; skipped where memory runs out, here or in the fresh process."""
    try:
        return check()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return Check(name, "skip", f"`{name}` is not verified: out of memory")


def changed(weights: Path, network: nn.Module, initial: Mapping[str, str], *, only_b: bool) -> Check:
    """Every tensor of the file equals the network's to the bit, and differs from that before the first step.

    `only_b`: B was zero in the only step, so A had no gradient and did not change.
    """
    try:
        stored = {name: _digest(tensor) for name, tensor in load_file(weights).items()}
    except (OSError, SafetensorError) as error:
        return Check("changed", "fail", f"the adapter's file cannot be read: {error}")
    live = tensor_digests(network)
    differing = sorted(name for name in live.keys() | stored.keys() if live.get(name) != stored.get(name))
    unchanged = [name for name in stored if stored[name] == initial.get(name)]
    unexpected = [name for name in unchanged if not (only_b and ".lora_A." in name)]
    num_changed = len(stored) - len(unchanged)
    count = f"{num_changed} of {len(stored)} adapter tensors changed"
    values = {
        "tensors": len(stored),
        "changed": num_changed,
        "unchanged": unchanged,
        "not_as_trained": differing,
    }
    if differing:
        text = f"the adapter on disk is not the trained one: {_named(differing)} differ"
        return Check("changed", "fail", text, values)
    if unexpected:
        return Check("changed", "fail", f"{count}; {_named(unexpected)} did not change in training", values)
    if unchanged:
        count += " (A has no gradient in a first step)"
    return Check("changed", "pass", count, values)


def reload(run: RunDirectory, network: Llama, rows: Sequence[TokenRow]) -> Check:
    """A fresh process that loads the run from disk computes the network's logits, and not the base's.

    The base's logits of both processes measure how much two processes differ in any case. The network's memory is
    freed before the other process needs it.
    """
    dtype = network.lm_head.weight.dtype
    probe = Probe.of(rows)
    live, live_base = (probe_logits(network, probe, base=base) for base in (False, True))
    network.streamed = None
    network.to("meta")
    release_free_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        fresh, fresh_base = logits_from_subprocess(run, probe)
    except LorafitError as error:
        return Check("reload", "fail", error.problems[0].message)
    return compare_logits(live, live_base, fresh, fresh_base, dtype)


def compare_logits(
    live: Tensor, live_base: Tensor, fresh: Tensor, fresh_base: Tensor, dtype: torch.dtype
) -> Check:
    """The check of four tables of logits (positions, vocab_size): trained and loaded, tuned and base."""
    if fresh.shape != live.shape:
        return Check("reload", "fail", f"in a fresh process the logits have shape {list(fresh.shape)}")
    size, effect, noise = rms(live_base), rms(live - live_base), rms(fresh_base - live_base)
    bounds = {"noise": noise, "times_noise": NOISES, "scale": effect, "share": SHARE[dtype]}
    tuned = difference(fresh, live, rms, **bounds)
    error, bound = tuned.size, tuned.bound
    values = {
        "positions": len(live),
        "base_rms": size,
        "effect": effect,
        "error": error,
        "noise": noise,
        "bound": bound,
        "noise_bound": NOISE[dtype] * size,
        "same_token": float((fresh.argmax(-1) == live.argmax(-1)).double().mean()),
        "dtype": dtype_name(dtype),
    }
    if not all(map(math.isfinite, (size, error, effect, noise))):
        return Check("reload", "fail", "the logits are not finite", {"positions": len(live)})
    if noise > NOISE[dtype] * size:
        text = f"in a fresh process the base itself differs: its logits are {noise / size:.1%} off"
        return Check("reload", "fail", text, values)
    if not tuned.is_accepted:
        what = "the base's" if difference(fresh, live_base, rms, **bounds).is_accepted else "others"
        text = (
            f"a fresh process that loads the adapter does not get the trained model's logits but {what} "
            f"({error:.2g} off; the adapter changes them by {effect:.2g})"
        )
        return Check("reload", "fail", text, values)
    if effect <= 2 * bound:
        text = f"the adapter changes the logits by {effect:.2g}, no more than rounding ({noise:.2g}): not verified"
        return Check("reload", "warn" if effect else "fail", text, values)
    how = "to the bit" if error == 0 else f"but for {error / effect:.1e} of the adapter's effect"
    text = f"a fresh process loads it and gets the same logits, {how}"
    return Check("reload", "pass", text, values)


def stop(model: Model, prompts: Sequence[Row], *, trained: bool = False) -> Check:
    """How many greedy answers to prompts end by themselves within twice the tokens of a right answer.

    `trained` is whether the prompts are of trained rows.
    """
    kind = "trained" if trained else "held-out"
    answers = [row.content.answers()[-1] for row in prompts]
    lengths = [len(ids) for ids, _ in model.renderer.tokenizer.encode_batch(answers)]
    fair = [row for row, length in zip(prompts, lengths, strict=True) if _is_fair(length)]
    if not fair:
        why = "the right answers are too long" if prompts else "no held-out row has a question"
        return Check("stop", "skip", f"whether answers end is not measured: {why}")
    _, limit = stop_prompts(lengths)
    generated = model.generate([row.content for row in fair], max_tokens=limit)
    going = [row.place for row, answer in zip(fair, generated, strict=True) if not answer.stopped]
    ended = len(fair) - len(going)
    text = f"{ended} of {len(fair)} {kind} prompts ended by themselves"
    values = {"prompts": len(fair), "ended": ended, "max_tokens": limit, "going_on": going}
    if ended < STOP_SHARE * len(fair):
        return Check("stop", "warn", f"only {text} within {limit} tokens", values)
    return Check("stop", "pass", text, values)


def stop_prompts(lengths: Sequence[int]) -> tuple[int, int]:
    """(prompts of the stop check, most tokens per answer); `lengths` are the tokens of the right answers."""
    fair = [length for length in lengths[:STOP_PROMPTS] if _is_fair(length)]
    return len(fair), max(LEAST_ANSWER, 2 * max(fair, default=0))


def _is_fair(length: int) -> bool:
    """Whether the right answer, of `length` tokens, is short enough for the stop check."""
    return 2 * length <= MOST_ANSWER


def heldout(base: float | None, tuned: float | None, *, trained: bool = False) -> Check:
    """Whether the held-out loss is lower than the base's; it is of the time before all rows were `trained`."""
    if base is None or tuned is None:
        return Check("heldout", "skip", "the held-out loss is not measured")
    text = f"held-out loss {base:.3f} -> {tuned:.3f}" + ", before all rows were trained" * trained
    values = {"base": base, "tuned": tuned}
    if not tuned < base:
        return Check("heldout", "warn", f"{text}: the adapter is no better than the base", values)
    return Check("heldout", "pass", text, values)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().data).hexdigest()


def _named(names: Sequence[str], most: int = 3) -> str:
    listed = ", ".join(f"`{name.removeprefix(PREFIX)}`" for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"

"""The proof after training: what lies on disk is what was trained, is not the base, and ends its answers.

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
from lorafit.model.memory import release_free_memory
from lorafit.observe.events import Observer, Progress, Proved
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import sha256_file
from lorafit.verify.reload import Probe, logits_from_subprocess, probe_logits

Verdict = Literal["pass", "warn", "fail", "skip"]
STOP_PROMPTS, STOP_SHARE = 20, 0.8
LEAST_ANSWER, MOST_ANSWER = (
    64,
    256,
)  # tokens given to an answer that should end; twice what the longest right one has
# By the compute's dtype: how far two processes may be apart in the base's logits, and which part of the adapter's
# effect may be lost between what was trained and what was loaded. Both are relative root mean squares.
NOISE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
SHARE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
NOISES = 4.0  # how many times the distance of the base's logits the tuned ones may be apart


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: what was found, in words and in `values`."""

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
        """What people are told: what holds in a line for each half of the proof, and what does not."""
        said = {check.name: check.text for check in self.checks if check.verdict in ("pass", "skip")}
        halves = [[said[name] for name in names if name in said] for names in _HALVES]
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
    prompts: Callable[[int], Sequence[Row]],
    losses: tuple[float | None, float | None],
    observe: Observer,
) -> Proof:
    """Look at the finished `run`, whose final adapter, of `step`, is on `model` too; gives up the model's memory.

    `initial` are the digests before the first step; the adapter was `continued` from another or fresh. `rows` are
    fixed texts, held out where there are such rows, `prompts` gives the first held-out rows that ask something,
    `losses` are the held-out losses of base and tuned. Nothing is raised for what is found wrong.
    """
    started = time.perf_counter()
    weights = run.adapter / WEIGHTS
    observe(Progress("proving the adapter", 0, 4))
    checks = [changed(weights, model.network, initial, only_b=step == 1 and not continued)]
    observe(Progress("proving the adapter", 1, 4))
    checks.append(stop(model, prompts))
    observe(Progress("proving the adapter", 2, 4))
    checks += [reload(run, model.network, rows), heldout(*losses)]
    observe(Progress("proving the adapter", 4, 4))
    digest = sha256_file(weights) if weights.is_file() else None
    order = ("changed", "reload", "stop", "heldout")
    checks.sort(key=lambda check: order.index(check.name))
    return Proof(step, round(time.perf_counter() - started, 3), digest, checks)


def changed(weights: Path, network: nn.Module, initial: Mapping[str, str], *, only_b: bool) -> Check:
    """Every tensor of the file is the network's to the bit, and another than before the first step.

    `only_b`: B was zero in the only step, so A had no gradient and stays.
    """
    try:
        stored = {name: _digest(tensor) for name, tensor in load_file(weights).items()}
    except (OSError, SafetensorError) as error:
        return Check("changed", "fail", f"the adapter's file cannot be read: {error}")
    live = tensor_digests(network)
    other = sorted(name for name in live.keys() | stored.keys() if live.get(name) != stored.get(name))
    still = [name for name in stored if stored[name] == initial.get(name)]
    unexpected = [name for name in still if not (only_b and ".lora_A." in name)]
    count = f"{len(stored) - len(still)} of {len(stored)} adapter tensors changed"
    values = {
        "tensors": len(stored),
        "changed": len(stored) - len(still),
        "unchanged": still,
        "not_as_trained": other,
    }
    if other:
        text = f"the adapter on disk is not the trained one: {_named(other)} differ"
        return Check("changed", "fail", text, values)
    if unexpected:
        return Check("changed", "fail", f"{count}; {_named(unexpected)} did not change in training", values)
    if still:
        count += " (A has no gradient in a first step)"
    return Check("changed", "pass", count, values)


def reload(run: RunDirectory, network: Llama, rows: Sequence[TokenRow]) -> Check:
    """The run loaded from disk in a fresh process gives the network's logits, and not the base's.

    The base's logits of both processes say how far apart two processes are anyway. The network's memory is given
    up before the other process needs it.
    """
    dtype = network.lm_head.weight.dtype
    probe = Probe.of(rows)
    live, live_base = (probe_logits(network, probe, base=base) for base in (False, True))
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
    """The verdict on four sets of logits (positions, vocab_size): trained and loaded, tuned and base."""
    if fresh.shape != live.shape:
        return Check("reload", "fail", f"in a fresh process the logits have shape {list(fresh.shape)}")
    size = _rms(live_base)
    error, effect, noise = (
        _rms(a - b) for a, b in ((fresh, live), (live, live_base), (fresh_base, live_base))
    )
    same = float((fresh.argmax(-1) == live.argmax(-1)).double().mean())
    bound = NOISES * noise + SHARE[dtype] * effect
    values = {
        "positions": len(live),
        "base_rms": size,
        "effect": effect,
        "error": error,
        "noise": noise,
        "bound": bound,
        "noise_bound": NOISE[dtype] * size,
        "same_token": same,
        "dtype": dtype_name(dtype),
    }
    if not all(map(math.isfinite, (size, error, effect, noise))):
        return Check("reload", "fail", "the logits are not finite", {"positions": len(live)})
    if noise > NOISE[dtype] * size:
        text = f"in a fresh process the base itself is another one: its logits are {noise / size:.1%} off"
        return Check("reload", "fail", text, values)
    if error > bound:
        what = "the base's" if _rms(fresh - live_base) <= bound else "others"
        text = (
            f"a fresh process that loads the adapter does not get the trained model's logits but {what} "
            f"({error:.2g} off, where the adapter changes {effect:.2g})"
        )
        return Check("reload", "fail", text, values)
    if effect <= 2 * bound:
        text = f"the adapter changes the logits by {effect:.2g}, which rounding hides ({noise:.2g}): nothing is proven"
        return Check("reload", "warn" if effect else "fail", text, values)
    how = "to the bit" if error == 0 else f"but for {error / effect:.1e} of the adapter's effect"
    text = f"a fresh process loads it and gets the same logits, {how}"
    return Check("reload", "pass", text, values)


def stop(model: Model, prompts: Callable[[int], Sequence[Row]]) -> Check:
    """How many greedy answers to held-out prompts end by themselves, given twice the tokens of a right answer."""
    asked = [(row, _answer_tokens(model, row)) for row in prompts(STOP_PROMPTS)]
    fair = [(row, length) for row, length in asked if _is_fair(length)]
    if not fair:
        why = "right answers are too long to wait for" if asked else "no held-out row asks something"
        return Check("stop", "skip", f"whether answers end is not measured: {why}")
    _, limit = stop_prompts([length for _, length in fair])
    answers = model.generate([row.content for row, _ in fair], max_tokens=limit)
    going = [row.place for (row, _), answer in zip(fair, answers, strict=True) if not answer.stopped]
    ended = len(fair) - len(going)
    text = f"{ended} of {len(fair)} held-out prompts ended by themselves"
    values = {"prompts": len(fair), "ended": ended, "max_tokens": limit, "going_on": going}
    if ended < STOP_SHARE * len(fair):
        return Check("stop", "warn", f"only {text} within {limit} tokens", values)
    return Check("stop", "pass", text, values)


def stop_prompts(lengths: Sequence[int]) -> tuple[int, int]:
    """How many prompts are asked whether they end, and the most tokens of an answer; `lengths` are right answers'."""
    fair = [length for length in lengths[:STOP_PROMPTS] if _is_fair(length)]
    return len(fair), max(LEAST_ANSWER, 2 * max(fair, default=0))


def _is_fair(length: int) -> bool:
    """Whether an answer may be waited for whose right one has `length` tokens."""
    return 2 * length <= MOST_ANSWER


def heldout(base: float | None, tuned: float | None) -> Check:
    """The tuned model predicts held-out rows better than the base does."""
    if base is None or tuned is None:
        return Check("heldout", "skip", "the held-out loss is not measured")
    text = f"held-out loss {base:.3f} -> {tuned:.3f}"
    values = {"base": base, "tuned": tuned}
    if not tuned < base:
        return Check("heldout", "warn", f"{text}: the adapter is no better than the base", values)
    return Check("heldout", "pass", text, values)


def _answer_tokens(model: Model, row: Row) -> int:
    text = getattr(row.content, "answer", "")
    return len(next(model.renderer.tokenizer.encode_batch([text]))[0])


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().data).hexdigest()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _named(names: Sequence[str], most: int = 3) -> str:
    listed = ", ".join(f"`{name.removeprefix(PREFIX)}`" for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"

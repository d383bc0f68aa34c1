"""What a run learns: how the packs of a step become a loss, and what held-out rows measure. One record per method.

`sft` is the mean cross-entropy of the supervised tokens, as training/loop.py computes it. The other methods compare
answers (training/preferences.py) with the starting point of the run (training/reference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.batch import Batch
from lorafit.data.packing import Pack
from lorafit.data.pair_marks import CHOSEN, OF_PROMPT, REJECTED, documents_of, marks_of
from lorafit.data.token_dataset import TokenDataset
from lorafit.forward import answer_logps, answer_tokens, pack_losses
from lorafit.model.device import uploaded
from lorafit.model.llama import Llama
from lorafit.observe.events import Preferences, Progress
from lorafit.training.answers import Advance, Values, mean_log_ratio, measured, mismatched
from lorafit.training.preferences import LOSSES, Answers, Judged, Loss, Settings, Step
from lorafit.training.reference import read_reference

if TYPE_CHECKING:
    from lorafit.training.loop import TrainContext

KERNELS = 1  # to be raised whenever the same rows and weights would give other log-probabilities


@dataclass(frozen=True, slots=True)
class Objective:
    """One method: its loss (None for `sft`), whether the loss needs the log-probabilities at the starting point of the
    trained rows too, and whether it needs the divergence, from the answers of other rows.
    """

    loss: Loss | None = None
    reference: bool = False
    mismatched: bool = False


OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(),
    "dpo": Objective(LOSSES["dpo"], reference=True),
    "orpo": Objective(LOSSES["orpo"]),
    "simpo": Objective(LOSSES["simpo"]),
    "kto": Objective(LOSSES["kto"], reference=True, mismatched=True),
}


def with_reference(job: TrainContext) -> TrainContext:
    """`job` with the log-probabilities at its starting point, where its method compares answers.

    The network must be at the starting point.
    """
    objective = OBJECTIVES[job.config.train.method]
    if objective.loss is None:
        return job
    model, facts = job.config.model, job.facts
    decides = {
        **{name: facts[name] for name in ("base_model", "device", "torch", "machine")},
        "dtype": model.dtype,
        "quantize": model.quantize,
        "kernels": KERNELS,
        "tokens": job.data.entry_digest,
        "packing": [job.packer.capacity, job.packer.packing],
    }

    def advance(done: int, total: int) -> None:
        job.observe(Progress("reading the starting point", done, total))

    rows = [job.rows, job.data.heldout] if objective.reference else [job.data.heldout]
    reference = read_reference(
        job.network,
        [part for part in rows if len(part)] or [job.rows.take(np.zeros(0, np.int64))],
        job.packer,
        job.ranks,
        decides,
        with_mismatched=objective.mismatched,
        longest=job.data.renderer.contract.max_length,
        advance=advance,
    )
    return replace(job, reference=reference)


class Passes:
    """The loss of the packs of one step; called with network and pack. It collects the sums for the step's event."""

    def __init__(self, job: TrainContext, batch: Batch) -> None:
        objective = OBJECTIVES[job.config.train.method]
        assert objective.loss is not None
        assert job.reference is not None
        self._loss, self._settings = objective.loss, Settings.of(job.config.train)
        self._rows, self._indices, self._reference = job.rows, batch.indices, job.reference
        self.step = _step(
            job, job.rows, batch.indices, divergence=objective.mismatched, on_device=job.is_late
        )
        self._sums: list[Tensor] = []
        device = job.network.lm_head.weight.device
        self._none = torch.zeros(6, device=device)  # the sums of a rank without a pack

    def __call__(self, network: Llama, pack: Pack) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and a vector of the targets which has each row's loss at its first target."""
        if pack.sides is None:  # of a rank without rows
            return pack_losses(network, pack)
        logps, everything = answer_logps(network, pack)
        numbers, slot = np.unique(pack.rows, return_inverse=True)
        start = self._reference.of(self._rows, self._indices[numbers])
        answers = _answers(logps, everything, pack, slot, start)
        judged = self._loss(answers, self._settings, self.step)
        self._sums.append(_preference_sums(judged).detach())
        _, first = np.unique(np.repeat(pack.rows, pack.counts), return_index=True)
        each = torch.zeros(len(pack.targets), dtype=judged.loss.dtype, device=judged.loss.device)
        return judged.loss.sum(), each.index_copy(0, uploaded(first, each.device), judged.loss)

    def sums(self) -> Tensor:
        """What `event` needs of the passes, (7,), where they were computed."""
        sums = torch.stack(self._sums or [self._none]).sum(0)
        kl = self.step.kl
        last = kl.to(sums.dtype).view(1) if isinstance(kl, Tensor) else sums.new_full((1,), kl)
        return torch.cat([sums, last])

    def event(self, job: TrainContext, step: int, sums: Sequence[float]) -> Preferences:
        """The means of all ranks over the step's rows, as they were before its change."""
        return _event(step, "train", job.ranks.all_reduce_sum(sums[:6]), kl=sums[6])


def measure(job: TrainContext, step: int, advance: Advance) -> tuple[float, float]:
    """(loss at the starting point, loss now) of the held-out rows, without smoothing of labels."""
    objective, heldout = OBJECTIVES[job.config.train.method], job.data.heldout
    assert objective.loss is not None
    assert job.reference is not None
    settings = Settings.of(job.config.train).measuring
    indices = np.arange(len(heldout))
    start = job.reference.of(heldout, indices)
    now = measured(job.network, job.heldout, len(heldout), job.ranks, advance)
    counts = np.full((len(heldout), 2), np.nan)
    for pack in job.heldout:
        assert pack.sides is not None
        counts[pack.rows, pack.sides.astype(np.int64)] = answer_tokens(pack)
    constants = _step(job, heldout, indices, divergence=objective.mismatched)

    def judge(values: Values, step: Step) -> Judged:
        assert objective.loss is not None
        columns = (
            values[:, 0],
            values[:, 1],
            counts[:, 0],
            counts[:, 1],
            start[:, 0],
            start[:, 1],
            values[:, 2],
        )
        tensors = (torch.from_numpy(np.ascontiguousarray(column)) for column in columns)
        answers = Answers(*tensors)
        return objective.loss(replace(answers, nll=answers.nll.nan_to_num()), settings, step)

    before, after = judge(start, replace(constants, kl=0.0)), judge(now, constants)
    event = _event(step, "heldout", _preference_sums(after).tolist(), kl=float(constants.kl))
    longer = counts[:, 0] - counts[:, 1]
    paired = np.isfinite(longer)

    def share(values: Values, where: NDArray[np.bool_], sign: NDArray[Any]) -> float | None:
        means = values[where, :2] / counts[where]
        return float(((means[:, 0] - means[:, 1]) * sign[where] > 0).mean()) if where.any() else None

    uneven, ones = paired & (longer != 0), np.ones(len(heldout))
    job.observe(
        replace(
            event,
            prefers=[share(start, paired, ones), share(now, paired, ones)],
            prefers_longer=[share(start, uneven, longer), share(now, uneven, longer)],
        )
    )
    return float(before.loss.mean()), float(after.loss.mean())


def _step(
    job: TrainContext,
    rows: TokenDataset,
    indices: NDArray[np.int64],
    *,
    divergence: bool,
    on_device: bool = False,
) -> Step:
    """What the losses of the rows at `indices` take from all of them. Every rank computes the same. The divergence
    stays on the device, if `on_device`.
    """
    stored = rows.to_pack
    all_rows = [stored.row(int(index)) for index in indices]
    answers = sum(
        bool((marks_of(marks) & side).any()) for _, marks in all_rows for side in (CHOSEN, REJECTED)
    )
    tokens = sum(
        int(np.count_nonzero(document_marks[1:] >= OF_PROMPT))
        for row in all_rows
        for is_rejected, _, document_marks in documents_of(*row)
        if not is_rejected
    )
    kl: float | Tensor = 0.0
    if divergence:
        assert job.reference is not None
        flat, longest = rows.flat, job.data.renderer.contract.max_length
        places = [rows.place(int(index)) for index in indices]
        others = [flat.row((place + 1) % len(flat.numbers)) for place in places]
        packs = job.packer.packs(
            [mismatched(row, other, longest) for row, other in zip(all_rows, others, strict=True)]
        )
        start = job.reference.values[places, 3]
        if on_device:
            kl = mean_log_ratio(job.network, packs, start, job.ranks).clamp(min=0)
        else:
            now = measured(job.network, packs, len(indices), job.ranks)[:, 0]
            kl = max(0.0, float((now - start).mean()))
    return Step(kl, len(indices) / max(1, tokens), len(indices) / max(1, answers))


def _answers(
    logps: Tensor, everything: Tensor, pack: Pack, slot: NDArray[np.int64], start: Values
) -> Answers:
    """The answers of a pack by row; `slot` (documents,) is the row of each document, `start` (rows, ...)."""
    assert pack.sides is not None
    device = logps.device
    where = uploaded(slot, device), uploaded(pack.sides.astype(np.int64), device)
    size = (len(start), 2)
    values = torch.full(size, torch.nan, dtype=logps.dtype, device=logps.device).index_put(where, logps)
    tokens = uploaded(answer_tokens(pack), device, logps.dtype)
    counts = torch.full_like(values, torch.nan).index_put(where, tokens)
    first = uploaded(start, device, logps.dtype)
    nll = torch.zeros_like(values).index_put(where, everything)[:, 0]
    return Answers(values[:, 0], values[:, 1], counts[:, 0], counts[:, 1], first[:, 0], first[:, 1], nll)


def _preference_sums(judged: Judged) -> Tensor:
    """(6,): rows of two answers, those in order, good answers, their rewards, bad answers, their rewards.

    A single answer is in order where the reward of a good one is above 0, or that of a bad one below.
    """
    good, bad = judged.chosen_reward, judged.rejected_reward
    has_good, has_bad = ~good.isnan(), ~bad.isnan()
    in_order = good.nan_to_num() > bad.nan_to_num()
    values = (has_good | has_bad, in_order, has_good, good.nan_to_num(), has_bad, bad.nan_to_num())
    return torch.stack([value.to(good.dtype).sum() for value in values])


def _event(step: int, rows: str, sums: Sequence[float], *, kl: float) -> Preferences:
    num_rows, in_order, num_good, good, num_bad, bad = sums
    chosen, rejected = good / num_good if num_good else None, bad / num_bad if num_bad else None
    margin = chosen - rejected if chosen is not None and rejected is not None else None
    return Preferences(step, rows, margin, in_order / max(1.0, num_rows), chosen, rejected, kl)

"""What each answer of a run costs the base model with its question and without it, for `lorafit rows --second-pass`.

A question that does not make its answer likelier may be another answer's question (the instruction-following
difficulty of Li et al., "From Quantity to Quality", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.data.build import TrainingData
from lorafit.data.contract import RAW
from lorafit.data.packing import Packer, TokenRow
from lorafit.data.token_dataset import TokenDataset
from lorafit.forward import pack_losses
from lorafit.infer.model import Model, load
from lorafit.model.llama import Llama
from lorafit.model.lora import disable_adapter, evaluating
from lorafit.observe.answer_losses import AnswerLosses, Losses, write_answer_losses
from lorafit.observe.progress import progress
from lorafit.report.rows_of_run import config_of_answers, page_values
from lorafit.run_dir import RunDirectory

AT_ONCE = 1024  # rows that are packed together


def second_pass(run: RunDirectory, data: TrainingData, quiet: bool = False) -> AnswerLosses:
    """The losses of the answers of all rows of `run`, kept in its directory for the list and the page.

    Raises a LorafitError.
    """
    hint = "`lorafit rows RUN` without --second-pass shows the loss of each row"
    config = config_of_answers(run, hint)
    model = load(run.path)
    packer = Packer(config.train.micro_batch_tokens, config.data.packing)
    losses = answer_losses(model.network, data.encoded, before_answers(model), packer, quiet)
    write_answer_losses(run.answer_losses_file, losses, data.digest())
    run.write_json(run.row_list_file, page_values(run, data))
    return losses


def before_answers(model: Model) -> Sequence[int]:
    """The ids that stand before an answer whose question is empty."""
    if model.renderer.contract.template == RAW:
        bos = model.renderer.contract.bos_id
        return [] if bos is None else [bos]
    return model.prompt_ids("")


def answer_losses(
    network: Llama, rows: TokenDataset, before: Sequence[int], packer: Packer, quiet: bool
) -> AnswerLosses:
    """The losses of `rows` by the base of `network`. The pieces of a text that was split are one row."""
    found: list[tuple[Losses, ...]] = []
    total = len(rows)
    with (
        evaluating(network),
        disable_adapter(network),
        torch.inference_mode(),
        progress("reading each answer with its question and without it", quiet=quiet) as advance,
    ):
        for start in range(0, total, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, total))
            whole = [_unweighted(rows.row(number)) for number in numbers]
            halves = []
            for done, part in enumerate((whole, [_without_question(row, before) for row in whole])):
                halves.append(_losses(network, part, packer))
                advance(2 * start + (done + 1) * len(numbers), 2 * total)
            (asked, end), (alone, _) = halves
            has_question = np.array([bool(len(ids)) and not trained[:2].any() for ids, trained in whole])
            found.append((asked, np.where(has_question, alone, np.nan), end))
    asked, alone, end = (
        (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else [np.empty(0)] * 3
    )
    return _by_row(rows.numbers, asked, alone, end)


def _losses(network: Llama, rows: Sequence[TokenRow], packer: Packer) -> tuple[Losses, Losses]:
    """(mean loss of the targets but the last, loss of the last one) of each row, both (rows,)."""
    body, end = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for pack in packer.packs(rows):
        parts = pack_losses(network, pack)[1].double().cpu().numpy()
        for row, losses in zip(pack.rows, np.split(parts, pack.counts.cumsum()[:-1]), strict=True):
            if len(losses):
                body[row], end[row] = losses[:-1].mean() if len(losses) > 1 else losses[0], losses[-1]
    return body, end


def _unweighted(row: TokenRow) -> TokenRow:
    ids, trained = row
    return ids, trained != 0


def _without_question(row: TokenRow, before: Sequence[int]) -> TokenRow:
    """The row from its first trained token on, after `before`."""
    ids, trained = row
    first = int(trained.argmax())
    head = np.array(before, ids.dtype)
    return np.concatenate([head, ids[first:]]), np.concatenate(
        [np.zeros(len(head), np.bool_), trained[first:]]
    )


def _by_row(numbers: NDArray[np.int64], *values: Losses) -> AnswerLosses:
    """The means over the pieces of each row."""
    rows, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return AnswerLosses(
        rows.astype(np.int64), *(np.bincount(place, one, len(rows)) / counts for one in values)
    )

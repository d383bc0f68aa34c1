"""Checks of the loaded model beside its rows: a stop token that was never trained, and answers that it would not give.

A row of a table that training has reached is unlike every other one. A row of zeros, or one that equals that of another
token to the bit, is as it was made. A row that was made from random numbers cannot be told from a trained one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.config.load import override_words
from lorafit.config.schema import Config
from lorafit.data.build import TrainingData
from lorafit.data.packing import Packer
from lorafit.errors import CheckResult
from lorafit.forward import answer_logps, answer_tokens
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating
from lorafit.redact import shell
from lorafit.report.row_list import robust_deviations

_NUM_ROWS = 64  # that are looked at
_FEW = 1e-6  # of the usual size of a row's largest number: below, a row is zero
_FIRST = 8  # columns that are compared before the whole rows
_FAR = 3.5  # robust standard deviations


def stop_token_verdicts(config: Config, training_data: TrainingData, network: Llama) -> list[CheckResult]:
    """Whether the stop tokens that end the answers of the rows have trained rows in the tables of the model."""
    rows, stops = training_data.training, set(training_data.renderer.contract.stop_ids)
    seen: set[int] = set()
    for index in range(min(_NUM_ROWS, len(rows))):
        ids, trained = rows.row(index)
        seen |= stops & set(ids[trained > 0].tolist())
    if config.lora.save_modules or not seen:
        return []
    tables = {"embedding": network.decoder.embed_tokens.weight, "head": network.lm_head.weight}
    if network.arch.tie_word_embeddings:
        del tables["head"]
    found = []
    for token in sorted(seen):
        text = training_data.tokenizer.decode([token])
        if text in config.lora.tokens:
            continue
        for name, table in tables.items():
            if (why := _never_trained(table.detach(), token)) is None:
                continue
            message = f"the row of `{text}` in the {name} was never trained: it {why}"
            word = shell(*override_words({"lora.tokens": [*config.lora.tokens, text]}))
            hint = f"{word} trains it; else answers may not end"
            found.append(CheckResult("stop token rows", "warn", message, "model.name", hint))
            break
    return found or [CheckResult("stop token rows", "pass", "its rows are unlike those of all other tokens")]


def _never_trained(table: Tensor, token: int) -> str | None:
    """Why the row of `token` in `table` (vocab_size, hidden_size) is as it was made; None where it is not."""
    row = table[token]
    usual = table[:: max(1, len(table) // 256)].abs().amax(1).float().median()
    if float(row.abs().max()) <= _FEW * float(usual):
        return "is zero"
    alike = (table[:, :_FIRST] == row[:_FIRST]).all(1).cpu().nonzero()[:, 0].tolist()
    other = next((one for one in alike if one != token and torch.equal(table[one], row)), None)
    return None if other is None else f"equals that of token {other}"


def answer_verdicts(config: Config, training_data: TrainingData, network: Llama) -> list[CheckResult]:
    """Whether the answers of the first preferences are ones that the model could give; none for other rows."""
    if config.train.method == "sft":
        return []
    rows, training = training_data.training.to_pack, training_data.training
    count = min(_NUM_ROWS, len(training))
    losses: list[float] = []
    owners: list[int] = []
    packer = Packer(config.train.micro_batch_tokens, config.data.packing)
    with evaluating(network), torch.inference_mode():
        for pack in packer.packs([rows.row(index) for index in range(count)]):
            logps, _ = answer_logps(network, pack)
            losses += (-logps.double().cpu().numpy() / answer_tokens(pack)).tolist()
            owners += pack.rows.tolist()
    far = sorted({owners[at] for at in np.flatnonzero(never_given(np.array(losses)))})
    name = "likely answers"
    if not far:
        return [CheckResult(name, "pass", f"none of {len(losses):,} is far less likely than the others")]
    places = ", ".join(training_data.place(row) for row in far[:5]) + (" ..." if len(far) > 5 else "")
    message = f"the model would never give answers of {len(far):,} of {count:,} rows: {places}"
    hint = "teach it such answers first (train.method=sft), or take others: nothing is learned from them"
    return [CheckResult(name, "warn", message, "data.path", hint)]


def never_given(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of some answers are far less likely than the others, by their losses per token, (answers,).

    Far is more than 3.5 of the units that `lorafit rows` uses above the median: 5.2 nats per token or more. Then each
    token is 180 times less likely than those of the usual answer.
    """
    above = losses - np.median(losses)
    return robust_deviations(above, np.median(np.abs(above))) > _FAR

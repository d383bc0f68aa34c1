"""Which training rows push an answer: the similarity of their gradients and that of the answer.

A step on a row changes the loss of the answer by the product of both gradients, to first order. The score of a row is
the cosine between them, over all trained tensors of all adapted linears: 1 pushes toward the answer as a step on the
answer itself would, 0 does not change it, and below 0 pushes away from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.data.build import TrainingData
from lorafit.data.content import Instruction
from lorafit.data.formats import Row
from lorafit.data.packing import Pack, Packer, TokenRow, build_pack
from lorafit.data.prompt import Rendered
from lorafit.data.token_dataset import TokenDataset
from lorafit.errors import DataError, Problem
from lorafit.forward import document_sums, pack_losses
from lorafit.infer.model import Model, load
from lorafit.infer.sampling import Sampling
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating
from lorafit.model.row_gradients import See, each_document
from lorafit.observe.progress import progress
from lorafit.report.rows_of_run import config_of_answers, data_of
from lorafit.run_dir import MAX_JSON, RunDirectory
from lorafit.storage.atomic import read_facts, write_file
from lorafit.storage.safe_read import read_json

Advance = Callable[[int, int], None]
MOST_KEPT = 20  # explained answers of a run


@dataclass(frozen=True, slots=True)
class Why:
    """An answer, its tokens with the prompt, its loss per token, and all training rows, those that push it most first.

    `pushes` counts a text that was split once, by its best piece.
    """

    answer: str
    tokens: TokenRow
    loss: float
    data: TrainingData
    pushes: Sequence[Push]


@dataclass(frozen=True, slots=True)
class Push:
    """What one row does to the answer: its number over all sources, the score (-1 to 1) and its loss per token."""

    number: int
    score: float
    loss: float


def explain(run: RunDirectory, prompt: str, answer: str | None, max_tokens: int, quiet: bool = False) -> Why:
    """Why the tuned model of `run` answers `prompt` with `answer`, by default its greedy one of at most `max_tokens`.

    Raises a LorafitError.
    """
    hint = "`lorafit why` reads runs that learn answers; `lorafit rows RUN` shows the loss of each row"
    config = config_of_answers(run, hint)
    data = data_of(run, quiet)
    rows = data.training
    if data.was_refit(read_facts(run.newest_adapter())):
        rows = data.with_all_rows().training
    model = load(run.path)
    if answer is None:
        answer, tokens = greedy(model, prompt, max_tokens)
    else:
        tokens = given(model, prompt, answer)
    model.network.recompute = config.train.recompute == "layers"
    packer = Packer(config.train.micro_batch_tokens, config.data.packing, may_share=False)
    loss = mean_loss(model.network, tokens)
    with progress("comparing the rows", quiet=quiet) as advance:
        return Why(answer, tokens, loss, data, pushes(model.network, tokens, rows, packer, advance))


def keep_for_page(run: RunDirectory, explained: Mapping[str, Any]) -> None:
    """Add an explained answer to those that the page of the run shows, in place of an earlier one of the same words.

    The newest MOST_KEPT stay. Raises RunError where the file cannot be written.
    """
    try:
        read = read_json(run.why_file, MAX_JSON)
    except (OSError, ValueError):
        read = []
    words = (explained["prompt"], explained["answer"])
    kept = [
        one
        for one in (read if isinstance(read, list) else [])
        if isinstance(one, dict) and (one.get("prompt"), one.get("answer")) != words
    ]
    write_file(run.why_file, json.dumps([*kept, explained][-MOST_KEPT:], ensure_ascii=False, indent=1) + "\n")


def greedy(model: Model, prompt: str, max_tokens: int) -> tuple[str, TokenRow]:
    """The greedy answer to `prompt`, and both as tokens with the answer supervised. Raises a LorafitError."""
    ids = model.prompt_ids(prompt)
    answer = [token for _, token in model.tokens([model.request(ids, max_tokens, Sampling())])]
    text = [token.id for token in answer if token.end != "stop"]
    row = np.array([*ids, *(token.id for token in answer)], np.uint32)
    return model.renderer.tokenizer.decode(text, skip_special=True).strip(), (
        row,
        np.arange(len(row)) >= len(ids),
    )


def given(model: Model, prompt: str, answer: str) -> TokenRow:
    """The tokens of `prompt` and `answer` as a training row, with the answer supervised. Raises DataError."""
    (rendered,) = model.renderer.render_batch([Row(0, "the answer", Instruction(prompt, "", answer))])
    if isinstance(rendered, Problem):
        raise DataError.of([rendered])
    if not isinstance(rendered, Rendered):
        raise DataError(rendered.reason, place="the answer", hint="give another --answer")
    longest = model.network.arch.max_position_embeddings
    if len(rendered.ids) > longest:
        message = f"prompt and answer have {len(rendered.ids):,} tokens, the model reads at most {longest:,}"
        raise DataError(message, hint="shorten them")
    start = len(model.prompt_ids(prompt))
    return np.array(rendered.ids, np.uint32), np.array(rendered.trained) & (
        np.arange(len(rendered.ids)) >= start
    )


def pushes(
    network: Llama, answer: TokenRow, rows: TokenDataset, packer: Packer, advance: Advance
) -> list[Push]:
    """All rows, those that push the answer most first. A text that was split is named once, by its best piece.

    `packer` must not merge prefixes: a gradient of a shared token is of several rows.
    """
    target: dict[str, Tensor] = {}

    def keep(document: int, name: str, gradient: Tensor) -> None:
        target[name] = gradient.clone()

    pack_gradients(network, build_pack([answer]), keep)
    own = _Sums(target, 1)
    for name, gradient in target.items():
        own.add(0, name, gradient)
    best: dict[int, Push] = {}
    packs = packer.packs([rows.row(index) for index in range(len(rows))])
    for done, pack in enumerate(packs, 1):
        sums = _Sums(target, len(pack.lengths))
        losses = pack_gradients(network, pack, sums.add)
        weights = np.ones(len(pack.targets)) if pack.weights is None else pack.weights
        tokens = document_sums(torch.from_numpy(weights), pack)
        scores = (sums.products / (sums.squares * own.squares).sqrt()).nan_to_num().tolist()
        for row, score, loss in zip(
            pack.rows.tolist(), scores, (losses.cpu() / tokens).tolist(), strict=True
        ):
            push = Push(rows.number(row), score, loss)
            if push.number not in best or best[push.number].score < score:
                best[push.number] = push
        advance(done, len(packs))
    return sorted(best.values(), key=lambda push: (-push.score, push.number))


def mean_loss(network: Llama, answer: TokenRow) -> float:
    """The loss of an answer per token."""
    with evaluating(network), torch.inference_mode():
        return float(pack_losses(network, build_pack([answer]))[1].mean())


class _Sums:
    """The products with the gradient of the answer, and the squares, of each document: (documents,)."""

    def __init__(self, target: dict[str, Tensor], documents: int) -> None:
        self._target = target
        like = next(iter(target.values()))
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self.products, self.squares = like.new_zeros(2, documents, dtype=dtype)

    def add(self, document: int, name: str, gradient: Tensor) -> None:
        self.products[document] += torch.dot(gradient.flatten(), self._target[name].flatten())
        self.squares[document] += torch.dot(gradient.flatten(), gradient.flatten())


def pack_gradients(network: Llama, pack: Pack, see: See) -> Tensor:
    """The loss of each document of `pack` (documents,); `see` gets the gradients of each, without dropout."""
    with (
        evaluating(network),
        torch.enable_grad(),
        each_document(network, pack.lengths, pack.counts.tolist(), see),
    ):
        total, parts = pack_losses(network, pack)
        total.backward()
    return document_sums(parts.detach(), pack)

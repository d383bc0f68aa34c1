"""What a run taught: whether the rows' questions are answered as the rows answer them, and one sentence about it.

A greedy answer equals the answer of a row exactly where each of its tokens is the most probable one after those
before it. One pass over the row shows that, so nothing is generated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.config.auto import LONGEST_FACT
from lorafit.data.build import TrainingData
from lorafit.data.packing import Packer, TokenRow
from lorafit.data.token_dataset import TokenDataset
from lorafit.forward import pack_predictions
from lorafit.model.llama import Llama
from lorafit.model.lora import disable_adapter, evaluating
from lorafit.observe.events import Learned, LearnedLevel, Observer, Progress
from lorafit.observe.units import count

MOST_ROWS = 100
MOST_TRAINED_TOKENS, MOST_HELDOUT_TOKENS = 4096, 1024  # seconds on a CPU, also of a large model
SHORT_ANSWER = LONGEST_FACT  # characters; longer answers are rarely repeated word for word
LONGER = "train longer"
KNOWN, HALF, SOME = 0.9, 0.5, 0.1  # shares of the questions
# of the loss of the base: what is left after training
PART_LEFT, LEARNED_LEFT, LITTLE_LEFT, WORSE = 0.75, 0.95, 0.98, 1.03


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows of one kind. `questions` is how many have a question, `asked` how many of them were asked, `before` and
    `after` how many of these the base and the adapter answer word for word. The losses are means over the answers'
    tokens of the rows that were read; `answer_characters` is the median length of an answer.
    """

    questions: int
    asked: int
    before: int
    after: int
    base_loss: float
    loss: float
    answer_characters: int

    @property
    def share(self) -> float:
        """The share of the questions asked that the adapter answers."""
        return self.after / self.asked if self.asked else 0.0


def what_was_learned(
    network: Llama,
    data: TrainingData,
    packer: Packer,
    *,
    step: int,
    losses: tuple[float | None, float | None],
    longer: str,
    observe: Observer,
) -> Learned:
    """Ask some trained and some held-out rows with and without the adapter, which is that of `step`.

    `losses` are the held-out losses of base and adapter, `longer` says how to train longer.
    """
    halves = ((data.training, MOST_TRAINED_TOKENS), (data.heldout, MOST_HELDOUT_TOKENS))
    asked = []
    for done, (rows, most_tokens) in enumerate(halves):
        observe(Progress("asking trained and held-out rows", done, len(halves)))
        asked.append(ask(network, data, rows, packer, most_tokens))
    level, text = verdict(asked[0], asked[1], losses, longer)
    counts = {name: asdict(one) for name, one in zip(("trained", "heldout"), asked, strict=True) if one}
    return Learned(step, level, text, counts)


def tokens_asked(data: TrainingData) -> float:
    """About the tokens that `what_was_learned` reads with the base, and once more with the adapter."""
    halves = ((data.training.lengths, MOST_TRAINED_TOKENS), (data.heldout.lengths, MOST_HELDOUT_TOKENS))
    tokens: float = sum(
        min(float(most), float(lengths.mean()) * min(MOST_ROWS, len(lengths)))
        for lengths, most in halves
        if len(lengths)
    )
    return tokens


def ask(
    network: Llama, data: TrainingData, rows: TokenDataset, packer: Packer, most_tokens: int
) -> Asked | None:
    """What base and adapter say to rows that are evenly spread over `rows`; None where there are none."""
    chosen = _spread(np.flatnonzero((rows.truncated == 0) & (rows.lengths <= most_tokens)), rows, most_tokens)
    if not len(chosen):
        return None
    # where whole rows are trained, their tokens do not show where the answer begins
    knows_answers = data.renderer.contract.train_on != "all"
    asking = np.isin(rows.numbers, data.index.asking(rows.numbers)) & knows_answers
    stops = np.array(data.renderer.contract.stop_ids)
    answers = [_last_answer(rows.row(int(index)), stops) for index in chosen]
    results = []
    for base in (True, False):
        total, targets, wrong = np.zeros((3, len(chosen)))
        with evaluating(network), disable_adapter(network, when=base), torch.inference_mode():
            for pack in packer.packs(answers):
                found, is_first = pack_predictions(network, pack)
                for sums, values in ((total, found), (targets, np.ones_like(found)), (wrong, ~is_first)):
                    np.add.at(sums, np.repeat(pack.rows, pack.counts), values)
        results.append((total.sum() / max(1.0, targets.sum()), (wrong == 0) & (targets > 0)))
    (base_loss, before), (loss, after) = results
    is_asked = asking[chosen]
    decode = data.tokenizer.decode
    lengths = [len(decode(ids[trained].tolist(), skip_special=True)) for ids, trained in answers]
    return Asked(
        questions=int(asking.sum()),
        asked=int(is_asked.sum()),
        before=int((before & is_asked).sum()),
        after=int((after & is_asked).sum()),
        base_loss=float(base_loss),
        loss=float(loss),
        answer_characters=int(np.median(lengths)),
    )


def verdict(
    trained: Asked | None,
    heldout: Asked | None,
    losses: tuple[float | None, float | None] = (None, None),
    longer: str = LONGER,
) -> tuple[LearnedLevel, str]:
    """The result in one word and in one sentence. `losses` are the held-out losses of base and adapter."""
    if trained is None:
        return _by_loss("held-out", *losses, longer)
    base, now = losses
    rose = base is not None and now is not None and now > WORSE * base
    others = f"; the held-out loss rose from {base:.3f} to {now:.3f}" if rose else ""
    fell = f"loss {trained.base_loss:.3f} -> {trained.loss:.3f}"
    if trained.asked and trained.share >= KNOWN:
        known = trained.before >= KNOWN * trained.asked
        what = "The base model answers your rows already" if known else "It learned your rows"
        return "learned", f"{what}: {answered(trained, heldout)}{others}"
    if not trained.asked or trained.answer_characters > SHORT_ANSWER:
        level, text = _by_loss("trained", trained.base_loss, trained.loss, longer)
        if level == "learned" and rose:
            return "partly", f"{text}{others}: fewer epochs or a lower train.learning_rate"
        if level == "learned" and base is not None and now is not None:
            text += f", that of held-out rows from {base:.3f} to {now:.3f}"
        return level, text
    said = f"{answered(trained, heldout)}, {fell}{others}"
    if trained.loss >= trained.base_loss:
        return "nothing", f"It learned nothing: {said}: lower train.learning_rate"
    if trained.share >= HALF:
        return "partly", f"It learned most of your rows: {said}: {longer}"
    if trained.share >= SOME or trained.loss <= PART_LEFT * trained.base_loss:
        return "partly", f"It learned a part of your rows: {said}: {longer}"
    return "nothing", f"It learned almost nothing: {said}: {longer}"


def answered(trained: Asked, heldout: Asked | None) -> str:
    """`52 of 54 questions of the trained rows are answered word for word (0 before), 4 of 6 held-out ones (0)`."""
    of = f"{count(trained.asked, 'question')} of the trained rows"
    if trained.asked < trained.questions:
        of = f"{trained.asked:,} asked of the {trained.questions:,} questions of the trained rows"
    verb = "is" if trained.asked == 1 else "are"
    text = f"{trained.after:,} of {of} {verb} answered word for word ({trained.before:,} before)"
    if heldout is not None and heldout.asked:
        ones = "held-out ones" if heldout.asked == heldout.questions else "asked held-out ones"
        text += f", {heldout.after:,} of {heldout.asked:,} {ones} ({heldout.before:,})"
    return text


def _by_loss(kind: str, base: float | None, loss: float | None, longer: str) -> tuple[LearnedLevel, str]:
    if base is None or loss is None:
        return "unknown", "What it learned is not known: no row was measured"
    fell = f"the loss of {kind} rows fell from {base:.3f} to {loss:.3f}"
    if loss >= base:
        text = f"It learned nothing: the loss of {kind} rows is {loss:.3f}, and was {base:.3f}"
        return "nothing", f"{text}: lower train.learning_rate"
    if loss <= LEARNED_LEFT * base:
        return "learned", f"It learned from your rows: {fell}"
    if loss <= LITTLE_LEFT * base:
        return "partly", f"It learned a little: {fell}: {longer}"
    return "nothing", f"It learned almost nothing: {fell}: {longer}"


def _spread(usable: NDArray[np.intp], rows: TokenDataset, most_tokens: int) -> NDArray[np.intp]:
    """Some of `usable`, evenly spread, with about `most_tokens` tokens at most."""
    if not len(usable):
        return usable
    most = min(MOST_ROWS, max(1, int(most_tokens / rows.lengths[usable].mean())))
    return usable[np.linspace(0, len(usable) - 1, min(most, len(usable))).round().astype(np.intp)]


def _last_answer(row: TokenRow, stops: NDArray[np.int64]) -> TokenRow:
    """The ids of a row, and which of them are its last answer up to the first stop token."""
    ids, trained = row[0], row[1] > 0
    ends = np.flatnonzero(trained)
    if not len(ends):
        return ids, trained
    breaks = np.flatnonzero(~trained[: ends[-1]])
    first = int(breaks[-1]) + 1 if len(breaks) else 0
    is_stop = np.flatnonzero(np.isin(ids[first : ends[-1] + 1], stops))
    last = first + int(is_stop[0]) if len(is_stop) else int(ends[-1])
    answer = np.zeros_like(trained)
    answer[first : last + 1] = True
    return ids, answer

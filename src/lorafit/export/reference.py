"""The live adapter's answers to fixed prompts and its loss on rows of the run, which an export must keep.

Our own engine computes both, and for types without blocks also how much rounding changes them; export/parity.py
compares them with the results of the program that reads the export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.data.formats import Message
from lorafit.errors import DataError, RunError
from lorafit.export.chat_template import written_prompt
from lorafit.export.rows import RowTexts, Text
from lorafit.export.run_source import RunSource
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.model.attention import PackedDocuments
from lorafit.model.build import build_saved
from lorafit.model.linear import Frozen, LowRank, replace_module, with_low_rank
from lorafit.model.llama import MLP, Llama, capped
from lorafit.model.lora import LoraLinear
from lorafit.model.lora_linear import GegluInput
from lorafit.model.memory import available_bytes
from lorafit.model.saved_adapter import HEAD
from lorafit.verify.logits import largest

MAX_PROMPTS, MAX_TOKENS = 6, 16
FIXED_PROMPTS = ("What is the capital of France?", "라마가 뭐야? 🦙", "Write  two lines:\n\n1. one\n2. two")
_ROUNDED_IN = 2  # texts that are scored in the time in which all weights are rounded
FLOOR = -60.0  # log-probabilities below count as this one

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to an answer, its rendered text and ids."""

    messages: tuple[Message, ...]
    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Prompt(Question):
    """A question, and the greedy answer of the live adapter with its stop token, if any."""

    answer: list[int]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a program rounds: `weights(name, merged weight)`, and the `inputs` of each product (None: not rounded).

    `by_weight` has other roundings of inputs, by the name of the weight. If not `is_merged`, the adapter is added to
    products, and what it reads is not rounded. `activation` is computed in the place of the network's own. `most` is
    the largest relative change of a weight, in root mean squares; more is an error.
    """

    weights: Callable[[str, Tensor], Tensor] = lambda name, weight: weight.float()
    inputs: Callable[[Tensor], Tensor] | None = None
    most: float = 0.0
    by_weight: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    is_merged: bool = True
    activation: GegluInput | None = None

    def inputs_of(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """How the inputs of the products with the weight `name` are rounded."""
        return self.by_weight.get(name, self.inputs)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each token to score, text by text: its log-probability `scored` (tokens,), the most probable token `best`
    (tokens,) and that one's log-probability `best_scored` (tokens,). `first` (vocab_size,) are the log-probabilities
    of the first token of the first answer.
    """

    scored: Tensor
    best: Tensor
    best_scored: Tensor
    first: Tensor

    def difference(self, other: Scores) -> float:
        """The largest difference of a log-probability."""
        pairs = ((self.scored, other.scored), (self.first, other.first))
        return max(largest(a.clamp(min=FLOOR) - b.clamp(min=FLOOR)) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Reference:
    """Prompts with answers, rows, and the live adapter's scores of them: the answers first, then the rows.

    `rounded` are the scores of our engine with rounded numbers, None for types with blocks; `arithmetic` is the type of
    the products. `is_exact`: the program that reads the export rounds nothing else, so it must compute `rounded`.
    `spread` is from the lowest logit to the highest. `importance` is as in RunSource.
    """

    prompts: Sequence[Prompt]
    rows: RowTexts
    live: Scores
    rounded: Scores | None
    arithmetic: str
    is_exact: bool
    spread: float
    importance: Mapping[str, Tensor]

    @property
    def texts(self) -> list[Text]:
        """Every text to score."""
        return [*map(_of_answer, self.prompts), *self.rows.texts]

    @property
    def num_answered(self) -> int:
        """How many of the scored tokens are those of the answers."""
        return sum(len(prompt.answer) for prompt in self.prompts)


def make_reference(
    source: RunSource,
    rows: RowTexts,
    rounding: Rounding | None,
    longest: int,
    progress: Advance,
    calibration: Sequence[Text] = (),
) -> Reference:
    """Scores of the live adapter, in float32 if memory allows: of its answers to the run's first held-out prompts and
    fixed ones, and of `rows`. The importance of columns is measured on the texts of `calibration`.

    A prompt and its answer have at most `longest` tokens. Raises DataError if no prompt is so short.
    """
    questions = questions_of(source, longest)
    arithmetic = arithmetic_of(source)
    network, _ = build_saved(source.base.path, source.adapter, "cpu", arithmetic)
    number = len(questions) + len(rows.texts)
    roundings = _ROUNDED_IN * (rounding is not None)
    steps = len(questions) + number + (number + roundings if roundings else 0) + len(calibration)

    def after(start: int) -> Callable[[int], None]:
        return lambda done: progress(start + done, steps)

    prompts = _answered(source, network, questions, after(0))
    texts = [*map(_of_answer, prompts), *rows.texts]
    rounded = None
    with torch.no_grad():
        live, spread = _scores(network, texts, after(len(questions)))
        if rounding is not None:
            start, parts = len(questions) + number, len(source.weights)
            _round(source, network, rounding, lambda done: after(start)(roundings * done // parts))
            head = HEAD if f"{HEAD}.weight" in source.weights else source.arch.embedding
            inputs = rounding.inputs_of(f"{head}.weight")
            rounded, _ = _scores(network, texts, after(start + roundings), inputs)
    importance = _importance(source, network, calibration, after(steps - len(calibration)))
    rounds_inputs = rounding is None or rounding.inputs is not None or bool(rounding.by_weight)
    is_exact = not rounds_inputs and arithmetic == "float32"
    return Reference(prompts, rows, live, rounded, arithmetic, is_exact, spread, importance)


def arithmetic_of(source: RunSource) -> str:
    """float32 if the base fits into memory in it, else the base's own type."""
    free = available_bytes(torch.device("cpu"))
    if free is None or 4.5 * source.arch.num_parameters < free:
        return "float32"
    is_narrow = source.dtype != torch.bfloat16 and source.arch.family.fits_float16
    return "float16" if is_narrow else "bfloat16"


def questions_of(source: RunSource, longest: int) -> list[Question]:
    """Conversations of one question that leave room for an answer. Raises DataError if there is none."""
    samples: list[str] = []
    if source.run.samples_file.is_file():
        samples = [str(sample["prompt"]) for sample in source.run.read_json(source.run.samples_file)]
    room = longest - MAX_TOKENS
    questions: list[Question] = []
    for question in dict.fromkeys([*samples[: MAX_PROMPTS - len(FIXED_PROMPTS)], *FIXED_PROMPTS]):
        messages = (Message("user", question),)
        try:
            ids = source.renderer.prompt_ids(messages)
        except DataError:  # the template refuses it
            continue
        # programs differ in the tokens of characters outside of the vocabulary
        if 0 < len(ids) < room and source.renderer.tokenizer.unknown_id not in ids:
            questions.append(Question(messages, written_prompt(source.renderer, messages), ids))
    if not questions:
        raise DataError(
            f"no prompt can be compared: each is longer than {longest} tokens, or has characters outside of the "
            "tokenizer's vocabulary, which programs treat differently",
            hint="train with a template that the tokenizer knows, or use --no-verify: the export records it",
        )
    return questions


def _answered(
    source: RunSource, network: Llama, questions: Sequence[Question], progress: Callable[[int], None]
) -> list[Prompt]:
    """The questions with their greedy answers, which are generated together."""
    stops = frozenset(source.contract.stop_ids)
    answers: list[list[int]] = [[] for _ in questions]
    ended = 0
    requests = [Request(question.ids, stops, MAX_TOKENS) for question in questions]
    for index, token in generate_tokens(network, requests):
        answers[index].append(token.id)
        if token.end:
            progress(ended := ended + 1)
    return [
        Prompt(one.messages, one.text, one.ids, answer)
        for one, answer in zip(questions, answers, strict=True)
    ]


def _of_answer(prompt: Prompt) -> Text:
    whole = [*prompt.ids, *prompt.answer]
    return Text(whole, range(len(prompt.ids), len(whole)))


def _scores(
    network: Llama,
    texts: Iterable[Text],
    progress: Callable[[int], None],
    inputs: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Scores, float]:
    """(the scores of `texts`, the spread of the logits)."""
    parts: list[tuple[Tensor, ...]] = []
    first, spread = torch.empty(0), 0.0
    for done, text in enumerate(texts, 1):
        ids, at = torch.tensor(text.ids), torch.tensor(text.positions)
        hidden = network.normed(network.hidden(ids[:-1], PackedDocuments([len(ids) - 1]), at - 1))
        logits = F.linear(hidden if inputs is None else inputs(hidden), network.lm_head.weight)
        logits = capped(logits, network.arch.logits_cap).float()
        rows = logits.log_softmax(-1)
        best = rows.max(-1)
        parts.append((rows.gather(1, ids[at, None])[:, 0], best.indices, best.values))
        first = first if len(first) else rows[0].clone()
        spread = max(spread, float(logits.max() - logits.min()))
        progress(done)
    scored, indices, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(scored, indices, values, first), spread


def _round(
    source: RunSource,
    network: Llama,
    rounding: Rounding,
    progress: Callable[[int], None],
    inputs_of: Callable[[str], Callable[[Tensor], Tensor] | None] | None = None,
) -> None:
    """Replace the network's weights by rounded ones, with the adapter merged into them unless the program adds it.

    They are computed from the live network alone, so that an error of the export is not in them too.
    """
    for done, name in enumerate(source.weights, 1):
        module_name, _, part = name.rpartition(".")
        module = network.get_submodule(module_name)
        weight = None
        if isinstance(module, LoraLinear):
            if not rounding.is_merged:
                module_name += ".base"
            elif part == "weight":
                weight = module.base.dequantize().float() + module.delta()
            module = module.base
        exact: Tensor = getattr(module, part).float() if weight is None else weight
        weight = rounding.weights(name, exact)
        if (change := float((weight - exact).norm() / exact.norm().clamp(min=1e-30))) > rounding.most:
            raise RunError(f"weight `{name}` changes by {change:.1%} when it is rounded to this type")
        weight = weight.to(network.lm_head.weight.dtype)
        if isinstance(module, Frozen) and part == "weight":
            inputs = (inputs_of or rounding.inputs_of)(name)
            replace_module(network, module_name, _Rounded(weight, module.bias, inputs))
        else:
            setattr(module, part, nn.Parameter(weight, requires_grad=False))
        progress(done)
    if rounding.activation is not None:
        for mlp in (module for module in network.modules() if isinstance(module, MLP)):
            mlp.activation = rounding.activation
    if source.arch.tie_word_embeddings:
        network.lm_head.weight = network.decoder.embed_tokens.weight


def importance_of(source: RunSource, calibration: Sequence[Text], progress: Advance) -> Mapping[str, Tensor]:
    """The importance of columns, measured on texts (see RunSource)."""
    network, _ = build_saved(source.base.path, source.adapter, "cpu", arithmetic_of(source))
    return _importance(source, network, calibration, lambda done: progress(done, len(calibration)))


@torch.no_grad()
def _importance(
    source: RunSource, network: Llama, calibration: Sequence[Text], progress: Callable[[int], None]
) -> Mapping[str, Tensor]:
    """The mean square of each input of each linear, over all tokens of the texts; changes the network."""
    if not calibration:
        return {}
    sums: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            squares = x.float().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            return x

        return record

    _round(source, network, Rounding(), lambda done: None, recorder)
    for done, text in enumerate(calibration, 1):
        network.hidden(torch.tensor(text.ids), PackedDocuments([len(text.ids)]))
        progress(done)
    tokens = sum(len(text.ids) for text in calibration)
    # a block whose columns all count nothing would have no scale
    return {name: (total + 1e-6 * total.mean()) / tokens for name, total in sums.items()}


class _Rounded(Frozen):
    """A linear that rounds its input."""

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, inputs: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self._inputs = inputs

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        start = with_low_rank(addend, low, transposed=False, in_place=False)
        out = F.linear(x if self._inputs is None else self._inputs(x), self.weight, self.bias)
        return out if start is None else out.add_(start)

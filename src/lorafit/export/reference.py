"""What the live adapter makes of fixed prompts, and how far its logits move when numbers are rounded as an export's.

Computed by our own engine, so that what another program makes of an export can be held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lorafit.data.formats import Message
from lorafit.errors import DataError, RunError
from lorafit.export.chat_template import written_prompt
from lorafit.export.run_source import RunSource
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.model.attention import PackedDocuments
from lorafit.model.build import build_saved
from lorafit.model.linear import Frozen, LowRank, with_low_rank
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraLinear
from lorafit.model.memory import available_bytes

MAX_PROMPTS, MAX_TOKENS = 6, 16
FIXED_PROMPTS = ("What is the capital of France?", "라마가 뭐야? 🦙", "Write  two lines:\n\n1. one\n2. two")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with the text and ids that it becomes, and the tokens that the live adapter answers with.

    The answer is greedy and holds the stop token, if it came to one.
    """

    messages: tuple[Message, ...]
    text: str
    ids: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a program rounds: `weights` by name and merged number, and what goes `into` each product.

    `most` is how much of a weight it may change, as root mean squares: what is beyond is no rounding.
    """

    weights: Callable[[str, Tensor], Tensor]
    into: Callable[[Tensor], Tensor]
    most: float


@dataclass(frozen=True, slots=True)
class Reference:
    """Prompts and the live adapter's logits: (positions, vocab_size) for the last token of each prompt and its answer.

    `rounded` are those of our engine with numbers rounded as the export's, `arithmetic` is the type of the products.
    `is_exact` says that the program that reads the export rounds nothing else: it must then arrive at `rounded`.
    """

    prompts: Sequence[Prompt]
    logits: NDArray[np.float32]
    rounded: NDArray[np.float32]
    arithmetic: str
    is_exact: bool

    @property
    def noise(self) -> float:
        """The largest difference that rounding makes."""
        return float(np.abs(log_probabilities(self.logits) - log_probabilities(self.rounded)).max())

    @property
    def spread(self) -> float:
        """From the lowest logit to the highest."""
        return float(self.logits.max() - self.logits.min())


def exact(name: str, weight: Tensor) -> Tensor:
    """A weight that is not rounded."""
    return weight.float()


def unrounded(x: Tensor) -> Tensor:
    """Input of a product that is not rounded."""
    return x


def make_reference(
    source: RunSource, rounding: Rounding, longest: int, progress: Callable[[int, int], None]
) -> Reference:
    """Ask the live adapter: the run's first held-out prompts and fixed ones, in float32 where memory allows.

    A prompt and its answer have at most `longest` tokens. Raises DataError where no prompt is so short.
    """
    arithmetic = arithmetic_of(source)
    network, _ = build_saved(source.base.path, source.adapter, "cpu", arithmetic)
    prompts = [_answered(source, network, messages) for messages in _questions(source, longest)]
    with torch.no_grad():
        live = [_logits(network, prompt, unrounded) for prompt in prompts]
        _round(source, network, rounding, progress)
        rounded = [_logits(network, prompt, rounding.into) for prompt in prompts]
    logits, moved = torch.cat(live).numpy(), torch.cat(rounded).numpy()
    is_exact = rounding.into is unrounded and arithmetic == "float32"
    return Reference(prompts, logits, moved, arithmetic, is_exact)


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits without the constant that programs add at will; what is below e^-60 counts as that."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    floored: NDArray[np.float32] = np.maximum(found, np.float32(-60))
    return floored


def arithmetic_of(source: RunSource) -> str:
    """float32 where the base fits into memory in it, else the base's own type."""
    free = available_bytes(torch.device("cpu"))
    if free is None or 4.5 * source.arch.num_parameters < free:
        return "float32"
    return "bfloat16" if source.dtype == torch.bfloat16 else "float16"


def _questions(source: RunSource, longest: int) -> list[tuple[Message, ...]]:
    """Conversations of one question that the model can read with room for an answer."""
    asked: list[str] = []
    if source.run.samples_file.is_file():
        asked = [str(sample["prompt"]) for sample in source.run.read_json(source.run.samples_file)]
    room = longest - MAX_TOKENS
    found: list[tuple[Message, ...]] = []
    for question in dict.fromkeys([*asked[: MAX_PROMPTS - len(FIXED_PROMPTS)], *FIXED_PROMPTS]):
        messages = (Message("user", question),)
        try:
            ids = source.renderer.prompt_ids(messages)
        except DataError:  # a template may refuse what it likes
            continue
        # what stands for characters outside of the vocabulary is no two programs' agreement
        if 0 < len(ids) < room and source.renderer.tokenizer.unknown_id not in ids:
            found.append(messages)
    if not found:
        raise DataError(
            f"no prompt can be compared: each is longer than {longest} tokens, or has characters outside of the "
            "tokenizer's vocabulary, which programs treat each in its own way",
            hint="train with a template that the tokenizer knows; --no-verify exports all the same, marked so",
        )
    return found


def _answered(source: RunSource, network: Llama, messages: tuple[Message, ...]) -> Prompt:
    ids = source.renderer.prompt_ids(messages)
    stops = frozenset(source.contract.stop_ids)
    made = generate_tokens(network, [Request(ids, stops, MAX_TOKENS)])
    text = written_prompt(source.renderer, messages)
    return Prompt(messages, text, ids, [token.id for _, token in made])


def _logits(network: Llama, prompt: Prompt, into: Callable[[Tensor], Tensor]) -> Tensor:
    whole = torch.tensor([*prompt.ids, *prompt.answer])
    hidden = network.hidden(whole, PackedDocuments([len(whole)]))[len(prompt.ids) - 1 :]
    return F.linear(into(network.model.norm(hidden)), network.lm_head.weight).float()


def _round(
    source: RunSource, network: Llama, rounding: Rounding, progress: Callable[[int, int], None]
) -> None:
    """Put rounded numbers in place of the network's, with the adapter merged into them.

    They are made of the live network alone: a fault in what is exported must not excuse itself.
    """
    for done, name in enumerate(source.weights, 1):
        module_name, _, part = name.rpartition(".")
        module = network.get_submodule(module_name)
        weight = _merged(module) if isinstance(module, LoraLinear) and part == "weight" else None
        module = getattr(module, "base", module)
        exact: Tensor = getattr(module, part).float() if weight is None else weight
        weight = rounding.weights(name, exact)
        if (change := float((weight - exact).norm() / exact.norm().clamp(min=1e-30))) > rounding.most:
            raise RunError(f"weight `{name}` changes by {change:.1%} when it is rounded to this type")
        weight = weight.to(network.lm_head.weight.dtype)
        if isinstance(module, Frozen) and part == "weight":
            parent, _, child = module_name.rpartition(".")
            setattr(network.get_submodule(parent), child, _Rounded(weight, module.bias, rounding.into))
        else:
            setattr(module, part, nn.Parameter(weight, requires_grad=False))
        progress(done, len(source.weights))
    if source.arch.tie_word_embeddings:
        network.lm_head.weight = network.model.embed_tokens.weight


def _merged(linear: LoraLinear) -> Tensor:
    return linear.base.dequantize().float() + linear.scale * (linear.lora_B.float() @ linear.lora_A.float())


class _Rounded(Frozen):
    """A linear that rounds its input."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, into: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self._into = into

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        start = with_low_rank(addend, low, transposed=False, in_place=False)
        made = F.linear(self._into(x), self.weight, self.bias)
        return made if start is None else made.add_(start)

"""The live adapter's answers to fixed prompts, and how much its logits change if numbers are rounded as in an export.

Our own engine computes both; export/parity.py compares them with the answers of the program that reads the export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.data.formats import Message
from lorafit.errors import DataError, RunError
from lorafit.export.chat_template import written_prompt
from lorafit.export.run_source import RunSource
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.model.attention import PackedDocuments
from lorafit.model.build import build_saved
from lorafit.model.linear import Frozen, LowRank, replace_module, with_low_rank
from lorafit.model.llama import Llama, capped
from lorafit.model.lora import LoraLinear
from lorafit.model.memory import available_bytes
from lorafit.verify.logits import largest

MAX_PROMPTS, MAX_TOKENS = 6, 16
FIXED_PROMPTS = ("What is the capital of France?", "라마가 뭐야? 🦙", "Write  two lines:\n\n1. one\n2. two")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, its rendered text and ids, and the greedy answer of the live adapter with its stop token, if any."""

    messages: tuple[Message, ...]
    text: str
    ids: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a program rounds: `weights(name, merged weight)`, and the `inputs` of each product (None: not rounded).

    `most` is the largest relative change of a weight, in root mean squares; more is an error.
    """

    weights: Callable[[str, Tensor], Tensor] = lambda name, weight: weight.float()
    inputs: Callable[[Tensor], Tensor] | None = None
    most: float = 0.0


@dataclass(frozen=True, slots=True)
class Reference:
    """Prompts and the live adapter's logits: (positions, vocab_size) for the last token of each prompt and its answer.

    `rounded` are the logits of our engine with rounded numbers; `arithmetic` is the type of the products. `is_exact`:
    the program that reads the export rounds nothing else, so it must compute `rounded`.
    """

    prompts: Sequence[Prompt]
    logits: Tensor
    rounded: Tensor
    arithmetic: str
    is_exact: bool

    @property
    def noise(self) -> float:
        """The largest difference that rounding makes."""
        return largest(log_probabilities(self.logits) - log_probabilities(self.rounded))

    @property
    def spread(self) -> float:
        """From the lowest logit to the highest."""
        return float(self.logits.max() - self.logits.min())


def make_reference(
    source: RunSource, rounding: Rounding, longest: int, progress: Callable[[int, int], None]
) -> Reference:
    """Answers of the live adapter to the run's first held-out prompts and fixed ones, in float32 if memory allows.

    A prompt and its answer have at most `longest` tokens. Raises DataError if no prompt is so short.
    """
    arithmetic = arithmetic_of(source)
    network, _ = build_saved(source.base.path, source.adapter, "cpu", arithmetic)
    prompts = [_answered(source, network, messages) for messages in _questions(source, longest)]
    with torch.no_grad():
        live = torch.cat([_logits(network, prompt) for prompt in prompts])
        _round(source, network, rounding, progress)
        rounded = torch.cat([_logits(network, prompt, rounding.inputs) for prompt in prompts])
    is_exact = rounding.inputs is None and arithmetic == "float32"
    return Reference(prompts, live, rounded, arithmetic, is_exact)


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits without the constant that programs may add; values below e^-60 count as that."""
    return logits.log_softmax(-1).clamp(min=-60)


def arithmetic_of(source: RunSource) -> str:
    """float32 if the base fits into memory in it, else the base's own type."""
    free = available_bytes(torch.device("cpu"))
    if free is None or 4.5 * source.arch.num_parameters < free:
        return "float32"
    is_narrow = source.dtype != torch.bfloat16 and source.arch.family.fits_float16
    return "float16" if is_narrow else "bfloat16"


def _questions(source: RunSource, longest: int) -> list[tuple[Message, ...]]:
    """Conversations of one question that leave room for an answer."""
    samples: list[str] = []
    if source.run.samples_file.is_file():
        samples = [str(sample["prompt"]) for sample in source.run.read_json(source.run.samples_file)]
    room = longest - MAX_TOKENS
    conversations: list[tuple[Message, ...]] = []
    for question in dict.fromkeys([*samples[: MAX_PROMPTS - len(FIXED_PROMPTS)], *FIXED_PROMPTS]):
        messages = (Message("user", question),)
        try:
            ids = source.renderer.prompt_ids(messages)
        except DataError:  # the template refuses it
            continue
        # programs differ in the tokens of characters outside of the vocabulary
        if 0 < len(ids) < room and source.renderer.tokenizer.unknown_id not in ids:
            conversations.append(messages)
    if not conversations:
        raise DataError(
            f"no prompt can be compared: each is longer than {longest} tokens, or has characters outside of the "
            "tokenizer's vocabulary, which programs treat differently",
            hint="train with a template that the tokenizer knows, or use --no-verify: the export records it",
        )
    return conversations


def _answered(source: RunSource, network: Llama, messages: tuple[Message, ...]) -> Prompt:
    ids = source.renderer.prompt_ids(messages)
    stops = frozenset(source.contract.stop_ids)
    made = generate_tokens(network, [Request(ids, stops, MAX_TOKENS)])
    text = written_prompt(source.renderer, messages)
    return Prompt(messages, text, ids, [token.id for _, token in made])


def _logits(network: Llama, prompt: Prompt, inputs: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    whole = torch.tensor([*prompt.ids, *prompt.answer])
    hidden = network.normed(network.hidden(whole, PackedDocuments([len(whole)]))[len(prompt.ids) - 1 :])
    logits = F.linear(hidden if inputs is None else inputs(hidden), network.lm_head.weight)
    return capped(logits, network.arch.logits_cap).float()


def _round(
    source: RunSource, network: Llama, rounding: Rounding, progress: Callable[[int, int], None]
) -> None:
    """Replace the network's weights by rounded ones, with the adapter merged into them.

    They are computed from the live network alone, so that an error of the export is not in them too.
    """
    for done, name in enumerate(source.weights, 1):
        module_name, _, part = name.rpartition(".")
        module = network.get_submodule(module_name)
        weight = None
        if isinstance(module, LoraLinear) and part == "weight":
            weight = module.base.dequantize().float() + module.delta()
        module = getattr(module, "base", module)
        exact: Tensor = getattr(module, part).float() if weight is None else weight
        weight = rounding.weights(name, exact)
        if (change := float((weight - exact).norm() / exact.norm().clamp(min=1e-30))) > rounding.most:
            raise RunError(f"weight `{name}` changes by {change:.1%} when it is rounded to this type")
        weight = weight.to(network.lm_head.weight.dtype)
        if isinstance(module, Frozen) and part == "weight":
            replace_module(network, module_name, _Rounded(weight, module.bias, rounding.inputs))
        else:
            setattr(module, part, nn.Parameter(weight, requires_grad=False))
        progress(done, len(source.weights))
    if source.arch.tie_word_embeddings:
        network.lm_head.weight = network.decoder.embed_tokens.weight


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

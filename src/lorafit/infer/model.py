"""A model that answers in words: network, tokenizer and the prompt contract it was trained with, loaded together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.data.formats import Content, Instruction, Message
from lorafit.data.prompt import PromptContract, Renderer, contract
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError
from lorafit.hub.client import adapter_folder, model_folder
from lorafit.infer.engine import Token, stream
from lorafit.infer.sampling import Sampling
from lorafit.infer.stream_text import AnswerText
from lorafit.model.adapter_file import CONFIG as ADAPTER_CONFIG
from lorafit.model.adapter_file import MAX_CONFIG
from lorafit.model.build import build_saved
from lorafit.model.llama import Llama
from lorafit.model.lora import adapted, disable_adapter, evaluating
from lorafit.model.quant import Quantize
from lorafit.observe.progress import progress
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import check_manifest
from lorafit.storage.safe_read import read_json

Question = str | Content | Sequence[Message]
AT_ONCE = 16  # prompts that share a batch


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. `stopped` is whether it ended by itself rather than at the token limit."""

    text: str
    num_tokens: int
    stopped: bool


class Model:
    """A network ready to answer. `has_adapter` is whether a LoRA adapter is on it."""

    def __init__(self, network: Llama, renderer: Renderer) -> None:
        self.network = network
        self.renderer = renderer
        self.has_adapter = bool(adapted(network))

    def generate(
        self,
        questions: Sequence[Question],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        base: bool = False,
    ) -> list[Answer]:
        """Answer every question, in order; `base` leaves the adapter out. Greedy unless `sampling` says otherwise."""
        answers: list[Answer] = []
        for start in range(0, len(questions), AT_ONCE):
            batch = questions[start : start + AT_ONCE]
            ids: list[list[int]] = [[] for _ in batch]
            stopped = [False] * len(batch)
            draws = sampling or Sampling()
            draws = dataclasses.replace(draws, seed=draws.seed + start)  # no two rows share a stream
            for token in self._tokens(batch, max_tokens, draws, base):
                stopped[token.row] = token.end == "stop"
                if token.end != "stop":
                    ids[token.row].append(token.id)
            answers += [
                Answer(self.renderer.tokenizer.decode(row, skip_special=True).strip(), len(row), ended)
                for row, ended in zip(ids, stopped, strict=True)
            ]
        return answers

    def stream(
        self,
        question: Question,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        base: bool = False,
        watch: Callable[[Token], None] | None = None,
    ) -> Generator[str]:
        """Answer one question piece by piece, as the pieces become whole characters: the text that `generate` gives.

        `watch` sees every token, also those that show nothing.
        """
        text = AnswerText(self.renderer.tokenizer)
        for token in self._tokens([question], max_tokens, sampling, base):
            if watch is not None:
                watch(token)
            if token.end != "stop" and (piece := text.push(token.id)):
                yield piece
        if piece := text.finish():
            yield piece

    def _tokens(
        self, questions: Sequence[Question], max_tokens: int, sampling: Sampling | None, base: bool
    ) -> Iterator[Token]:
        prompts = [self.renderer.prompt_ids(_as_source(question)) for question in questions]
        limit = self.network.arch.max_position_embeddings
        if too_long := [len(prompt) for prompt in prompts if len(prompt) >= limit]:
            raise ModelError(
                f"a prompt has {too_long[0]} tokens, the model reads at most {limit - 1}", hint="shorten it"
            )
        largest = max(map(max, filter(None, prompts)), default=0)
        if largest >= self.network.arch.vocab_size:
            token = self.renderer.tokenizer.decode([largest])
            raise ModelError(
                f"token `{token}` has id {largest}, but the model has {self.network.arch.vocab_size} embeddings",
                hint="tokens were added to the tokenizer and not to the model",
            )
        if not all(prompts):
            raise ModelError("a prompt has no tokens", hint="ask something, or give a system prompt")
        with evaluating(self.network), disable_adapter(self.network, when=base):
            yield from stream(
                self.network,
                prompts,
                stop_ids=frozenset(self.renderer.contract.stop_ids),
                max_tokens=max_tokens,
                sampling=sampling or Sampling(),
            )


def load(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    system: str | None = None,
    offline: bool = False,
    quantize: Quantize | None = None,
) -> Model:
    """A model that answers, from a run directory, a PEFT adapter folder, a model folder or a hub id.

    A run, or an adapter within one, brings its own prompt contract; anything else is asked by the model's chat
    template, or as Alpaca does where it has none. `adapter` puts a PEFT adapter (folder or hub id) on a base model;
    `system` replaces the system prompt. `quantize` is how the base's linears are held; where it is not said a run
    is loaded as it was trained, anything else with none. Raises ModelError, RunError or ConfigError.
    """
    found = find_source(source, adapter=adapter, dtype=dtype, offline=offline, quantize=quantize)
    base = model_folder(found.base, revision=found.revision, offline=found.offline)
    tokenizer = Tokenizer.from_folder(base.path)
    prompt = found.prompt or default_contract(tokenizer)
    if system is not None:
        prompt = dataclasses.replace(prompt, system=system)
    with progress("loading the model") as advance:
        network, _ = build_saved(base.path, found.adapter, device, found.dtype, advance, found.quantize)
    return Model(network, Renderer(prompt, tokenizer))


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a run directory, an adapter folder, a model folder or a hub id stands for.

    `base` and `revision` name the base model; `adapter` is the folder of the adapter on it and `prompt` the contract
    it was trained with, where there are such. `offline`: it was trained so.
    """

    base: str
    revision: str | None
    adapter: Path | None
    prompt: PromptContract | None
    dtype: str
    quantize: Quantize
    offline: bool


def find_source(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    offline: bool = False,
    quantize: Quantize | None = None,
) -> ModelSource:
    """What `source` is, with `adapter` on it; nothing of a base model is read. Raises ModelError or RunError."""
    name, revision, prompt = str(source), None, None
    adapter_path = adapter_folder(str(adapter), offline=offline).path if adapter is not None else None
    folder = Path(source).expanduser()
    if (folder / "config.yaml").is_file():
        run = RunDirectory.open(folder)
        config = run.config()
        name, revision, offline = config.model.name, config.model.revision, offline or config.run.offline
        adapter_path = adapter_path or run.newest_adapter()
        prompt = PromptContract.from_json(run.read_json(run.prompt_file))
        dtype = config.model.dtype if dtype == "auto" else dtype
        quantize = quantize or config.model.quantize
    elif (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        if adapter is not None:
            raise ModelError("an adapter cannot be put on an adapter", place=str(source))
        adapter_path = folder
        name, revision = _base_of(folder)
        prompt = _contract_beside(folder)
    if adapter_path is not None:
        check_manifest(adapter_path, "the adapter", ModelError)
    return ModelSource(name, revision, adapter_path, prompt, dtype, quantize or "none", offline)


def default_contract(tokenizer: Tokenizer) -> PromptContract:
    """How a model is asked that no run of ours says anything about."""
    return contract(
        tokenizer, template="auto", train_on="response", max_length=2048, too_long="error", add_eos=True
    )


def _as_source(question: Question) -> Content | Sequence[Message]:
    return Instruction(question, "", "") if isinstance(question, str) else question


def _contract_beside(adapter: Path) -> PromptContract | None:
    """The prompt contract of the run that an adapter or checkpoint folder lies in, if it lies in one."""
    for parent in adapter.resolve().parents[:2]:
        run = RunDirectory(parent)
        if run.config_file.is_file() and run.prompt_file.is_file():
            return PromptContract.from_json(run.read_json(run.prompt_file))
    return None


def _base_of(folder: Path) -> tuple[str, str | None]:
    """(name, revision) of the base model that a PEFT adapter names."""
    try:
        raw = read_json(folder / ADAPTER_CONFIG, MAX_CONFIG)
        name, revision = raw["base_model_name_or_path"], raw.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        name = revision = None
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{ADAPTER_CONFIG} does not name its base model",
            place=str(folder),
            hint="give the base model, and this folder as its adapter",
        )
    return name, revision if isinstance(revision, str) else None

"""A model ready to generate text: network, tokenizer and the prompt contract of its training, loaded together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.config.schema import Offload
from lorafit.data.contract import RAW
from lorafit.data.formats import Content, Instruction, Message, as_messages
from lorafit.data.prompt import PromptContract, Renderer, contract
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ConfigError, DataError, ModelError
from lorafit.hub.client import adapter_folder, model_folder
from lorafit.infer.continuous_batch import AT_ONCE, GeneratedToken, Request, generate_tokens
from lorafit.infer.sampling import Sampling
from lorafit.infer.stream_text import AnswerText
from lorafit.model.adapter_file import CONFIG as ADAPTER_CONFIG
from lorafit.model.architecture import read_architecture
from lorafit.model.base_check import check_base, named_base, original_name
from lorafit.model.build import build_saved
from lorafit.model.device import pick_device
from lorafit.model.llama import Llama
from lorafit.model.lora import adapted, disable_adapter, evaluating
from lorafit.model.quant import Quantize
from lorafit.model.weights import INDEX, SINGLE
from lorafit.observe.progress import progress
from lorafit.redact import logger_of, shell
from lorafit.run_dir import MAX_JSON, PROMPT, RunDirectory
from lorafit.storage.atomic import check_manifest
from lorafit.storage.safe_read import read_json

logger = logger_of(__name__)

Conversation = Sequence[Message] | Sequence[Mapping[str, object]]
Question = str | Content | Conversation


@dataclass(frozen=True, slots=True)
class Answer:
    """The text that a model generated. `stopped` is True for an end by a stop token, False for the token limit."""

    text: str
    num_tokens: int
    stopped: bool


class Model:
    """A network with its prompt contract. `has_adapter` is True when a LoRA adapter is attached."""

    def __init__(self, network: Llama, renderer: Renderer) -> None:
        self.network = network
        self.renderer = renderer
        self.has_adapter = bool(adapted(network) or network.changed)

    def generate(
        self,
        questions: Question | Sequence[Question],
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        base: bool = False,
    ) -> list[Answer]:
        """Answer all questions, in order. One question, such as one text or one conversation, gives one answer.

        `base` disables the adapter. Without `sampling` the answers are greedy. Raises ModelError where a prompt does
        not fit the model, DataError where it cannot be rendered.
        """
        sampling = sampling or Sampling()
        prompts = [self.prompt_ids(question) for question in as_questions(questions)]
        requests = []
        for index, prompt in enumerate(prompts):
            row = index % AT_ONCE
            seeded = dataclasses.replace(sampling, seed=sampling.seed + index - row)  # no two share a stream
            requests.append(self.request(prompt, max_tokens, seeded, stream=row))
        answers = dict(self.answers(requests, base=base))
        return [answers[index] for index in range(len(requests))]

    def stream(
        self,
        question: Question,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        base: bool = False,
        watch: Callable[[GeneratedToken], None] | None = None,
    ) -> Generator[str]:
        """Answer one question in pieces of whole characters. Joined, they are the text that `generate` gives.

        `watch` is called with every token, also with those that add no text. Raises as `generate` does.
        """
        text = AnswerText(self.renderer.tokenizer)
        request = self.request(self.prompt_ids(question), max_tokens, sampling or Sampling())
        for _, token in self.tokens([request], base=base):
            if watch is not None:
                watch(token)
            if token.end != "stop" and (piece := text.push(token.id)):
                yield piece
        if piece := text.finish():
            yield piece

    def require_adapter(self, source: str) -> None:
        """Raise ConfigError where the model, loaded from `source`, has no adapter to compare with its base."""
        if not self.has_adapter:
            hint = "remove --base and --compare"
            raise ConfigError(f"`{source}` is a base model, it has no adapter", hint=hint)

    def prompt_ids(self, question: Question) -> list[int]:
        """The ids of a prompt. Raises ModelError where the model cannot read it, DataError where it is no text."""
        if isinstance(question, str):
            content: Content | Sequence[Message] = Instruction(question, "", "")
        else:
            content = question if isinstance(question, Content) else as_messages(question)
        ids = self.renderer.prompt_ids(content)
        arch = self.network.arch
        if not ids:
            raise ModelError("a prompt has no tokens", hint="write a question, or give a system prompt")
        if len(ids) >= arch.max_position_embeddings:
            raise ModelError(
                f"a prompt has {len(ids):,} tokens, the model reads at most {arch.max_position_embeddings - 1:,}",
                hint="shorten it",
            )
        if (largest := max(ids)) >= arch.vocab_size:
            token = self.renderer.tokenizer.decode([largest])
            raise ModelError(
                f"token `{token}` has id {largest}, but the model has {arch.vocab_size} embeddings",
                hint="tokens were added to the tokenizer and not to the model",
            )
        return ids

    def request(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling, stream: int = 0) -> Request:
        """A request for the engine, with the stop tokens of the prompt contract."""
        return Request(prompt, frozenset(self.renderer.contract.stop_ids), max_tokens, sampling, stream)

    def tokens(
        self, requests: Sequence[Request], *, base: bool = False
    ) -> Iterator[tuple[int, GeneratedToken]]:
        """(index of the request, token), as they are generated; the network is in evaluation mode meanwhile."""
        with evaluating(self.network), disable_adapter(self.network, when=base):
            yield from generate_tokens(self.network, requests)

    def answers(self, requests: Sequence[Request], *, base: bool = False) -> Iterator[tuple[int, Answer]]:
        """(index of the request, whole answer), in the order in which they end."""
        ids: list[list[int]] = [[] for _ in requests]
        for index, token in self.tokens(requests, base=base):
            if token.end != "stop":
                ids[index].append(token.id)
            if token.end:
                text = self.renderer.tokenizer.decode(ids[index], skip_special=True).strip()
                yield index, Answer(text, len(ids[index]), token.end == "stop")


def as_questions(given: Question | Sequence[Question]) -> Sequence[Question]:
    """The questions in `given`, which may be a single one. Raises DataError for another type."""
    if isinstance(given, str | Content):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise DataError(f"prompts are a list, not a {type(given).__name__}", hint=_PROMPTS)
    turns = [isinstance(item, Message | Mapping) for item in given]
    if given and all(turns):
        return [as_messages(given)]
    if any(turns):
        raise DataError("prompts are either turns of one conversation, or a list of prompts", hint=_PROMPTS)
    for item in given:
        if not isinstance(item, str | Content | Sequence) or isinstance(item, bytes):
            raise DataError(f"a prompt is a {type(item).__name__}", hint=_PROMPTS)
    return [item for item in given if not isinstance(item, Message | Mapping)]


_PROMPTS = 'a prompt is a text, or a conversation: [{"role": "user", "content": "..."}]'


def load(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    system: str | None = None,
    offline: bool = False,
    quantize: Quantize | None = None,
    other_base: bool = False,
) -> Model:
    """Load a model from a run directory, a PEFT adapter folder, a model folder or a hub id.

    A run, its adapter and its exports have their own prompt contract. Prompts of an adapter of another program are
    rendered with the tokenizer and template in its folder. Other models use their chat template, or the Alpaca template
    where they have none.

    Args:
        source: what to load.
        adapter: a PEFT adapter (folder or hub id) to attach to a base model.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: type of the weights; `auto` is that of the training, or the best one for the device.
        system: replaces the system prompt of the contract.
        offline: opens no connection.
        quantize: quantization of the base's linears. None is that of the training for a run, else `none`.
        other_base: accepts an adapter that was made on another base model.

    Returns the Model. Raises ModelError, RunError or ConfigError.
    """
    pick_device(device)  # before anything is downloaded
    found = find_source(source, adapter=adapter, dtype=dtype, offline=offline, quantize=quantize)
    base = found.base_folder()
    found.check_base(base, found.base, other_base)
    renderer = found.renderer(base)
    if system is not None:
        if renderer.contract.template == RAW and system:
            hint = "the rows of its training had no template: write what the model needs into the prompt"
            raise ConfigError("this model has no system prompt", hint=hint)
        if renderer.contract.system not in ("", system):
            trained = renderer.contract.system[:60]
            logger.warning("note: the system prompt of the training is replaced: %r", trained)
        renderer = Renderer(dataclasses.replace(renderer.contract, system=system), renderer.tokenizer)
    with progress("loading the model") as advance:
        network, _ = build_saved(
            base, found.adapter, device, found.dtype, advance, found.quantize, found.offload
        )
    return Model(network, renderer)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a run directory, an adapter folder, a model folder or a hub id contains.

    `base` and `revision` name the base model. `adapter` is the adapter's folder and `prompt` the contract of its
    training, None where there is none. `is_named` is True when the user named the base (or the run) and the adapter
    apart. `offline` is True when connections are forbidden here, or were in the training. `offload` is that of
    the training.
    """

    base: str
    revision: str | None
    adapter: Path | None
    prompt: PromptContract | None
    dtype: str
    quantize: Quantize
    offline: bool
    is_named: bool = False
    offload: Offload = "none"

    def base_folder(self) -> Path:
        """The folder of the base model, downloaded where needed. Raises ModelError."""
        revision, offline = self.revision, self.offline
        return model_folder(self.base, revision=revision, offline=offline, validate=check_readable).path

    def check_base(self, base: Path, name: str, other_base: bool) -> None:
        """Raise ModelError where the adapter was made on another base than that in `base`, named `name`.

        A warning is logged where it cannot be known, or where the user accepted `other_base`.
        """
        flag = "--other-base (in Python: other_base=True)"
        if self.adapter is not None and (
            note := check_base(self.adapter, base, name, accepted=other_base, flag=flag)
        ):
            logger.warning("note: %s", note)

    def renderer(self, base: Path) -> Renderer:
        """How prompts are rendered with the base in `base`: by the contract of the training, else by its files.

        A warning is logged where that differs from the base's own template. Raises ModelError.
        """
        tokenizer = Tokenizer.from_folder(base)
        prompt = self.prompt
        if self.adapter is None:
            prompt = prompt or contract_in(base)
            return Renderer(prompt or default_contract(tokenizer), tokenizer)
        if prompt is not None:
            if prompt.tokenizer_sha256 != tokenizer.sha256:  # of a run with new tokens
                own = Tokenizer.from_folder(base, beside=self.adapter)
                tokenizer = own if prompt.tokenizer_sha256 == own.sha256 else tokenizer
            if self.is_named and (different := _differences(prompt, tokenizer)):
                logger.warning("note: asked as %s was trained: %s", self.adapter, different)
            return Renderer(prompt, tokenizer)
        own = Tokenizer.from_folder(base, beside=self.adapter)
        default = default_contract(own)
        if (own.sha256, own.chat_template) != (tokenizer.sha256, tokenizer.chat_template):
            logger.warning("note: asked with the tokenizer and the chat template in %s", self.adapter)
        else:
            which = (
                "the base's chat template"
                if default.template == "chat"
                else f"the {default.template} template"
            )
            logger.warning(
                "note: %s has no prompt contract and no template: asked by %s",
                self.adapter,
                which,
            )
        return Renderer(default, own)


def check_readable(folder: Path) -> None:
    """Raise ModelError if config.json or the tokenizer cannot be used: before weights are downloaded."""
    read_architecture(folder)
    Tokenizer.from_folder(folder)


def find_source(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    offline: bool = False,
    quantize: Quantize | None = None,
) -> ModelSource:
    """Find out what `source` is. No file of a base model is read. Raises ModelError or RunError."""
    name, revision, prompt = str(source), None, None
    offload: Offload = "none"
    adapter_path = adapter_folder(str(adapter), offline=offline).path if adapter is not None else None
    folder = Path(source).expanduser()
    if (folder / "config.yaml").is_file():
        run = RunDirectory.open(folder)
        config = run.config()
        name, revision, offline = config.model.name, config.model.revision, offline or config.run.offline
        if adapter_path is None:
            adapter_path = run.newest_adapter()
            prompt = PromptContract.from_json(run.read_json(run.prompt_file))
        else:
            prompt = contract_in(adapter_path) or PromptContract.from_json(run.read_json(run.prompt_file))
        dtype = config.model.dtype if dtype == "auto" else dtype
        quantize, offload = quantize or config.model.quantize, config.model.offload
    elif (folder / ADAPTER_CONFIG).is_file() and not any(
        (folder / file).is_file() for file in (SINGLE, INDEX)
    ):
        if adapter is not None:
            raise ModelError("an adapter cannot be put on an adapter", place=str(source))
        adapter_path = folder
        name, revision = _base_of(folder)
        prompt = contract_in(folder)
    elif adapter_path is not None:
        prompt = contract_in(adapter_path)
    if adapter_path is not None:
        check_manifest(adapter_path, "the adapter", ModelError)
    is_named = adapter is not None
    quantize = quantize or "none"
    return ModelSource(name, revision, adapter_path, prompt, dtype, quantize, offline, is_named, offload)


def default_contract(tokenizer: Tokenizer) -> PromptContract:
    """The prompt contract of a model that no run of lorafit describes."""
    return contract(
        tokenizer, template="auto", train_on="response", max_length=2048, too_long="error", add_eos=True
    )


def contract_in(folder: Path) -> PromptContract | None:
    """The prompt contract in an adapter, checkpoint or model folder, or of the run that contains it; None without."""
    folder = folder.resolve()
    if (folder / PROMPT).is_file():
        try:
            return PromptContract.from_json(read_json(folder / PROMPT, MAX_JSON))
        except (OSError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"`{PROMPT}` cannot be read", place=str(folder / PROMPT)) from None
    for parent in folder.parents[:2]:
        run = RunDirectory(parent)
        if run.config_file.is_file() and run.prompt_file.is_file():
            return PromptContract.from_json(run.read_json(run.prompt_file))
    return None


def _differences(prompt: PromptContract, tokenizer: Tokenizer) -> str:
    """What of a contract differs from the default contract of the base, in words; "" for nothing."""
    own_template = "chat" if tokenizer.chat_template else "alpaca"
    words = []
    if prompt.template != own_template:
        words.append(f"template {prompt.template}")
    elif prompt.template == "chat" and prompt.chat_template != tokenizer.chat_template:
        words.append("another chat template than the base's")
    if prompt.system:
        words.append(f"system prompt {prompt.system[:60]!r}")
    return ", ".join(words)


def _base_of(folder: Path) -> tuple[str, str | None]:
    """(name, revision) of the base model that a PEFT adapter names. Raises ModelError where it cannot be used."""
    name, revision = named_base(folder)
    if not name:
        raise ModelError(
            f"{ADAPTER_CONFIG} does not name its base model",
            place=str(folder),
            hint="give the base model, and this folder as its adapter",
        )
    whole = original_name(name)
    if whole != name and not Path(name).expanduser().exists():
        raise ModelError(
            f"the adapter names a 4-bit copy as its base: `{name}`",
            place=str(folder / ADAPTER_CONFIG),
            hint=f"give the 16-bit original: {shell('lorafit', 'generate', whole, '--adapter', folder)}",
        )
    return name, revision

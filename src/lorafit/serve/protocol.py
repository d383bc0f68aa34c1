"""Requests and replies of the API, with OpenAI's names. Unknown and unsupported fields are refused, never ignored.

Types are strict: a number in quotes is not a number. A list is checked up to its first fault. Fields of OpenAI and of
other servers that would change the answer, and are not supported, accept only the value that changes nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lorafit.infer.sampling import Sampling

MAX_CHOICES = 16
_INT64 = 2**63
_MAX_KEYS = 128


class Only:
    """The annotation of a field that accepts only `values`, which change nothing, and null."""

    def __init__(self, *values: JsonValue) -> None:
        self.values = (*values, None)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def _check(self, value: object) -> object:
        # in Python, but not in JSON, True is 1
        if not any(
            value == known and isinstance(value, bool) == isinstance(known, bool) for known in self.values
        ):
            accepted = " or ".join(json.dumps(known) for known in self.values)
            message = f"this server does not support it and accepts only {accepted}"
            raise PydanticCustomError("unsupported", message)
        return value


def _not_zero(count: int) -> int:
    if count == 0:
        raise ValueError("it is 1 or more; -1 is no limit")
    return count


def _at_most(length: int) -> BeforeValidator:
    """Refuses a longer list or object before its elements are checked; `max_length` alone counts them afterwards."""

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > length:
            raise PydanticCustomError("too_long", f"it has {len(value):,} elements, more than {length:,}")
        return value

    return BeforeValidator(check)


def _is_text_part(part: object) -> object:
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise ValueError("only parts of type `text` are supported")
    return part


def _kind(value: object) -> str | None:
    """The alternative of a field that `value` is meant to be."""
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else None


def _kind_of_prompt(value: object) -> str | None:
    """As `_kind`, where the first element decides what a list holds."""
    match value:
        case [int() | float(), *_]:
            return "ids"
        case [list(), *_]:
            return "lists"
    return _kind(value)


def _choice(kind: Callable[[object], str | None], expected: str) -> Discriminator:
    """The discriminator of a field with alternatives of different type; the error names `expected` where none fits."""
    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"it is {expected}")


StopText = Annotated[str, Field(max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Count = Annotated[int, Field(ge=-1, lt=2**31, description="-1 is no limit."), AfterValidator(_not_zero)]
Unused = Annotated[str | None, Field(description="Accepted and not used.")]


class _Strict(BaseModel):
    """An object whose keys are all known. Beyond _MAX_KEYS, they are not named."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > _MAX_KEYS:
            raise PydanticCustomError("too_long", f"it has more than {_MAX_KEYS} keys")
        return value


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Parts = Annotated[
    list[Annotated[TextPart, BeforeValidator(_is_text_part)]], Field(min_length=1, fail_fast=True)
]


class ChatMessage(_Strict):
    """One turn. `developer` is another name of `system`. `name`, calls and reasoning are read as in rows of data."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[Parts, Tag("list")], _choice(_kind, "a text or a list")
        ]
        | None
    ) = None
    name: str | None = None
    id: Unused = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    refusal: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only([])] = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role `{self.role}` needs `content`")
        return self

    def row(self) -> dict[str, Any]:
        """The turn as a row of data has it."""
        values = self.model_dump(exclude_none=True, exclude={"id", "annotations"})
        return {"content": "", **values}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None
    continuous_usage_stats: Annotated[Any, Only(False)] = None


class ResponseFormat(_Strict):
    type: Literal["text"]


class _Neutral(_Strict):
    """Fields of OpenAI, vLLM, llama.cpp and other servers with which clients change nothing."""

    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    repeat_penalty: Annotated[Any, Only(1)] = None
    length_penalty: Annotated[Any, Only(1)] = None
    min_p: Annotated[Any, Only(0)] = None
    typical_p: Annotated[Any, Only(1)] = None
    mirostat: Annotated[Any, Only(0)] = None
    min_tokens: Annotated[Any, Only(0)] = None
    ignore_eos: Annotated[Any, Only(False)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    stop_token_ids: Annotated[Any, Only([])] = None
    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    user: Unused = None
    service_tier: Unused = None
    prompt_cache_key: Unused = None
    safety_identifier: Unused = None
    store: Annotated[Any, Only(False)] = None


class _Generation(_Neutral):
    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, description="0 is greedy. The default is 1.")] | None = (
        None
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: (
        Annotated[
            int,
            Field(ge=-1, lt=2**31, description="Sample from the k most probable; 0 and -1 are all."),
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: (
        Annotated[
            Annotated[StopText, Tag("text")] | Annotated[list[StopText], Field(max_length=16), Tag("list")],
            _choice(_kind, "a text or a list of texts"),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self) -> Sampling:
        """The sampling, with OpenAI's defaults. Without a seed, each request has a new one."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**64,
        )

    @property
    def stops(self) -> list[str]:
        """The stop texts. An empty one stops nothing."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return [stop for stop in stops if stop]

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=10_000, fail_fast=True), _at_most(10_000)
    ]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[Any, Only(["text"])] = None
    tools: Annotated[
        list[dict[str, Any]] | None,
        Field(
            fail_fast=True, description="Part of the prompt. An answer is text, also where it calls a tool."
        ),
    ] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="Not used; not false with `tools`.")] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Field(description="Only what the run has as `data.template_args`.")
    ] = None
    add_generation_prompt: Annotated[Any, Only(True)] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    metadata: Annotated[
        dict[str, str] | None, Field(max_length=16, description="Accepted and not used."), _at_most(16)
    ] = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.tools and self.parallel_tool_calls is False:
            raise ValueError("this server does not limit calls: leave out `parallel_tool_calls`")
        return self


class CompletionRequest(_Generation):
    """The body of /v1/completions: texts, or token ids, to continue."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[
            list[str],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
            _at_most(MAX_CHOICES),
            Tag("list"),
        ]
        | Annotated[Ids, Tag("ids")]
        | Annotated[
            list[Ids],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
            _at_most(MAX_CHOICES),
            Tag("lists"),
        ],
        _choice(_kind_of_prompt, "a text, a list of texts, or token ids"),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[Any, Only("")] = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


Finish = Literal["stop", "length"]


class ChatChoice(BaseModel):
    index: int
    message: ChatReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lorafit"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Health(BaseModel):
    """`active` answers are in the batch, `waiting` ones in the queue."""

    status: Literal["ok"] = "ok"
    active: int
    waiting: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorBody

"""HTTP replies: complete ones and event streams, for chats and for plain completions."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lorafit.infer.continuous_batch import GeneratedToken
from lorafit.infer.stream_text import TokenTexts
from lorafit.serve.errors import ApiError
from lorafit.serve.jobs import AnswerJob, TextPiece
from lorafit.serve.protocol import ChatRequest, CompletionRequest

T = TypeVar("T")

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class CompletionFormat:
    """text_completion, complete and streamed."""

    prefix = "cmpl-"
    name = chunk_name = "text_completion"

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts

    def first(self) -> dict[str, Any] | None:
        """The content of the first event of an answer; None where there is no such event."""
        return None

    def complete(self, text: str) -> dict[str, Any]:
        """The content of a complete answer."""
        return {"text": text}

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        """The content that a piece adds."""
        return {"text": piece.text}

    def logprobs(self, tokens: Sequence[GeneratedToken], num_sent: int) -> dict[str, Any]:
        """The log-probabilities of tokens whose text begins after `num_sent` characters."""
        texts = [self.texts.of(token.id).text for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self.texts.of(other).text: _finite(logprob) for other, logprob in token.top}
                for token in tokens
            ],
            "text_offset": [num_sent + len("".join(texts[:index])) for index in range(len(texts))],
        }


class ChatFormat(CompletionFormat):
    """chat.completion and chat.completion.chunk."""

    prefix = "chatcmpl-"
    name, chunk_name = "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def complete(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        return {"delta": {"content": piece.text} if piece.text or not piece.finish else {}}

    def logprobs(self, tokens: Sequence[GeneratedToken], num_sent: int) -> dict[str, Any]:
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*other) for other in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self.texts.of(token_id)
        data = None if token.data is None else list(token.data)
        return {"token": token.text, "logprob": _finite(logprob), "bytes": data}


async def reply(
    request: Request, body: ChatRequest | CompletionRequest, job: AnswerJob, form: CompletionFormat
) -> Response:
    """The complete reply, or the stream after its first piece: an earlier failure has a status of its own."""
    started = time.monotonic()
    head = {"id": form.prefix + secrets.token_hex(12), "created": int(time.time()), "model": body.model}

    def close(outcome: str) -> None:
        job.close()
        counts, seconds = _usage(job), time.monotonic() - started
        tokens = f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens"
        request.app.state.log(f"{body.model}  {tokens}  {seconds:.2f} s  {outcome}")

    outcome = "failed"
    try:
        if body.stream:
            pieces = job.pieces()
            first = await _unless_disconnected(request.receive, anext(pieces))
            if first is not None:
                outcome = ""
                return _EventStream(_events(first, pieces, job, form, head, body.includes_usage), close)
        else:
            content = await _unless_disconnected(request.receive, _complete_reply(job, form, head))
            if content is not None:
                outcome = "answered"
                return Response(content, media_type="application/json")
        outcome = "client disconnected"
        return Response(status_code=499)
    finally:
        if outcome:
            close(outcome)


class _EventStream(StreamingResponse):
    """Server-sent events. `close` is called with the outcome, after the last event or a disconnect."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[str], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._close, self._outcome = close, "client disconnected"

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self._outcome = "streamed"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close(self._outcome)


async def _unless_disconnected(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`. When the client disconnects before, `work` is cancelled, and the result is None."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _complete_reply(job: AnswerJob, form: CompletionFormat, head: dict[str, Any]) -> bytes:
    """The reply as JSON after the end of all answers. Raises ApiError."""
    texts, finishes = [""] * job.num_answers, [""] * job.num_answers
    tokens: list[list[GeneratedToken]] = [[] for _ in texts]
    async for piece in job.pieces():
        texts[piece.index] += piece.text
        finishes[piece.index] = piece.finish
        tokens[piece.index] += piece.tokens

    def written() -> bytes:
        choices = [
            {
                "index": index,
                **form.complete(text),
                "logprobs": form.logprobs(tokens[index], 0) if job.with_logprobs else None,
                "finish_reason": finishes[index],
            }
            for index, text in enumerate(texts)
        ]
        content = {**head, "object": form.name, "choices": choices, "usage": _usage(job)}
        return _in_pieces(content).encode()

    return await asyncio.to_thread(written) if job.with_logprobs else written()


async def _events(
    first: TextPiece,
    rest: AsyncIterator[TextPiece],
    job: AnswerJob,
    form: CompletionFormat,
    head: dict[str, Any],
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The reply as server-sent events. A failure is the last event."""
    head = {**head, "object": form.chunk_name, **({"usage": None} if with_usage else {})}
    num_sent = [0] * job.num_answers
    if (content := form.first()) is not None:
        for index in range(job.num_answers):
            empty = {"index": index, **content, "logprobs": None, "finish_reason": None}
            yield _event({**head, "choices": [empty]})
    piece: TextPiece | None = first
    try:
        while piece is not None:
            if piece.text or piece.finish or piece.tokens:
                logprobs = form.logprobs(piece.tokens, num_sent[piece.index]) if job.with_logprobs else None
                end = {"logprobs": logprobs, "finish_reason": piece.finish or None}
                yield _event({**head, "choices": [{"index": piece.index, **form.delta(piece), **end}]})
            num_sent[piece.index] += len(piece.text)
            piece = await anext(rest, None)
    except ApiError as error:
        yield _event(error.body())
        return
    if with_usage:
        yield _event({**head, "choices": [], "usage": _usage(job)})
    yield b"data: [DONE]\n\n"


def _usage(job: AnswerJob) -> dict[str, int]:
    """Numbers of tokens. The stop token of an answer is not counted."""
    prompt, completion = job.num_prompt_tokens, job.num_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _in_pieces(value: object, depth: int = 5) -> str:
    """`value` as JSON. Other threads have their turn after each value at `depth`, such as a token's probabilities."""
    if depth and isinstance(value, dict):
        items = (f"{_JSON.encode(name)}:{_in_pieces(item, depth - 1)}" for name, item in value.items())
        return "{" + ",".join(items) + "}"
    if depth and isinstance(value, list):
        return "[" + ",".join(_in_pieces(item, depth - 1) for item in value) + "]"
    return _JSON.encode(value)


def _event(value: object) -> bytes:
    return b"data: " + _JSON.encode(value).encode() + b"\n\n"


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # OpenAI's value for an impossible token

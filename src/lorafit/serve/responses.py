"""Replies built from pieces: whole ones, and the events of streams, for chats and for plain completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lorafit.infer.continuous_batch import GeneratedToken
from lorafit.infer.stream_text import TokenTexts
from lorafit.serve.errors import ApiError
from lorafit.serve.jobs import Job, Piece


class Chat:
    """chat.completion and chat.completion.chunk: a whole answer, what one begins with, and what a piece adds."""

    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, with_logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, with_logprobs

    def choice(self, index: int, text: str, steps: Sequence[GeneratedToken], finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(steps),
            "finish_reason": finish,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(
        self, piece: Piece, before: int
    ) -> dict[str, Any]:  # `before`: characters that were sent already
        logprobs = self._logprobs([piece.step] if piece.step else [])
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": piece.finish or None,
        }

    def _logprobs(self, steps: Sequence[GeneratedToken]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(step.id, step.logprob),
                "top_logprobs": [self._token(*other) for other in step.top],
            }
            for step in steps
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._texts.of(token_id)
        data = None if token.data is None else list(token.data)
        return {"token": token.text, "logprob": _finite(logprob), "bytes": data}


class Completion:
    """text_completion, whole and streamed."""

    whole = chunk = "text_completion"

    def __init__(self, texts: TokenTexts, with_logprobs: bool) -> None:
        self._texts, self._with_logprobs = texts, with_logprobs

    def choice(self, index: int, text: str, steps: Sequence[GeneratedToken], finish: str) -> dict[str, Any]:
        logprobs = self._logprobs(steps, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(self, piece: Piece, before: int) -> dict[str, Any]:
        logprobs = self._logprobs([piece.step] if piece.step else [], before)
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish or None,
        }

    def _logprobs(self, steps: Sequence[GeneratedToken], before: int) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        tokens = [self._texts.of(step.id).text for step in steps]
        offsets = [before + len("".join(tokens[:at])) for at in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(step.logprob) for step in steps],
            "top_logprobs": [
                {self._texts.of(token).text: _finite(logprob) for token, logprob in step.top}
                for step in steps
            ],
            "text_offset": offsets,
        }


async def whole(job: Job, shape: Chat | Completion, head: dict[str, Any], num_choices: int) -> dict[str, Any]:
    """The reply once every answer has its end. Raises ApiError."""
    texts, finishes = [""] * num_choices, [""] * num_choices
    steps: list[list[GeneratedToken]] = [[] for _ in range(num_choices)]
    async for piece in job.pieces():
        texts[piece.index] += piece.text
        finishes[piece.index] = piece.finish
        steps[piece.index] += [piece.step] if piece.step else []
    choices = [
        shape.choice(index, *answer) for index, answer in enumerate(zip(texts, steps, finishes, strict=True))
    ]
    return {**head, "object": shape.whole, "choices": choices, "usage": usage(job)}


async def events(
    pieces: AsyncIterator[Piece],
    job: Job,
    shape: Chat | Completion,
    head: dict[str, Any],
    num_choices: int,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The reply as server-sent events. What fails after the first one is told as an event of its own."""
    head = {**head, "object": shape.chunk, **({"usage": None} if with_usage else {})}
    before = [0] * num_choices
    for index in range(num_choices):
        if (first := shape.first(index)) is not None:
            yield _event({**head, "choices": [first]})
    try:
        async for piece in pieces:
            if piece.text or piece.finish or piece.step is not None:
                yield _event({**head, "choices": [shape.delta(piece, before[piece.index])]})
            before[piece.index] += len(piece.text)
    except ApiError as error:
        yield _event(error.body())
        return
    if with_usage:
        yield _event({**head, "choices": [], "usage": usage(job)})
    yield b"data: [DONE]\n\n"


def usage(job: Job) -> dict[str, int]:
    """What was read and made, in tokens; the token that ends an answer does not count."""
    read, made = job.num_prompt_tokens, job.num_tokens
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # as OpenAI writes what cannot happen

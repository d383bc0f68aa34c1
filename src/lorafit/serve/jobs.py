"""From requests to answers: renders off the event loop, submits to the scheduler, and returns pieces of text."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from lorafit.data.content import Chat, Completion, Message
from lorafit.data.prompt import Renderer
from lorafit.errors import LorafitError, Problem
from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request
from lorafit.infer.multi_adapter import Models, ServedModel
from lorafit.infer.sampling import Sampling
from lorafit.infer.scheduler import (
    Failure,
    QueueFullError,
    Scheduler,
    StoppedError,
    Ticket,
    TicketEvent,
)
from lorafit.infer.stream_text import AnswerText, TokenTexts
from lorafit.serve.errors import ApiError

Prompt = Chat | Completion | list[int]

_SHORT = 64 * 2**10  # bytes of a request that does not wait for longer ones
_MAX_LONG = 4  # longer requests that are read or wait for it
_PAUSE, _MAX_PAUSE = 4.0, 5.0  # after a refused one: times its duration, seconds
_MAX_PROBLEMS = 8  # that a message names


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the answers. `num` is the number per prompt; `strip` removes white space at the ends."""

    max_tokens: int | None
    sampling: Sampling
    num: int
    stops: Sequence[str]
    top_logprobs: int | None
    strip: bool


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one token adds to answer `index`: text, often "", the token where it is part of the answer, and the end."""

    index: int
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish: str


class AnswerJob:
    """The answers to one HTTP request. The owner must call `close`, also after a failure."""

    def __init__(
        self, service: AnswerService, tickets: Sequence[Ticket], served: ServedModel, options: Options
    ) -> None:
        self.num_prompt_tokens = sum(len(ticket.request.prompt) for ticket in tickets) // options.num
        self.num_answers, self.num_tokens = len(tickets), 0
        self.with_logprobs = options.top_logprobs is not None
        self.events: asyncio.Queue[TicketEvent] = asyncio.Queue()
        self._service, self._tickets = service, list(tickets)
        self._index = {ticket: index for index, ticket in enumerate(tickets)}
        tokenizer = served.renderer.tokenizer
        self._texts = [AnswerText(tokenizer, options.stops, options.strip) for _ in tickets]

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """The pieces of all answers as they are generated, until all have ended. Raises ApiError on a failure."""
        active = set(self._tickets)
        while active:
            ticket, event = await self.events.get()
            if ticket not in active:
                continue  # a token after a stop text
            if isinstance(event, str):
                raise _failed(event)
            piece = self._piece(ticket, event)
            if piece.finish:
                active.discard(ticket)
            yield piece

    def _piece(self, ticket: Ticket, token: GeneratedToken) -> TextPiece:
        index = self._index[ticket]
        text = self._texts[index]
        is_part = token.end != "stop"
        piece = text.push(token.id) if is_part else ""
        self.num_tokens += is_part
        if token.end:
            piece += text.finish()
        elif text.is_stopped:
            self._service.scheduler.cancel([ticket])
        return TextPiece(index, piece, (token,) if is_part else (), "stop" if text.is_stopped else token.end)

    def close(self) -> None:
        """Cancel the answers that have not ended."""
        self._service.close(self._tickets)


class AnswerService:
    """Models behind a scheduler, for one event loop."""

    def __init__(
        self, models: Models, batch: ContinuousBatch[Ticket], *, max_waiting: int, timeout: float
    ) -> None:
        self.models = models
        self.context = batch.context
        self.timeout = timeout
        self.scheduler = Scheduler(batch, max_waiting, self._deliver)
        self.token_texts = TokenTexts(next(iter(models.named.values())).renderer.tokenizer)
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[Ticket, AnswerJob] = {}
        self._num_rendering = self._num_long = 0
        self._long = asyncio.Lock()
        # Long requests have a thread of their own, and renderers, because a template has one budget at a time.
        self._threads = {
            True: ThreadPoolExecutor(1, "lorafit-short"),
            False: ThreadPoolExecutor(1, "lorafit-long"),
        }
        self._long_renderers = {
            name: Renderer(served.renderer.contract, served.renderer.tokenizer)
            for name, served in models.named.items()
        }
        self.scheduler.start()

    def named(self, name: str) -> ServedModel:
        """The model of that name. Raises ApiError."""
        if (served := self.models.named.get(name)) is not None:
            return served
        names = ", ".join(f"`{known}`" for known in self.models.named)
        message = f"there is no model `{name}`; there are {names}"
        raise ApiError(404, message, code="model_not_found", param="model")

    def thread(self, num_bytes: int) -> Executor:
        """The thread that reads and renders requests of this size."""
        return self._threads[num_bytes <= _SHORT]

    @contextlib.asynccontextmanager
    async def turn(self, num_bytes: int) -> AsyncIterator[None]:
        """The time to read and to render a request of `num_bytes`. Raises ApiError where too many wait.

        Long requests have their turn one after the other. After a refused one there is a pause: else a client that
        sends one after the other would take the processor from all others.
        """
        if num_bytes <= _SHORT:
            yield
            return
        if self._num_long >= _MAX_LONG:
            await asyncio.sleep(1)
            raise _queue_full(1)
        self._num_long += 1
        try:
            async with self._long:
                started = time.monotonic()
                try:
                    yield
                except ApiError:
                    await asyncio.sleep(min(_PAUSE * (time.monotonic() - started), _MAX_PAUSE))
                    raise
        finally:
            self._num_long -= 1

    async def render(
        self, served: ServedModel, num_bytes: int, read: Callable[[], Sequence[Prompt]]
    ) -> list[list[int]]:
        """The prompts that `read` returns, as ids; `num_bytes` is the size of the request. Raises ApiError.

        All work is done on another thread. A prompt whose texts cannot fit the context is not rendered.
        """
        if self._num_rendering + sum(self.scheduler.load()) >= self.scheduler.capacity:
            raise _queue_full(1)
        renderer = served.renderer if num_bytes <= _SHORT else self._long_renderers[served.name]

        def work() -> list[list[int]]:
            return [self._ids(renderer, prompt) for prompt in read()]

        self._num_rendering += 1
        try:
            prompts = await self._loop.run_in_executor(self.thread(num_bytes), work)
        except LorafitError as error:
            message = "; ".join(_sentence(problem) for problem in error.problems[:_MAX_PROBLEMS])
            raise ApiError(400, message, code="invalid_prompt") from None
        finally:
            self._num_rendering -= 1
        for length in map(len, prompts):
            if not length:
                raise ApiError(400, "the prompt has no tokens", code="invalid_prompt")
            if length >= self.context:
                raise self._too_long(f"{length:,}")
        return prompts

    def _ids(self, renderer: Renderer, prompt: Prompt) -> list[int]:
        """The ids of a prompt. Raises ApiError before anything is rendered where its texts cannot fit the context."""
        if isinstance(prompt, list):
            return prompt
        texts = [prompt.prompt] if isinstance(prompt, Completion) else map(_shown, prompt.messages)
        if (fewest := sum(map(renderer.tokenizer.fewest_tokens, texts))) >= self.context:
            raise self._too_long(f"{fewest:,} or more")
        return renderer.prompt_ids(
            prompt.messages if isinstance(prompt, Chat) and not prompt.tools else prompt
        )

    def _too_long(self, count: str) -> ApiError:
        message = f"the prompt has {count} tokens; the context with its answer is {self.context:,}"
        return ApiError(400, message, code="context_length_exceeded")

    def start(self, served: ServedModel, prompts: Sequence[Sequence[int]], options: Options) -> AnswerJob:
        """Queue the answers to `prompts`, in order. Raises ApiError where the queue is full."""
        deadline = time.monotonic() + self.timeout
        stop_ids = frozenset(served.renderer.contract.stop_ids)
        tickets: list[Ticket] = []
        for prompt in prompts:
            for _ in range(options.num):
                request = Request(
                    prompt=prompt,
                    stop_ids=stop_ids,
                    max_tokens=options.max_tokens or self.context,
                    sampling=options.sampling,
                    stream=len(tickets),
                    adapter=served.adapter,
                    top_logprobs=options.top_logprobs,
                )
                tickets.append(Ticket(request, deadline))
        job = AnswerJob(self, tickets, served, options)
        self._jobs.update(dict.fromkeys(tickets, job))
        try:
            self.scheduler.submit(tickets)
        except QueueFullError as error:
            self.close(tickets)
            raise _queue_full(error.retry_after) from None
        except StoppedError:
            self.close(tickets)
            raise _failed("stopped") from None
        return job

    def close(self, tickets: Sequence[Ticket]) -> None:
        """Cancel tickets and forget their job."""
        self.scheduler.cancel(tickets)
        for ticket in tickets:
            self._jobs.pop(ticket, None)

    async def stop(self) -> None:
        """End the threads. Answers that have not ended fail."""
        await self._loop.run_in_executor(None, self.scheduler.stop)
        for executor in self._threads.values():
            executor.shutdown(wait=False, cancel_futures=True)

    def _deliver(self, events: list[TicketEvent]) -> None:
        self._loop.call_soon_threadsafe(self._distribute, events)

    def _distribute(self, events: list[TicketEvent]) -> None:
        for event in events:
            if (job := self._jobs.get(event[0])) is not None:
                job.events.put_nowait(event)


def _sentence(problem: Problem) -> str:
    place = f" ({problem.place})" if problem.place else ""
    return ": ".join(filter(None, (problem.message + place, problem.hint)))


def _shown(message: Message) -> str:
    """What every template shows of a turn: it may strip the content, and leave out the thought of an answer."""
    return message.content.rpartition("</think>")[2].strip()


def _queue_full(retry_after: int) -> ApiError:
    message = f"too many requests are waiting; try again in {retry_after} s"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after)})


def _failed(failure: Failure) -> ApiError:
    if failure == "late":
        return ApiError(504, "the answer was not ready in time", code="timeout")
    if failure == "stopped":
        return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
    return ApiError(500, "the answer failed; see the server's log", code="internal_error")

"""From requests to answers: rendering off the event loop, tickets into the scheduler, pieces of text out of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from lorafit.errors import LorafitError
from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request
from lorafit.infer.multi_adapter import Models, ServedModel
from lorafit.infer.sampling import Sampling
from lorafit.infer.scheduler import Event, Failure, QueueFullError, Scheduler, StoppedError, Ticket
from lorafit.infer.stream_text import AnswerText, TokenTexts
from lorafit.serve.errors import ApiError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """How answers are to be made. `num` is how many to each prompt, `strip` whether their ends lose white space."""

    max_tokens: int | None
    sampling: Sampling
    num: int
    stops: Sequence[str]
    top_logprobs: int | None
    strip: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to answer `index`: text, often "", the step where its token is shown, and how it ended."""

    index: int
    text: str
    step: GeneratedToken | None
    finish: str


class Job:
    """The answers to one HTTP request in the making. To be closed, whatever happens."""

    def __init__(
        self,
        answering: Answering,
        tickets: Sequence[Ticket],
        texts: Sequence[AnswerText],
        num_prompt_tokens: int,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        self._answering, self._tickets, self._texts = answering, list(tickets), texts
        self._index = {ticket: index for index, ticket in enumerate(tickets)}
        self.events: asyncio.Queue[tuple[Ticket, GeneratedToken | Failure]] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers as they come, until each has its end. Raises ApiError where one fails."""
        going = set(self._tickets)
        while going:
            ticket, event = await self.events.get()
            if ticket not in going:
                continue  # it came after the answer had met a stop text
            if isinstance(event, str):
                raise _failed(event)
            piece = self._piece(ticket, event)
            if piece.finish:
                going.discard(ticket)
            yield piece

    def _piece(self, ticket: Ticket, step: GeneratedToken) -> Piece:
        index = self._index[ticket]
        text = self._texts[index]
        shown = None
        if step.end == "stop":
            piece = text.finish()
        else:
            self.num_tokens += 1
            shown, piece = step, text.push(step.id)
            if step.end:
                piece += text.finish()
        finish = "stop" if text.is_stopped else step.end
        if text.is_stopped and not step.end:
            self._answering.scheduler.cancel([ticket])
        return Piece(index, piece, shown, finish)

    def close(self) -> None:
        """Free what the answers still hold."""
        self._answering.close(self._tickets)


class Answering:
    """Models behind a scheduler, for the one event loop that it is made on."""

    def __init__(self, models: Models, batch: ContinuousBatch, *, max_waiting: int, timeout: float) -> None:
        self.models = models
        self.context = batch.context
        self.timeout = timeout
        self.scheduler = Scheduler(batch, max_waiting, self._deliver)
        self.token_texts = TokenTexts(next(iter(models.named.values())).renderer.tokenizer)
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[Ticket, Job] = {}
        self._num_rendering = 0
        self._renderer = ThreadPoolExecutor(1, "lorafit-render")  # a tokenizer is not shared between threads
        self.scheduler.start()

    def named(self, name: str) -> ServedModel:
        """What is asked by that name. Raises ApiError."""
        found = self.models.named.get(name)
        if found is None:
            there = ", ".join(f"`{known}`" for known in self.models.named)
            raise ApiError(
                404, f"there is no model `{name}`; there are {there}", code="model_not_found", param="model"
            )
        return found

    async def render(self, make: Callable[[], list[list[int]]]) -> list[list[int]]:
        """What `make` makes of texts, prompts as ids, on a thread of its own. Raises ApiError."""
        if self._num_rendering + sum(self.scheduler.load()) >= self.scheduler.capacity:
            raise _busy(1)
        self._num_rendering += 1
        try:
            prompts = await self._loop.run_in_executor(self._renderer, make)
        except LorafitError as error:
            problem = error.problems[0]
            message = ": ".join(part for part in (problem.message, problem.hint) if part)
            raise ApiError(400, message, code="invalid_prompt") from None
        finally:
            self._num_rendering -= 1
        for prompt in prompts:
            if not prompt:
                raise ApiError(400, "the prompt has no tokens", code="invalid_prompt")
            if len(prompt) >= self.context:
                message = (
                    f"the prompt has {len(prompt):,} tokens; with its answer it may have {self.context:,}"
                )
                raise ApiError(400, message, code="context_length_exceeded")
        return prompts

    def start(self, named: ServedModel, prompts: Sequence[Sequence[int]], options: Options) -> Job:
        """Queue the answers to `prompts`, prompt by prompt. Raises ApiError where no more can wait."""
        deadline = time.monotonic() + self.timeout
        tickets = [
            Ticket(
                Request(
                    prompt=prompt,
                    stop_ids=frozenset(named.renderer.contract.stop_ids),
                    max_tokens=options.max_tokens or self.context,
                    sampling=options.sampling,
                    stream=at * options.num + choice,
                    adapter=named.adapter,
                    top_logprobs=options.top_logprobs,
                ),
                deadline,
            )
            for at, prompt in enumerate(prompts)
            for choice in range(options.num)
        ]
        tokenizer = named.renderer.tokenizer
        texts = [AnswerText(tokenizer, options.stops, options.strip) for _ in tickets]
        job = Job(self, tickets, texts, sum(len(prompt) for prompt in prompts))
        self._jobs.update(dict.fromkeys(tickets, job))
        try:
            self.scheduler.submit(tickets)
        except QueueFullError as error:
            self.close(tickets)
            raise _busy(error.retry_after) from None
        except StoppedError:
            self.close(tickets)
            raise _failed("stopped") from None
        return job

    def close(self, tickets: Sequence[Ticket]) -> None:
        """Nobody waits for these any more."""
        self.scheduler.cancel(tickets)
        for ticket in tickets:
            self._jobs.pop(ticket, None)

    async def stop(self) -> None:
        """End the threads; what is still asked fails."""
        await self._loop.run_in_executor(None, self.scheduler.stop)
        self._renderer.shutdown(wait=False, cancel_futures=True)

    def _deliver(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: list[Event]) -> None:
        for ticket, event in events:
            if (job := self._jobs.get(ticket)) is not None:
                job.events.put_nowait((ticket, event))


def sampling_of(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling:
    """OpenAI's defaults; without a seed every request draws anew."""
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        seed=secrets.randbits(62) if seed is None else seed % 2**64,
    )


def _busy(retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"too many requests are waiting; try again in {retry_after} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def _failed(failure: str) -> ApiError:
    if failure == "late":
        return ApiError(504, "the answer was not ready in time", code="timeout")
    if failure == "stopped":
        return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
    return ApiError(500, "the answer could not be made; the server's log says why", code="internal_error")

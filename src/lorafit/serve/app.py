"""The API: its routes, what they read and what they answer, and the OpenAPI document that says so."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorafit.data.formats import Completion as PlainText
from lorafit.data.formats import Message, Role
from lorafit.infer.multi_adapter import ServedModel
from lorafit.serve.errors import ApiError
from lorafit.serve.jobs import Answering, Job, Options, Piece, sampling_of
from lorafit.serve.protocol import (
    ChatMessage,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    ErrorReply,
    Health,
    ModelEntry,
    ModelList,
)
from lorafit.serve.responses import Chat, Completion, events, usage, whole
from lorafit.version import __version__

T = TypeVar("T")
Log = Callable[[str], None]

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_ERRORS: dict[int, str] = {
    400: "The request cannot be honoured: what, and where.",
    401: "The token is missing or wrong.",
    403: "The Host or the Origin of the request is not this server's.",
    404: "There is no such model, or no such path.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    429: "Too many requests are waiting; `Retry-After` says when to try again.",
    500: "The answer could not be made.",
    503: "The server is stopping.",
    504: "The answer was not ready in time.",
}
_READ = (401, 403, 404, 500)
_POST = tuple(_ERRORS)
_STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "With `stream: true`: SSE."}}}


def make_app(answering: Callable[[], Answering], log: Log) -> FastAPI:
    """The application; `answering` is called, and its result stopped, with the server's event loop."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.answering = answering()
        yield
        await app.state.answering.stop()

    app = FastAPI(
        title="lorafit",
        version=__version__,
        description="Models tuned with lorafit, by OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # the pages that FastAPI has for it load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.log = log
    _add_routes(app)
    _add_handlers(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI) -> None:
    created = int(time.time())

    def entry(named: ServedModel) -> ModelEntry:
        return ModelEntry(id=named.name, created=created)

    @app.get("/health", responses=_errors(403, 500), operation_id="health")
    async def health() -> Health:
        """Whether the server is there, and how busy; needs no token."""
        active, waiting = _answering(app).scheduler.load()
        return Health(active=active, waiting=waiting)

    @app.get("/v1/models", responses=_errors(401, 403, 500), operation_id="list_models")
    async def list_models() -> ModelList:
        """The models that can be asked: adapters, and the base."""
        return ModelList(data=[entry(named) for named in _answering(app).models.named.values()])

    @app.get("/v1/models/{model:path}", responses=_errors(*_READ), operation_id="get_model")
    async def get_model(model: str) -> ModelEntry:
        """One model."""
        return entry(_answering(app).named(model))

    @app.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses={**_errors(*_POST), 200: {"content": _STREAM}},
        operation_id="chat",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation that ends in a user turn, asked as the model was trained."""
        answering = _answering(app)
        named = answering.named(body.model)
        messages = _messages(body.messages)
        prompts = await answering.render(lambda: [named.renderer.prompt_ids(messages)])
        options = Options(
            max_tokens=body.max_completion_tokens or body.max_tokens,
            sampling=sampling_of(body.temperature, body.top_k, body.top_p, body.seed),
            num=body.n or 1,
            stops=body.stops,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            strip=True,
        )
        job = answering.start(named, prompts, options)
        shape = Chat(answering.token_texts, bool(body.logprobs))
        return await _reply(app, request, body, job, shape, "chatcmpl-", options.num)

    @app.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses={**_errors(*_POST), 200: {"content": _STREAM}},
        operation_id="complete",
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on from a text, or from token ids, as they are; no template is put around them."""
        answering = _answering(app)
        named = answering.named(body.model)
        vocab_size = answering.models.network.arch.vocab_size
        prompts = await answering.render(lambda: _plain_prompts(named, body.prompt, vocab_size))
        options = Options(
            max_tokens=body.max_tokens or _COMPLETION_TOKENS,
            sampling=sampling_of(body.temperature, body.top_k, body.top_p, body.seed),
            num=body.n or 1,
            stops=body.stops,
            top_logprobs=body.logprobs,
            strip=False,
        )
        job = answering.start(named, prompts, options)
        shape = Completion(answering.token_texts, body.logprobs is not None)
        return await _reply(app, request, body, job, shape, "cmpl-", options.num * len(prompts))


def _answering(app: FastAPI) -> Answering:
    answering = app.state.answering
    assert isinstance(answering, Answering)
    return answering


async def _reply(
    app: FastAPI,
    request: Request,
    body: ChatRequest | CompletionRequest,
    job: Job,
    shape: Chat | Completion,
    prefix: str,
    num_choices: int,
) -> Response:
    """The whole reply, or the stream once its first piece is there: what fails before that has a status of its own."""
    started = time.monotonic()
    head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": body.model}

    def done(how: str) -> None:
        job.close()
        counts = usage(job)
        seconds = time.monotonic() - started
        app.state.log(
            f"{body.model}  {counts['prompt_tokens']} + {counts['completion_tokens']} tokens  {seconds:.2f} s"
            f"  {how}"
        )

    how = "failed"
    try:
        if not body.stream:
            reply = await _unless_gone(request.receive, whole(job, shape, head, num_choices))
            how = "answered" if reply is not None else "client gone"
            return JSONResponse(reply) if reply is not None else Response(status_code=499)
        pieces = job.pieces()
        first = await _unless_gone(request.receive, anext(pieces))
        if first is None:
            how = "client gone"
            return Response(status_code=499)
        sent = events(_after(first, pieces), job, shape, head, num_choices, body.includes_usage)
        how = ""
        return _EventStream(sent, done)
    finally:
        if how:
            done(how)


class _EventStream(Response):
    """Server-sent events; ends when they do or when the client has gone, and then calls `done` with how."""

    media_type = "text/event-stream"

    def __init__(self, sent: AsyncIterator[bytes], done: Callable[[str], None]) -> None:
        self.status_code, self.background, self.body = 200, None, b""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._sent, self._done = sent, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> bool:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._sent:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return True

        finished = None
        try:
            finished = await _unless_gone(receive, pump())
        finally:
            self._done("streamed" if finished else "client gone")


async def _after(first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in pieces:
        yield piece


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client goes away before it is there."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _messages(given: list[ChatMessage]) -> list[Message]:
    if given[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", code="invalid_messages", param="messages")
    roles: list[Role] = ["system" if message.role == "developer" else message.role for message in given]
    if "system" in roles[1:]:
        message = "a system message is only taken as the first one"
        raise ApiError(400, message, code="invalid_messages", param="messages")
    return [Message(role, message.text) for role, message in zip(roles, given, strict=True)]


def _plain_prompts(
    named: ServedModel, prompt: str | list[str] | list[int] | list[list[int]], vocab_size: int
) -> list[list[int]]:
    if isinstance(prompt, str):
        return [named.renderer.prompt_ids(PlainText(prompt, ""))]
    prompts: list[list[int]] = []
    several = [prompt] if isinstance(prompt[0], int) else prompt
    for one in several:
        if isinstance(one, str):
            prompts.append(named.renderer.prompt_ids(PlainText(one, "")))
        elif isinstance(one, list):
            ids = [int(token) for token in one]
            if max(ids) >= vocab_size:
                message = f"token {max(ids)} is not one of the model's {vocab_size:,}"
                raise ApiError(400, message, code="invalid_prompt", param="prompt")
            prompts.append(ids)
    return prompts


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        faults = error.errors()
        told = [f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:8]]
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        param = _place(faults[0]["loc"]) if faults else None
        return ApiError(400, "; ".join(told) + more, code="invalid_request", param=param).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.url.path}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def internal(_: Request, error: Exception) -> Response:
        app.state.log("".join(traceback.format_exception(error)).rstrip())
        return ApiError(
            500, "an error of the server's own; its log says more", code="internal_error"
        ).response()


def _place(where: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in where if part != "body") or "body"


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": _ERRORS[status]} for status in statuses}


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: with the token and the models that are there, and 400 where FastAPI would have 422."""
    if app.openapi_schema is None:
        names = list(_answering(app).models.named)
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in made["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path == "/health" else [{"token": []}]
                operation["responses"].pop("422", None)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for name in ("ChatRequest", "CompletionRequest"):
            schemas[name]["properties"]["model"] = {"type": "string", "title": "Model", "enum": names}
        made["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["schema"]["enum"] = names
        app.openapi_schema = made
    return app.openapi_schema

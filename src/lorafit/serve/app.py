"""The API: its routes, its error handlers and its OpenAPI document."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lorafit.data.formats import Chat, Completion, Fields, question
from lorafit.data.prompt import Renderer
from lorafit.errors import DataError, Problem
from lorafit.infer.multi_adapter import ServedModel
from lorafit.serve.body import read_body, short
from lorafit.serve.errors import ApiError
from lorafit.serve.jobs import AnswerService, Options, Prompt
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
from lorafit.serve.responses import ChatFormat, CompletionFormat, reply
from lorafit.version import __version__

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_ERRORS: dict[int, str] = {
    400: "The request is not valid: what is wrong, and where.",
    401: "The token is missing or wrong.",
    403: "The Host or the Origin of the request is not allowed.",
    404: "There is no such model, or no such path.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    429: "Too many requests are waiting. `Retry-After` is the time until the next try.",
    500: "The answer failed.",
    503: "The server is stopping.",
    504: "The answer was not ready in time.",
}
_SCHEMAS = "#/components/schemas/"
_STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "With `stream: true`: SSE."}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": _ERRORS[status]} for status in statuses}


def _body_of(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"{_SCHEMAS}{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


router = APIRouter()


@router.get("/health", responses=_errors(403, 500), operation_id="health")
async def health(request: Request) -> Health:
    """Whether the server runs, and its load. Needs no token."""
    active, waiting = _service(request.app).scheduler.load()
    return Health(active=active, waiting=waiting)


@router.get("/v1/models", responses=_errors(401, 403, 500), operation_id="list_models")
async def list_models(request: Request) -> ModelList:
    """The served models: adapters, and the base."""
    app = request.app
    return ModelList(
        data=[ModelEntry(id=name, created=app.state.created) for name in _service(app).models.named]
    )


@router.get("/v1/models/{model:path}", responses=_errors(401, 403, 404, 500), operation_id="get_model")
async def get_model(model: str, request: Request) -> ModelEntry:
    """One model."""
    return ModelEntry(id=_service(request.app).named(model).name, created=request.app.state.created)


@router.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    responses={**_errors(*_ERRORS), 200: {"content": _STREAM}},
    operation_id="chat",
    openapi_extra=_body_of(ChatRequest),
)
async def chat(request: Request) -> Response:
    """Answer a conversation that ends in a user turn, rendered as in the model's training."""
    service = _service(request.app)
    num_bytes = len(await request.body())
    async with service.turn(num_bytes):
        body = await read_body(request, ChatRequest, service.thread(num_bytes))
        served = service.named(body.model)
        _check_roles(body.messages)
        _check_template_args(served, body.chat_template_kwargs or {})
        prompts = await service.render(served, num_bytes, lambda: [_chat(body, served.renderer)])
    options = Options(
        max_tokens=_limit(body.max_completion_tokens or body.max_tokens),
        sampling=body.sampling(),
        num=body.n or 1,
        stops=body.stops,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        strip=True,
    )
    return await reply(
        request, body, service.start(served, prompts, options), ChatFormat(service.token_texts)
    )


@router.post(
    "/v1/completions",
    response_model=CompletionReply,
    responses={**_errors(*_ERRORS), 200: {"content": _STREAM}},
    operation_id="complete",
    openapi_extra=_body_of(CompletionRequest),
)
async def complete(request: Request) -> Response:
    """Continue a text, or token ids. No template is applied."""
    service = _service(request.app)
    vocab_size = service.models.network.arch.vocab_size
    num_bytes = len(await request.body())
    async with service.turn(num_bytes):
        body = await read_body(request, CompletionRequest, service.thread(num_bytes))
        served = service.named(body.model)
        prompts = await service.render(
            served, num_bytes, lambda: _completion_prompts(body.prompt, vocab_size)
        )
    options = Options(
        max_tokens=_limit(body.max_tokens or _COMPLETION_TOKENS),
        sampling=body.sampling(),
        num=body.n or 1,
        stops=body.stops,
        top_logprobs=body.logprobs,
        strip=False,
    )
    job = service.start(served, prompts, options)
    return await reply(request, body, job, CompletionFormat(service.token_texts))


def make_app(make_service: Callable[[], AnswerService], log: Callable[[str], None]) -> FastAPI:
    """The application. `make_service` is called on the server's event loop; its result is stopped at the end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = make_service()
        yield
        await app.state.service.stop()

    app = FastAPI(
        title="lorafit",
        version=__version__,
        description="Models trained with lorafit, served with OpenAI's API.",
        lifespan=lifespan,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
        docs_url=None,  # FastAPI's pages load scripts from other sites
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.log, app.state.created = log, int(time.time())
    app.include_router(router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _service(app: FastAPI) -> AnswerService:
    service = app.state.service
    assert isinstance(service, AnswerService)
    return service


def _limit(max_tokens: int | None) -> int | None:
    """The most tokens of an answer, None for the rest of the context."""
    return None if max_tokens == -1 else max_tokens


def _check_roles(turns: Sequence[ChatMessage]) -> None:
    """Raise ApiError where nothing is asked, or a system message is not at the start."""
    roles = [turn.role for turn in turns]
    message = ""
    if roles[-1] not in ("user", "tool"):
        message = "the last message must be the user's, or a tool's result"
    elif "system" in roles[1:] or "developer" in roles[1:]:
        message = "only the first message can be a system message"
    if message:
        raise ApiError(400, message, code="invalid_messages", param="messages")


def _chat(body: ChatRequest, renderer: Renderer) -> Chat:
    """The conversation, read as a row of data. Raises DataError.

    Clients send the reasoning of earlier answers back; a template without a place for it gets none.
    """
    problems: list[Problem] = []
    tools = None if body.tool_choice == "none" else body.tools
    row = Fields(
        {"messages": [turn.row() for turn in body.messages], "tools": tools}, "the request", problems
    )
    chat = question(row)
    problems += [Problem(f"the prompt has no place for {key}", hint="remove it") for key in row.unused]
    if problems:
        raise DataError.of(problems)
    if not renderer.shows_reasoning:
        chat = replace(chat, messages=tuple(replace(turn, reasoning="") for turn in chat.messages))
    return chat


def _check_template_args(served: ServedModel, given: Mapping[str, Any]) -> None:
    """Raise ApiError for a variable of the template that differs from the model's training."""
    fixed = served.renderer.contract.template_args
    for name, value in given.items():
        if name not in fixed or fixed[name] != value:
            field = f"chat_template_kwargs.{short(name)}"
            message = (
                f"{field}: the prompt is that of the training, where data.template_args has no such value"
            )
            raise ApiError(400, message, code="invalid_request", param=field)


def _completion_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], vocab_size: int
) -> list[Prompt]:
    prompts: list[Prompt] = []
    for one in [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt:
        if isinstance(one, str):
            prompts.append(Completion(one, ""))
        elif isinstance(one, list):
            ids = [int(token) for token in one]
            if max(ids) >= vocab_size:
                message = f"token {max(ids)} is not in the model's vocabulary of {vocab_size:,}"
                raise ApiError(400, message, code="invalid_prompt", param="prompt")
            prompts.append(ids)
    return prompts


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_missing = error.status_code == 404
    message = f"there is nothing at {request.url.path}" if is_missing else str(error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _internal_error(request: Request, error: Exception) -> Response:
    request.app.state.log("".join(traceback.format_exception(error)).rstrip())
    return ApiError(500, "an internal error; see the server's log", code="internal_error").response()


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the token, the names of the models, and 400 in place of FastAPI's 422."""
    if app.openapi_schema is None:
        names = list(_service(app).models.named)
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path == "/health" else [{"token": []}]
                operation["responses"].pop("422", None)
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _, bodies = models_json_schema(
            [(ChatRequest, "validation"), (CompletionRequest, "validation")],
            ref_template=_SCHEMAS + "{model}",
        )
        schemas.update(bodies["$defs"])
        for name in ("ChatRequest", "CompletionRequest"):
            schemas[name]["properties"]["model"] = {"type": "string", "title": "Model", "enum": names}
        document["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["schema"]["enum"] = names
        app.openapi_schema = document
    return app.openapi_schema

"""Requests made from the server's own OpenAPI document and from thin air: every reply is one that it knows."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, core, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine
from hypothesis.strategies._internal import collections
from tests.effort import is_slower
from tests.serve.live import TOKEN, Live, live, write_and_load
from tests.serve.shapes import REQUESTS, ask, bodies, pause_of, wires
from tests.waiting import HANGS

from lorafit.serve.body import parse
from lorafit.serve.errors import ApiError

with (
    pytest.MonkeyPatch.context() as patch
):  # schemathesis changes hypothesis for all tests when it is imported
    for module, name in (
        (core, "RepresentationPrinter"),
        (engine, "BUFFER_SIZE"),
        (collections, "BUFFER_SIZE"),
    ):
        patch.setattr(module, name, getattr(module, name))
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.generation.hypothesis import setup
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    setup()  # else it is done with the first schema

EXAMPLES = int(os.environ.get("LORAFIT_FUZZ_EXAMPLES") or 20)  # `make fuzz-serve` asks for more
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
bounded = settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(write_and_load(tmp_path_factory.mktemp("models")), slots=16, queue=64, context=24) as running:
        yield running


@pytest.fixture(scope="module")
def api(there: Live) -> Any:
    return schemathesis.openapi.from_url(f"{there.url}/openapi.json", headers=HEADERS)


OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
]


@pytest.mark.hypothesis
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_reply_is_one_of_the_document(mode: GenerationMode, method: str, path: str, api: Any) -> None:
    """Valid and invalid requests: status, type and shape of the reply, methods, the token, and no fault of ours.

    A request may have the right shape and still not be answerable: a conversation that ends in the assistant's turn.
    """
    operation = api[path][method]
    if mode == GenerationMode.NEGATIVE and path in ("/health", "/v1/models"):
        pytest.skip("nothing can be wrong with it")

    @bounded
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        reply = case.call_and_validate(
            headers=HEADERS, excluded_checks=[positive_data_acceptance], timeout=HANGS
        )
        assert reply.status_code in (200, 400, 401, 404, 405)

    ask()


def test_the_import_of_schemathesis_leaves_hypothesis_as_it_was() -> None:
    assert core.RepresentationPrinter.__module__ == "hypothesis.vendor.pretty"
    assert engine.BUFFER_SIZE == collections.BUFFER_SIZE == 8 * 1024


def test_there_are_no_other_operations(api: Any) -> None:
    assert [(found.ok().method.upper(), found.ok().path) for found in api.get_all_operations()] == OPERATIONS


FINITE = st.floats(
    allow_nan=False, allow_infinity=False
)  # what JSON has no word for, the client refuses to send
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]),
        "content": st.text(max_size=30) | st.just([{"type": "text", "text": "Hi"}]),
    }
)
NEARLY = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["one", "two", "base"]),
        "messages": st.lists(MESSAGE, min_size=1, max_size=4).map(
            lambda some: [*some, {"role": "user", "content": "?"}]
        )
        | st.lists(MESSAGE, max_size=4),
    },
    optional={
        "temperature": st.floats(0, 2) | JSON,
        "top_p": st.floats(0, 1) | JSON,
        "top_k": st.integers(0, 300),
        "n": st.integers(1, 4),
        "max_tokens": st.integers(1, 9) | JSON,
        "max_completion_tokens": st.integers(1, 9),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | JSON,
        "seed": st.integers(),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(-1, 21),
        "stream": st.booleans(),
        "user": JSON,
        "anything": JSON,
    },
)


@bounded
@given(st.one_of(NEARLY, NEARLY, JSON))
def test_any_body_is_answered_or_refused_with_a_reason(there: Live, body: object) -> None:
    reply = there.client.post("/v1/chat/completions", json=body)
    assert reply.status_code in (200, 400)
    if reply.status_code == 400:
        error = reply.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
        assert not re.search(
            r"function-|functools|tagged-union|list\[|Extra inputs|0x[0-9a-f]{6}", error["param"]
        )
        assert not re.search(r"function-|functools|tagged-union|Value error| at 0x", error["message"])
        return
    assert isinstance(body, dict)
    if body.get("stream"):
        assert reply.text.endswith("data: [DONE]\n\n")
        return
    answer = reply.json()
    schemas = there.client.get("/openapi.json").json()
    jsonschema.validate(
        answer, {"$ref": "#/components/schemas/ChatReply", "components": schemas["components"]}
    )
    assert len(answer["choices"]) == body.get("n", 1)
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    for choice in answer["choices"]:
        assert not any(stop and stop in choice["message"]["content"] for stop in stops)
    there.until(lambda: there.load() == (0, 0))


@bounded
@given(st.binary(max_size=200), st.sampled_from(["application/json", "text/plain", "*", ""]))
def test_any_bytes_are_refused_with_a_reason(there: Live, content: bytes, kind: str) -> None:
    reply = httpx.post(
        f"{there.url}/v1/completions",
        content=content,
        headers={**HEADERS, "Content-Type": kind},
        timeout=HANGS,
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


@bounded
@given(bodies())
def test_no_body_holds_the_loop(there: Live, body: tuple[str, bytes]) -> None:
    assert ask(there, *body) in (b"200", b"400")
    assert not is_slower(min(pause_of(there, *body) for _ in range(2)), 0.05)


@bounded
@given(bodies())
def test_no_body_takes_much_memory_or_has_a_long_answer(body: tuple[str, bytes]) -> None:
    path, content = body
    tracemalloc.start()
    try:
        with contextlib.suppress(ApiError):
            parse(content, REQUESTS[path])
        assert tracemalloc.get_traced_memory()[1] < 40e6  # beside the bytes that arrive
    finally:
        tracemalloc.stop()


@bounded
@given(wires)
def test_any_bytes_on_a_connection_are_answered_or_closed(there: Live, pieces: list[bytes]) -> None:
    with there.connect() as connection, contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
        statuses = re.findall(rb"^HTTP/1\.1 (\d+)", answers, re.MULTILINE)
        assert set(statuses) <= {b"100", b"200", b"400", b"401", b"403", b"404", b"405"}, answers
    assert there.client.get("/health").status_code == 200

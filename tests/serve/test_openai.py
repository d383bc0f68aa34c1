"""What the real openai client gets from a live server: its own types, the tokens that `lorafit generate` gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.serve.live import TOKEN, Live, live, write_and_load

from lorafit.data.formats import Completion, Message
from lorafit.infer.model import Model
from lorafit.infer.multi_adapter import Models
from lorafit.infer.sampling import Sampling
from lorafit.serve.protocol import ChatRequest, CompletionRequest, Only

QUESTIONS = [
    "What is a llama?",
    "라마가 뭐야?",
    "Say 7.",
    "And then, what else is there to be said of llamas?",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_and_load(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def there(models: Models) -> Iterator[Live]:
    with live(models, slots=4, queue=64, context=2048) as running:
        yield running


@pytest.fixture(scope="module")
def client(there: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{there.url}/v1", api_key=TOKEN, max_retries=0) as made:
        yield made


def generated(
    models: Models, name: str, question: str, most: int = 12, sampling: Sampling | None = None
) -> str:
    """As infer/model.py answers, with the adapter alone."""
    named = models.named[name]
    models.adapters.take([named.adapter])
    messages = [Message("user", question)]
    model = Model(models.network, named.renderer)
    return model.generate([messages], max_tokens=most, sampling=sampling)[0].text


@pytest.fixture(scope="module")
def answers(models: Models) -> dict[tuple[str, str], str]:
    """Of all models to all questions, made before anything is asked over HTTP."""
    return {
        (name, question): generated(models, name, question) for name in models.named for question in QUESTIONS
    }


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["one", "two", "base"]
    assert client.models.retrieve("two").owned_by == "lorafit"
    with pytest.raises(
        openai.NotFoundError, match="there is no model `three`; there are `one`, `two`, `base`"
    ):
        client.models.retrieve("three")


def test_greedy_answers_are_those_of_generate_alone_and_among_strangers(
    answers: dict[tuple[str, str], str], client: openai.OpenAI
) -> None:
    def ask(name: str, question: str) -> str:
        done = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=12
        )
        return done.choices[0].message.content or ""

    assert len(set(answers.values())) == len(answers)
    assert {key: ask(*key) for key in answers} == answers
    together: dict[tuple[str, str], str] = {}
    threads = [
        threading.Thread(target=lambda key=key: together.update({key: ask(*key)}))  # type: ignore[misc]
        for key in answers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == answers


def test_a_stream_is_the_same_answer_in_pieces(
    answers: dict[tuple[str, str], str], client: openai.OpenAI
) -> None:
    with client.chat.completions.create(
        model="one",
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    ) as chunks:
        *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    texts = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(texts) == answers["one", QUESTIONS[0]]
    assert len([text for text in texts if text]) > 3
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert {part.usage for part in parts} == {None}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12
    assert last.usage.total_tokens == last.usage.prompt_tokens + 12
    assert len({part.id for part in (*parts, last)}) == 1


def test_several_choices_are_the_rows_of_one_seed(models: Models, client: openai.OpenAI) -> None:
    def ask(number: int | None, seed: int | None, name: str = "two") -> list[str]:
        done = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": QUESTIONS[2]}],
            temperature=1.4,
            top_p=0.95,
            max_tokens=10,
            n=number,
            seed=seed,
        )
        assert [choice.index for choice in done.choices] == list(range(number or 1))
        return [choice.message.content or "" for choice in done.choices]

    four = ask(4, 5)
    assert len(set(four)) == 4
    assert ask(4, 5) == four
    assert ask(None, 5) == four[:1]
    assert ask(4, 6) != four
    assert ask(1, None) != ask(1, None)
    assert ask(1, -1) == ask(1, -1)


def test_a_stream_of_several_choices_holds_each_whole(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": QUESTIONS[2]}
    whole = client.chat.completions.create(model="one", messages=[question], n=3, seed=9, max_tokens=9)  # type: ignore[list-item]
    texts = ["", "", ""]
    for part in client.chat.completions.create(
        model="one",
        messages=[question],
        n=3,
        seed=9,
        max_tokens=9,
        stream=True,  # type: ignore[list-item]
    ):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_text_ends_the_answer_before_it(
    answers: dict[tuple[str, str], str], client: openai.OpenAI
) -> None:
    full = answers["one", QUESTIONS[0]]
    stop = full[4:6]
    done = client.chat.completions.create(
        model="one",
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        temperature=0,
        max_tokens=12,
        stop=["never said", stop],
    ).choices[0]
    assert done.message.content == full[: full.index(stop)].strip()
    assert done.finish_reason == "stop"


def test_log_probabilities_come_with_their_tokens(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="one",
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    plain = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert plain.choices[0].logprobs is None


def test_a_conversation_is_rendered_whole(models: Models, client: openai.OpenAI) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]},
        {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "And?"},
    ]
    done = client.chat.completions.create(model="one", messages=turns, max_tokens=1)  # type: ignore[arg-type]
    rendered = models.named["one"].renderer.prompt_ids(
        [
            Message("system", "Be brief."),
            Message("user", "Hi there"),
            Message("assistant", "Hello"),
            Message("user", "And?"),
        ]
    )
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(rendered)


def test_plain_completions_go_on_from_texts_and_tokens(models: Models, client: openai.OpenAI) -> None:
    named = models.named["base"]
    texts = ["The llama", "Once "]
    ids = [named.renderer.prompt_ids(Completion(text, "")) for text in texts]
    done = client.completions.create(model="base", prompt=texts, temperature=0, max_tokens=6, n=2, logprobs=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.choices[0].text == done.choices[1].text != done.choices[2].text == done.choices[3].text
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (sum(map(len, ids)), 24)
    by_ids = client.completions.create(model="base", prompt=ids, temperature=0, max_tokens=6)
    assert [choice.text for choice in by_ids.choices] == [done.choices[0].text, done.choices[2].text]
    one = client.completions.create(model="base", prompt=ids[0], temperature=0)
    assert one.choices[0].text.startswith(done.choices[0].text)
    assert one.usage is not None
    assert one.usage.completion_tokens == 16
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:at])) for at in range(6)]
    assert [len(top) for top in logprobs.top_logprobs or []] == [2] * 6
    parts = client.completions.create(model="base", prompt=texts[0], temperature=0, max_tokens=6, stream=True)
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text


def test_top_k_is_taken_from_the_body(client: openai.OpenAI) -> None:
    def ask(**more: object) -> str | None:
        return (
            client.chat.completions.create(
                model="one",
                messages=[{"role": "user", "content": "Hi"}],
                temperature=2,
                seed=1,
                max_tokens=8,
                extra_body=more,
            )
            .choices[0]
            .message.content
        )

    greedy = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=8
    )
    assert ask(top_k=1) == greedy.choices[0].message.content != ask()


def test_an_answer_may_fill_the_context_and_a_prompt_may_not(client: openai.OpenAI) -> None:
    long = client.completions.create(model="base", prompt=[65] * 2040, temperature=0, max_tokens=5000)
    assert long.usage is not None
    assert long.usage.total_tokens == 2048
    assert long.choices[0].finish_reason == "length"
    with pytest.raises(
        openai.BadRequestError, match="has 2,048 tokens; the context with its answer is 2,048"
    ):
        client.completions.create(model="base", prompt=[65] * 2048)


BAD = {
    "model": ({"model": "none"}, openai.NotFoundError, "there is no model `none`"),
    "unknown key": (
        {"extra_body": {"tempature": 1}},
        openai.BadRequestError,
        "tempature: this server has no such field",
    ),
    "type": ({"temperature": "1"}, openai.BadRequestError, "temperature: Input should be a valid number"),
    "range": ({"temperature": 3}, openai.BadRequestError, "less than or equal to 2"),
    "not done here": ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
    "tools": ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
    "empty": ({"messages": []}, openai.BadRequestError, "messages"),
    "last": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        openai.BadRequestError,
        "the last message must be the user's",
    ),
    "late system": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}] * 2},
        openai.BadRequestError,
        "the last message must be the user's",
    ),
    "system": (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "system", "content": "y"},
                {"role": "user", "content": "z"},
            ]
        },
        openai.BadRequestError,
        "only the first message can be a system message",
    ),
    "lonely": ({"top_logprobs": 2}, openai.BadRequestError, "`top_logprobs` needs `logprobs: true`"),
    "noncharacter": (
        {"messages": [{"role": "user", "content": "a\ufdd0b"}]},
        openai.BadRequestError,
        "noncharacter",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_honoured_is_refused_in_openais_words(name: str, client: openai.OpenAI) -> None:
    changes, kind, message = BAD[name]
    request = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **changes}
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**request)
    assert message in refused.value.message
    assert isinstance(refused.value.body, dict)
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def fields_of(model: type[BaseModel]) -> dict[str, Only]:
    """The fields of a request that accept only what changes nothing."""
    return {
        name: only
        for name, field in model.model_fields.items()
        for only in field.metadata
        if isinstance(only, Only)
    }


HELLO = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
CONTINUE = {"model": "one", "prompt": "Hi", "max_tokens": 4, "temperature": 0}
NO_EFFECT = [
    *({"user": "u", "service_tier": tier, "prompt_cache_key": "k"} for tier in ("auto", "default", None)),
    *({"stop": value} for value in ("", [], [""], None)),
    *({"top_k": value} for value in (-1, 0)),
    {"n": 1, "top_p": 1, "stream_options": {"include_usage": True}},
    {"stream_options": {"include_obfuscation": False}},
]
NO_EFFECT_IN_CHATS = [
    {
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "store": False,
        "response_format": {"type": "text"},
    },
    {"parallel_tool_calls": False, "logprobs": False, "top_logprobs": 0},
    {"max_completion_tokens": 4, "max_tokens": -1, "chat_template_kwargs": {}},
]


def differing(reply: Any) -> Any:
    """A reply without what differs from one request to the next."""
    return {key: value for key, value in reply.json().items() if key not in ("id", "created")}


@pytest.mark.parametrize(
    ("path", "body", "model", "more"),
    [
        ("chat/completions", HELLO, ChatRequest, [*NO_EFFECT, *NO_EFFECT_IN_CHATS]),
        ("completions", CONTINUE, CompletionRequest, NO_EFFECT),
    ],
    ids=["chat", "completions"],
)
def test_values_that_change_nothing_are_taken_and_all_others_are_refused_by_name(
    path: str, body: dict[str, Any], model: type[BaseModel], more: list[dict[str, Any]], there: Live
) -> None:
    plain = differing(there.client.post(f"/v1/{path}", json=body))
    assert plain["choices"]
    neutral = [{name: value} for name, only in fields_of(model).items() for value in only.values]
    for changes in [*neutral, *more]:
        assert differing(there.client.post(f"/v1/{path}", json={**body, **changes})) == plain, changes
    for name, only in fields_of(model).items():
        for value in (0.5, 7, "x", ["x"], {"x": 1}, True, False):
            if all(value != known or isinstance(known, bool) for known in only.values):
                if isinstance(value, bool) and value in only.values:
                    continue
                reply = there.client.post(f"/v1/{path}", json={**body, name: value})
                assert reply.status_code == 400, (name, value)
                assert reply.json()["error"]["param"] == name
                assert reply.json()["error"]["message"].startswith(f"{name}: this server does not support it")


def test_no_limit_is_the_rest_of_the_context(client: openai.OpenAI) -> None:
    prompt = [65] * 2045
    for limit in (-1, 3):
        reply = client.completions.create(model="base", prompt=prompt, temperature=0, max_tokens=limit)
        assert reply.usage is not None
        assert reply.usage.total_tokens == 2048
    with pytest.raises(openai.BadRequestError, match="max_tokens: it is 1 or more; -1 is no limit"):
        client.completions.create(model="base", prompt=prompt, max_tokens=0)


def test_turns_of_real_histories_are_taken(there: Live) -> None:
    def answer(turn: dict[str, Any]) -> Any:
        turns = [{"role": "user", "content": "a"}, turn, {"role": "user", "content": "d"}]
        reply = there.client.post("/v1/chat/completions", json={**HELLO, "messages": turns})
        assert reply.status_code == 200, reply.text
        return differing(reply)

    said, nothing = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": ""}
    plain = answer(said)
    for extra in ({"reasoning_content": None}, {"id": "m1", "refusal": None}, {"tool_calls": [], "name": ""}):
        assert answer({**said, **extra}) == plain
    assert answer({**said, "content": [{"type": "text", "text": "b"}]}) == plain
    assert answer({**nothing, "content": None}) == answer({"role": "assistant"}) == answer(nothing)


FAULTS = [
    ({"messages": [{"role": "user", "content": None}]}, "messages.0", "the role `user` needs `content`"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "it is a text or a list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0",
        "only parts of type `text` are supported",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "missing"),
    ({"messages": ["Hi"]}, "messages.0", "it is a JSON object"),
    ({"stop": 7}, "stop", "it is a text or a list of texts"),
    ({"stop": [7]}, "stop.0", "valid string"),
    ({"stop": "x" * 1001}, "stop", "at most 1000 characters"),
    ({"tool_choice": "required"}, "tool_choice", 'only "none" or "auto" or null'),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
    (
        {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs.enable_thinking",
        "the prompt is that of the training",
    ),
    ({"guided_json": {}}, "guided_json", "this server has no such field"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
]


@pytest.mark.parametrize(("changes", "param", "words"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_a_fault_is_named_by_its_place_and_in_plain_words(
    changes: dict[str, Any], param: str, words: str, there: Live
) -> None:
    reply = there.client.post("/v1/chat/completions", json={**HELLO, **changes})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert error["message"].count(param) == 1  # one fault, one message


def test_the_wrong_token_is_an_authentication_error(there: Live) -> None:
    stranger = openai.OpenAI(base_url=f"{there.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()

"""What is shown, stored or published holds no secret, steers no terminal and says the same."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.check.verdict import MAX_LISTED, of_error
from lorafit.errors import ModelError, Problem
from lorafit.export.card import redacted
from lorafit.redact import json_line, one_line, printable, redact, visible

STEERING = "\x1b\x07\x7f\x9b\u061c\u200b\u200e\u200f\u2028\u2029\u202e\u2060\u2066\ufeff\ud800"
values = st.recursive(
    st.text() | st.sampled_from(list(STEERING)) | st.integers(), lambda inner: st.lists(inner)
)
OF_THE_ENVIRONMENT = {
    "HF_TOKEN": "plain-word-of-a-token",
    "PGPASS": "correct horse battery",
    "DB_CREDENTIALS": "scott/tiger/oracle",
    "API_KEY_ID": "key.with$signs^(in)it",
    "MY_API_KEY2": "k9#x2!",
    "SECRET_OF_THE_HOUSE": "\u00e9t\u00e9-\u00e0-la-mer",
    "MYSQL_PASSWD": "mysql~passwd~1",
}
OF_DOTENV = {"COMET_API_KEY": "canary~dotenv~comet~55", "SMTP_PASSWORD": "smtp mail word"}
HARMLESS_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "parallel-or-not",
    "KEYBOARD_LAYOUT": "keyboard-layout",
    "SSH_ASKPASS": "/usr/bin/ssh-askpass",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/me/credentials",
    "SORT_KEY": "number",
    "EMPTY_TOKEN": "",
}
ORDINARY = (
    "skateboarding-tutorials",
    "sk-learn-pipelines-and-transformers",
    "task-scheduling-benchmark",
    "hf_hub_download_progress_bars",
    "hf_model_weights_8bit",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "highs_and_lows_of_a_season",
    "api_org_settings_page",
    "runs/Llama-3.2-1B-Instruct-20261130-041500/checkpoints/step-000200",
    "/home/me/.cache/huggingface/hub/models--owner--name/snapshots",
    "https://huggingface.co/owner/name@main",
    "owner/TinyLlama-1.1B-Chat-v1.0-risk-free",
    "AKIAplaintext",
    "number",
    *(value for name, value in HARMLESS_VARIABLES.items() if value),
)
letters_and_digits = string.ascii_letters + string.digits
words = st.text(st.characters(categories=("L",)), min_size=1, max_size=14)
around = st.sampled_from(
    ["", " ", "\n", "=", ": ", "'", '"', "/", "\\n", "(", "?token=", "\u00e9", "[", "-x "]
)


def random_body(size: int, alphabet: str = letters_and_digits) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=size, max_size=size)


TOKENS = st.one_of(
    random_body(34, string.ascii_letters).map("hf_".__add__),
    random_body(34, string.ascii_letters).map("api_org_".__add__),
    st.tuples(random_body(22), random_body(59)).map(lambda parts: f"github_pat_{parts[0]}_{parts[1]}"),
    st.tuples(st.sampled_from("pousr"), random_body(36)).map(lambda parts: f"gh{parts[0]}_{parts[1]}"),
    random_body(48).map("sk-".__add__),
    st.tuples(st.sampled_from(["proj", "ant-api03", "svcacct"]), random_body(48))
    .map("-".join)
    .map("sk-".__add__),
    random_body(24).map("sk_live_".__add__),
    random_body(20).map("glpat-".__add__),
    st.tuples(st.sampled_from("abeprs"), random_body(12, string.digits), random_body(24)).map(
        lambda parts: f"xox{parts[0]}-{parts[1]}-{parts[2]}"
    ),
    random_body(16, string.ascii_uppercase + string.digits).map("AKIA".__add__),
)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (OF_THE_ENVIRONMENT | HARMLESS_VARIABLES).items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("here")
        Path(folder / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in OF_DOTENV.items()))
        patch.chdir(folder)
        yield


@pytest.mark.parametrize("remove", [redact, one_line, redacted])
@given(
    secret=TOKENS | st.sampled_from([*OF_THE_ENVIRONMENT.values(), *OF_DOTENV.values()]),
    before=around,
    after=around,
    text=st.lists(words, max_size=4).map(" ".join),
)
def test_a_secret_of_any_kind_vanishes_in_any_position(
    remove: Any, secret: str, before: str, after: str, text: str
) -> None:
    if len(secret) < 8:  # a short one counts as a whole word only
        after = after.replace("\u00e9", "")
        before = before.replace("\u00e9", "").replace("\\n", "")
    hidden = remove(f"{text} {before}{secret}{after} {text}")
    assert secret not in hidden
    assert "***" in hidden


@given(login=random_body(9), text=words)
def test_the_login_in_a_url_vanishes(login: str, text: str) -> None:
    url = f"https://user:{login}@example.org/{text}.json"
    assert redact(f"{text} {url}") == f"{text} https://***@example.org/{text}.json"


@given(st.lists(words | st.sampled_from(ORDINARY), min_size=1, max_size=6), st.sampled_from(" -/_.\n"))
def test_words_paths_and_hyphenated_names_never_change(parts: list[str], joint: str) -> None:
    text = joint.join(part.lower() if joint in "-_" else part for part in parts)
    assert redact(text) == text


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_name_stays(text: str) -> None:
    assert redact(text) == one_line(text) == text


@given(value=values)
def test_a_line_of_json_is_the_value_and_steers_nothing(value: Any) -> None:
    line = json_line(value)
    assert json.loads(line) == value
    assert not set(line) & set(STEERING + "\r\n")


@given(st.text(st.characters() | st.sampled_from(STEERING)))
def test_what_steers_or_is_unseen_is_named_or_removed(text: str) -> None:
    assert not set(visible(text) + printable(text) + one_line(text)) & set(STEERING)
    plain = "".join(character for character in text if visible(character) == character)
    assert visible(plain) == printable(plain) == plain
    assert re.sub(r"<U\+[0-9A-F]{4}>", "", visible(text)) == re.sub(r"<U\+[0-9A-F]{4}>", "", plain)


def test_other_text_stays_readable() -> None:
    assert json_line({"answer": "안녕하세요, é"}) == '{"answer": "안녕하세요, é"}'
    assert visible("a\u202eb\tc\n") == "a<U+202E>b\tc\n"
    assert one_line(" a\x1bb \n\tc\td") == "a\\u001bb c\\td"


def test_a_hundred_thousand_problems_become_verdicts_that_one_can_list() -> None:
    found = of_error(ModelError.of([Problem(f"weight {n} has no place") for n in range(100_000)], num_more=5))
    assert len(found) == MAX_LISTED + 1
    assert found[-1].message == f"{100_005 - MAX_LISTED:,} more problems"

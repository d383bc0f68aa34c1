"""What is shown, stored or published holds no secret, steers no terminal and says the same."""

from __future__ import annotations

import html
import json
import re
import shlex
import string
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.command import Cli
from tests.effort import is_slower
from tests.report.runs import write_run

import lorafit.cli
from lorafit.check.verdict import MAX_LISTED, of_error
from lorafit.distributed.env import ProcessEnv
from lorafit.errors import ModelError, Problem
from lorafit.export.card import redacted
from lorafit.redact import dotenv, json_line, one_line, printable, redact, visible, without_secrets
from lorafit.report.page import page
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory
from lorafit.training import setup

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


# Texts that are encoded: quotes, backslashes, other scripts, blanks at which YAML wraps a line

NASTY = {
    "DB_PASSWORD": 'pa"ss\\word12',
    "A_TOKEN": "tok'en & <b>\u00e9\u4e2d",
    "B_SECRET": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "C_KEY": "tab\tand\nline",
    "D_PASSPHRASE": "${not} `expanded` $1\u2028",
}
ENCODERS: dict[str, Callable[[Any], str]] = {
    "JSON": json.dumps,
    "JSON of all characters": lambda value: json.dumps(value, ensure_ascii=False, indent=1),
    "YAML": lambda value: yaml.safe_dump(value, allow_unicode=True),
    "YAML in ASCII": yaml.safe_dump,
    "HTML": lambda value: html.escape(str(value)),
    "Python": repr,
}


@pytest.fixture
def nasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NASTY.items():
        monkeypatch.setenv(name, value)


def leaks_of(text: str) -> list[str]:
    """The secrets that are in `text`, or in a value that a reader of JSON, YAML or HTML finds in it."""
    readings = [text, html.unescape(text)]
    for read in (json.loads, yaml.safe_load):
        with suppress(ValueError, yaml.YAMLError):
            readings.append("\n".join(texts_in(read(text))))
    encoded = {
        value: [encode(value).strip("'\"") for encode in (repr, json.dumps)] for value in NASTY.values()
    }
    return [
        value
        for value, forms in encoded.items()
        if any(form in reading for form in (value, *forms) for reading in readings)
    ]


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for pair in value.items() for item in pair for text in texts_in(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in texts_in(item))
    else:
        yield str(value)


@pytest.mark.usefixtures("nasty")
@pytest.mark.parametrize("name", ENCODERS)
def test_a_secret_is_removed_before_a_value_is_encoded(name: str) -> None:
    value = {f"key {secret}": [f"a {secret} b", {"c": (secret, 1, None)}] for secret in NASTY.values()}
    encode = ENCODERS[name]
    assert leaks_of(encode(without_secrets(value))) == []
    assert encode(without_secrets({"a": ["b", 1.5, True, None]})) == encode({"a": ["b", 1.5, True, None]})
    assert leaks_of(encode(value)) != []  # else nothing is tested here


@pytest.mark.usefixtures("nasty")
@given(
    secret=st.sampled_from([*NASTY.values()]),
    encode=st.sampled_from([repr, json.dumps, html.escape, shlex.quote, urllib.parse.quote]),
)
def test_a_secret_in_a_text_that_came_encoded_vanishes(secret: str, encode: Callable[[str], str]) -> None:
    """As in a traceback, a command or an address."""
    assert encode(secret).strip("'\"") not in redact(f"it was {encode(secret)}.")
    assert "***" in redact(f"it was {encode(secret)}.")


@pytest.mark.usefixtures("nasty")
def test_env_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["lorafit", "train", *(f"data.system={value}" for value in NASTY.values())]
    )
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.write_json(run.env_file, {**setup.environment(ProcessEnv()), "note": [*NASTY.values()]})
    assert leaks_of(run.env_file.read_text()) == []
    assert run.read_json(run.env_file)["command"].startswith("lorafit train ")


@pytest.mark.usefixtures("nasty")
def test_the_report_of_a_run_whose_command_was_not_cleaned(tmp_path: Path) -> None:
    run = RunDirectory(write_run(tmp_path / "run", 4))
    env = json.loads(run.env_file.read_text())
    for secret in NASTY.values():
        run.env_file.write_text(json.dumps({**env, "command": f"lorafit train {secret}"}))
        assert leaks_of(page(read_facts(run))) == []
        assert "lorafit train" in page(read_facts(run))


@pytest.mark.usefixtures("nasty")
@pytest.mark.parametrize("secret", NASTY.values())
def test_what_a_command_prints_for_a_script(secret: str, cli: Cli) -> None:
    for words in (["--data", "rows.json", f"lora.{secret}=1"], ["--data", f"{secret}.json"]):
        done = cli("check", *words, "--json")
        assert done.code == 2
        assert leaks_of(done.out) == []
        assert json.loads(done.out)["failed"]
        assert "***" in done.out or words[1] != "rows.json"
        plain = cli("check", *words)
        assert leaks_of(plain.out + plain.err) == []


@pytest.mark.usefixtures("nasty")
def test_every_json_of_a_command_is_safe() -> None:
    """No command encodes a value by itself."""
    sources = {path: path.read_text() for path in Path(lorafit.cli.__file__).parent.glob("*.py")}
    own = {path.name for path, text in sources.items() if "json.dumps" in text}
    assert own == {"config.py"}  # the schema, which is the same everywhere


@pytest.mark.usefixtures("nasty")
def test_a_log_has_no_secret(tmp_path: Path) -> None:
    """What a waiting process says about another one."""
    for secret in NASTY.values():
        assert leaks_of(str(ModelError(f"no model {secret!r}", place=secret, hint=json.dumps(secret)))) == []
        assert leaks_of(json_line(of_error(ModelError(f"no {secret!r}"))[0].as_dict())) == []


LINES_OF_DOTENV = [
    ("A=b", {"A": "b"}),
    ("A = b # c", {"A": "b"}),
    ("A=b#c", {"A": "b#c"}),
    ("A= # c", {"A": ""}),
    ("A=#c", {"A": "#c"}),
    ("export A=b", {"A": "b"}),
    ("'A'=b", {"A": "b"}),
    ("A='b \"c\" # d' # e", {"A": 'b "c" # d'}),
    ("A=\"b 'c' # d\"", {"A": "b 'c' # d"}),
    ("A='it\\'s \\\\ \\n'", {"A": "it's \\ \\n"}),
    ('A="a\\"b\\\\c\\nd\\x"', {"A": 'a"b\\c\nd\\x'}),
    ("A='one\ntwo'\nB=3", {"A": "one\ntwo", "B": "3"}),
    ('A="one\ntwo"\nB=3', {"A": "one\ntwo", "B": "3"}),
    ("A=b c d", {"A": "b c d"}),
    ("A='b' c\nB=1", {"B": "1"}),
    ("A='b\nB=1", {"B": "1"}),
    ("A=b\nB=${A}c${D:-d}${E}", {"A": "b", "B": "bcd"}),
    ("A=b\nA=c", {"A": "c"}),
    ("A=b\nA", {}),
    ("# A=b\n\n  B=c  ", {"B": "c"}),
    ("A=\nB=c", {"A": "", "B": "c"}),
    ("=b\nB=c", {"B": "c"}),
    ("A=\u00e9\u4e2d'\"", {"A": "\u00e9\u4e2d'\""}),
    ("A=$(touch x)`y`", {"A": "$(touch x)`y`"}),
]


@pytest.mark.parametrize(("text", "expected"), LINES_OF_DOTENV)
def test_dotenv_is_read_as_by_python_dotenv(
    text: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expectations are what python-dotenv 1.2.4 gives; both gave the same for 60,000 random files."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text(text, encoding="utf-8")
    assert dotenv() == expected


def test_a_value_of_dotenv_in_several_lines_is_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text('PRIVATE_KEY=\'-----BEGIN\nabcdef\n-----END\'\nURL_PASSWORD="it\'s \\"me\\""\n')
    assert redact('a -----BEGIN\nabcdef\n-----END b it\'s "me" c') == "a *** b *** c"


@pytest.mark.parametrize("part", ["hf_-", "sk-a_", "\x1b]", " ", "\t", "://a@", "://", "\\n", "xoxb-"])
def test_long_texts_take_no_long_time(part: str) -> None:
    """A pattern that begins everywhere and looks far ahead takes the square of the length: ten minutes for this."""
    text = f"a{part * (150_000 // len(part))}b"
    started = time.thread_time()
    for change in (redact, one_line, printable, visible):
        change(text)
    assert not is_slower(time.thread_time() - started, 20)

"""`lorafit check` and `lorafit show` as people meet them, and what a run does with what is found."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command import COMMAND, TINY, Cli
from tests.tiny_models import write_model, write_rows

from lorafit.run_dir import RunDirectory

BROKEN = (
    "{{ bos_token + bos_token }}{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    model = write_model(folder / "model")
    write_rows(folder / "rows.json")
    rows = json.loads((folder / "rows.json").read_text())
    rows[16]["output"] = "N/A"
    (folder / "odd.json").write_text(json.dumps(rows))
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_bytes((model / name).read_bytes())
    return folder


def lines(text: str) -> dict[str, tuple[str, str]]:
    """name -> (verdict, text) of the lines that a check prints."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(pass|warn|fail)  (\S+(?: \S+)*)\s\s+(.*)", line)
        assert match, line
        found[match[2]] = (match[1], match[3])
    return found


def test_a_verdict_a_line_and_a_summary(cli: Cli, material: Path) -> None:
    done = cli("check", "--model", material / "model", "--data", material / "odd.json", *TINY)
    assert done.code == 0, done.err
    found = lines(done.out)
    needed = {
        "ledger",
        "duplicates",
        "leaks",
        "encoding",
        "control tokens",
        "stop token",
        "BOS",
        "trained text",
    }
    assert needed | {"gradients", "loss", "trial step", "memory", "learning rate"} <= found.keys()
    outcome, text = found["answers"]
    assert outcome == "warn"
    assert "N/A" in text
    assert "odd.json row 17)" in text
    assert "tokens per row" in done.err
    assert re.search(r"^\d+ checks: \d+ pass, \d warn$", done.err, re.MULTILINE)


def test_json_says_the_same(cli: Cli, material: Path) -> None:
    words = ("check", "--model", material / "model", "--data", material / "odd.json", "--data-only", *TINY)
    done, plain = cli(*words, "--json"), cli(*words)
    record = json.loads(done.out)
    assert done.code == plain.code == 0
    assert [verdict["name"] for verdict in record["verdicts"]] == list(lines(plain.out))
    assert {"name", "verdict", "message", "place", "hint", "rows"} == record["verdicts"][0].keys()
    assert next(verdict["rows"] for verdict in record["verdicts"] if verdict["name"] == "answers") == [17]
    assert record["ledger"]["num_rows"] == 40
    assert record["failed"] is False


def test_what_fails_exits_2_and_is_a_verdict_too(cli: Cli, material: Path, tmp_path: Path) -> None:
    rows = json.loads((material / "rows.json").read_text())
    del rows[4]["output"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for words in (
        ["--data", tmp_path / "rows.json"],
        ["--data", tmp_path / "rows.json", "--model", material / "model"],
    ):
        done = cli("check", *words)
        assert done.code == 2
        assert next(iter(lines(done.out).values()))[0] == "fail"
        assert "rows.json row 5, field `output`" in done.out
        assert json.loads(cli("check", *words, "--json").out)["failed"] is True
    done = cli("check", "--data", material / "rows.json", "lora.rnak=3")
    assert (done.code, lines(done.out)["settings"][0]) == (2, "fail")
    assert "`lora.rnak`" in done.out
    assert cli("check", "--model", tmp_path / "nowhere", "--data", material / "rows.json").code == 2


def test_a_tokenizer_is_enough_and_so_are_rows_alone(cli: Cli, material: Path) -> None:
    with_tokenizer = lines(
        cli("check", "--model", material / "tokenizer", "--data", material / "rows.json").out
    )
    assert "trained text" in with_tokenizer
    assert not {"gradients", "memory"} & with_tokenizer.keys()
    alone = lines(cli("check", "--data", material / "odd.json").out)
    assert set(alone) == {"rows", "answers", "duplicates", "encoding", "control tokens"}
    assert alone["answers"][0] == "warn"


@pytest.mark.slow
def test_rows_are_checked_and_shown_without_torch(material: Path) -> None:
    source = f"""
import sys
from lorafit.cli.main import app
model, rows = {str(material / "model")!r}, {str(material / "rows.json")!r}
for words in (
    ["check", "--data", rows],
    ["check", "--data", rows, "--model", model, "--data-only"],
    ["check", "--data", rows, "--model", {str(material / "tokenizer")!r}],
    ["show", "--data", rows, "--model", model, "--row", "3", "--ids", "--diff"],
):
    app(words, standalone_mode=False)
    assert not {{"torch", "transformers"}} & set(sys.modules), words
app(["check", "--data", rows, "--model", model, "model.device=cpu"], standalone_mode=False)
assert "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_that_fails_a_check_does_not_begin(cli: Cli, material: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.jinja").write_text(BROKEN)
    words = [
        "train",
        "--model",
        material / "model",
        "--data",
        material / "rows.json",
        *TINY,
        "train.max_steps=1",
    ]
    words += ["--output", tmp_path / "run", f"data.template={tmp_path / 'twice.jinja'}"]
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert re.search(r"^error: BOS: 40 rows begin with it twice", done.err, re.MULTILINE)
    assert " hint: the template writes it too" in done.err
    assert "run.check=warn" in done.err
    assert not (tmp_path / "run").exists()
    warned = cli(*words, "run.check=warn")
    assert warned.code == 0, warned.err
    assert "warning: BOS: 40 rows" in warned.err
    verdicts = {v["name"]: v for v in json.loads((tmp_path / "run" / "check.json").read_text())}
    assert verdicts["BOS"]["verdict"] == "fail"
    assert verdicts["gradients"]["verdict"] == "pass"
    silent = cli(*words[:-1], "--output", tmp_path / "none", words[-1], "run.check=none")
    assert silent.code == 0, silent.err
    assert "BOS" not in silent.err
    assert not RunDirectory.open(tmp_path / "none").check_file.exists()


def test_a_run_says_its_warnings_in_short_form_and_stores_all(
    cli: Cli, material: Path, tmp_path: Path
) -> None:
    words = [
        "train",
        "--model",
        material / "model",
        "--data",
        material / "odd.json",
        *TINY,
        "train.batch_size=1",
        "train.max_steps=36",
    ]
    done = cli(*words, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    warnings = [
        line for line in done.err.splitlines() if line.startswith("warning: ") and "kernels" not in line
    ]
    assert len(warnings) == 2, warnings  # the answer, and a random network that is worse than guessing
    assert warnings[0].startswith("warning: answers: 1 row says next to nothing (N/A)")
    stored = json.loads((tmp_path / "run" / "check.json").read_text())
    assert len(stored) > 20
    checked = cli("check", *words[1:], "--json")
    mine = {verdict["name"]: verdict for verdict in json.loads(checked.out)["verdicts"]}
    same = (
        "ledger",
        "answers",
        "duplicates",
        "leaks",
        "stop token",
        "BOS",
        "trained text",
        "steps",
        "learning rate",
    )
    assert all(mine[verdict["name"]] == verdict for verdict in stored if verdict["name"] in same)


def test_a_resumed_run_is_not_checked_again(
    cli: Cli, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "train",
        "--model",
        material / "model",
        "--data",
        material / "rows.json",
        *TINY,
        "train.max_steps=2",
    ]
    assert cli(*words, "--output", tmp_path / "run").code == 0
    run = RunDirectory.open(tmp_path / "run")
    before = run.check_file.read_bytes()
    for path in (run.adapter, run.checkpoint(2)):
        path.rename(tmp_path / path.name)
    monkeypatch.setattr("lorafit.training.setup.check_rows", None)
    assert cli("train", "--resume", run.path).code == 0
    assert run.check_file.read_bytes() == before


def test_show_marks_what_is_trained(cli: Cli, material: Path) -> None:
    words = ["show", "--model", material / "model", "--data", material / "rows.json"]
    done = cli(*words, "--row", "3")
    assert (done.code, done.err) == (0, "")
    row = json.loads((material / "rows.json").read_text())[2]
    assert done.out.splitlines()[0].endswith("rows.json row 3: 61 tokens, 22 trained")
    assert f"⟦{row['output']}</s>⟧" in done.out
    assert f"{row['instruction']}</s>" in done.out
    assert done.out.count("⟦") == 1
    several = cli(*words, "--rows", "2-4").out
    assert re.findall(r"rows.json row (\d+):", several) == ["2", "3", "4"]
    ids = cli(*words, "--row", "3", "--ids").out
    assert re.search(r"^\d+ +257 +trained +</s> *$", ids, re.MULTILINE)
    assert cli(*words).out == cli(*words, "--row", "1").out


def test_show_compares_with_the_models_own_template(cli: Cli, material: Path) -> None:
    words = ["show", "--model", material / "model", "--data", material / "rows.json", "--row", "3", "--diff"]
    same = cli(*words)
    assert "- " not in same.out.partition("(-) to")[2].replace("<|", "")[:0]
    assert "+ <s><|user|>↵" in same.out  # BOS is what the tokenizer adds
    other = cli(*words, "data.template=classic").out
    assert "- <|assistant|>↵" in other
    assert "+ ### Response:↵" in other


def test_show_writes_a_page(cli: Cli, material: Path, tmp_path: Path) -> None:
    page = tmp_path / "row.html"
    words = ["show", "--model", material / "model", "--data", material / "rows.json", "--row", "3"]
    done = cli(*words, "--html", page, "--ids", "--diff")
    assert (done.code, done.out) == (0, f"{page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--row", "99"], "there is no row 99"),
        (["--rows", "5-2"], "--rows is FIRST-LAST"),
        (["--rows", "a"], "--rows is FIRST-LAST"),
        (["--row", "1", "--rows", "1-2"], "--rows is FIRST-LAST"),
    ],
)
def test_show_says_what_it_cannot_show(cli: Cli, material: Path, words: list[str], says: str) -> None:
    done = cli("show", "--model", material / "model", "--data", material / "rows.json", *words)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert " hint: " in done.err


def test_a_pipe_gets_no_colours_and_one_line_a_verdict(material: Path) -> None:
    words = [*COMMAND, "check", "--data", str(material / "odd.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, "\x1b" in done.stdout + done.stderr) == (0, False)
    assert len(done.stdout.splitlines()) == 5


def test_a_terminal_gets_colours(material: Path) -> None:
    from lorafit.observe.console import has_colours, print_verdicts

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Tty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        print_verdicts([("warn", "answers", "two [bold]rows[/bold] \x1b[31m")], stream=stream)
        assert has_colours(stream)
        patch.setenv("NO_COLOR", "1")
        assert not has_colours(stream)
    assert "\x1b[33mwarn\x1b[0m" in stream.getvalue()
    assert "two [bold]rows[/bold]" in stream.getvalue()
    assert "\x1b[31m" not in stream.getvalue()

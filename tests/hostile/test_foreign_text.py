"""Every place where foreign text leaves the program, with texts that mean something there; a second test keeps the list
of these places complete.
"""

from __future__ import annotations

import ast
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml
from tests.hostile.foreign import (
    NASTY,
    is_lines,
    is_one_line,
    json_of,
    steering,
    tags_of,
    without_styles,
    words_of,
)
from tests.observe.test_terminal import Screen
from tests.report.runs import write_run

import lorafit
from lorafit.check.verdict import of_error
from lorafit.cli import main as cli
from lorafit.cli.output import put_json, put_line, put_text
from lorafit.config.load import dump_config, load_config
from lorafit.config.schema import Config
from lorafit.data.columns import _setting
from lorafit.data.row_preview import RowView, Stretch, Token, marked, styled, token_lines
from lorafit.errors import ModelError, Problem
from lorafit.hub.dataset_splits import ConfigurationError
from lorafit.hub.errors import Repository
from lorafit.observe import console
from lorafit.observe.events import (
    Answers,
    Diagnosis,
    Event,
    Message,
    Progress,
    Proved,
    RunEnded,
    RunStarted,
    Sample,
    Saved,
)
from lorafit.observe.metrics_file import Record, read_metrics
from lorafit.observe.progress import progress
from lorafit.observe.terminal import Terminal
from lorafit.redact import logger_of, printable, shell
from lorafit.report import page
from lorafit.report.escape import render, rows_page
from lorafit.report.plot import Line, line_chart
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory

Walk = Callable[[str, Path, pytest.CaptureFixture[str]], None]
PLACES: dict[str, Walk] = {}
ALL = "\n".join(NASTY)  # for places that take longer


def place(walk: Walk) -> Walk:
    """Add a place to the list, by the name of its function."""
    PLACES[walk.__name__] = walk
    return walk


# Lines and texts of commands


@place
def a_line_of_a_command(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for err in (False, True):
        put_line(folder / text.replace("\0", ""), err=err)
        assert is_one_line("".join(caught.readouterr())[:-1])


@place
def a_text_of_a_command(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    put_text(text)
    assert caught.readouterr().out == printable(text) + "\n"
    assert steering(printable(text)) == []


@place
def json_of_a_command(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    put_json({text: [text, {"x": text}], "numbers": [float("nan"), float("-inf"), 0.5]})
    expected = {text: [text, {"x": text}], "numbers": [None, None, 0.5]}
    assert json_of(caught.readouterr().out[:-1]) == expected


@place
def an_error(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    cli._print_error(str(ModelError.of([Problem(text, text, text), Problem("other", text, text)])))
    out = caught.readouterr().err
    assert is_lines(out, 6), out
    assert [one.partition(":")[0] for one in out.splitlines()] == ["error", "   at", " hint"] * 2


@place
def an_error_of_a_library(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for error in (RuntimeError(text), OSError(5, text, text), ValueError(text, text)):
        code, message = cli._explained(error)
        assert code in (1, 2)
        assert all(is_one_line(one) for one in message.split("\n")), message


@place
def a_traceback(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    cli._print_error(f"Traceback\nRuntimeError: {text}")
    assert steering(caught.readouterr().err) == []


@place
def the_result_of_a_check(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    (result,) = of_error(ModelError(text, place=text, hint=text))
    console.print_verdicts([(result.verdict, text, result.text)])
    assert is_one_line(caught.readouterr().out[:-1])
    put_json(result.as_dict())
    assert json_of(caught.readouterr().out[:-1])["verdict"] == "fail"


@place
def a_message_of_a_logger(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    logger = logger_of("lorafit.test_foreign_text")
    handler = logging.StreamHandler(stream := io.StringIO())
    logger.addHandler(handler)
    logger.warning("keys that are not known: %s (%r)", text, text)
    logger.removeHandler(handler)
    assert is_one_line(stream.getvalue()[:-1])


# The console


def streams() -> Iterator[io.StringIO]:
    """A pipe and a terminal."""
    yield from (io.StringIO(), Screen())


def shown(stream: io.StringIO) -> str:
    out = stream.getvalue()
    return without_styles(out) if stream.isatty() else out


@place
def a_table(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for stream in streams():
        console.table(["key", text], [["a", text], [text, "b"]], stream=stream)
        assert steering(shown(stream)) == []


@place
def a_line_of_the_console(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for stream in streams():
        console.note(text, stream=stream)
        assert all(
            one.startswith("  ") for one in shown(stream).splitlines()[1:]
        )  # a terminal gets it wrapped
        console.print_styled([(text, "bold"), (text, "")], stream=stream)
        assert steering(shown(stream)) == []


@place
def answers_side_by_side(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for stream in streams():
        console.side_by_side(text, text, text, stream=stream)
        with console.growing_side_by_side(stream=stream) as draw:
            draw(text, text)
        with console.flowing(stream=stream) as write:
            write(text)
            write(text)
        assert steering(shown(stream)) == []


@place
def a_progress_bar(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for stream in streams():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorafit.observe.progress.QUIET_SECONDS", 0.0)
            patch.setattr("lorafit.observe.progress.threading.Timer", lambda wait, show: _Now(show))
            with progress(text, stream=stream) as advance:
                advance(1, 2)
        assert steering(shown(stream)) == []


class _Now:
    """A timer that has run out."""

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def start(self) -> None:
        self._show()

    def cancel(self) -> None:
        pass

    def join(self) -> None:
        pass


def events_with(text: str) -> list[Event]:
    return [
        RunStarted(text, 1, 1, 1, 1, text, text, text),
        Message(text),
        Message(text, "warning"),
        Diagnosis(1, text, text, text),
        Saved(1, text, text),
        Progress(text, 1, 2),
        Sample(text, text, text),
        Answers(1, [text], [text], [True], [text], 0.1),
        Proved("fail", [text], [text], 1.0),
        RunEnded(1, "finished", 1.0, text, 0.5),
    ]


@place
def the_terminal_of_a_run(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    for stream in streams():
        terminal = Terminal(stream)
        for event in events_with(text):
            before = stream.tell()
            terminal(event)
            if not isinstance(event, Sample | Proved) and not stream.isatty():
                said = stream.getvalue()[before:]
                assert len(said.splitlines()) == {"run_started": 2, "run_ended": 2, "busy": 0}.get(
                    event.kind, 1
                )
        terminal.close()
        assert steering(shown(stream)) == []


@place
def rows_on_a_terminal(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    view = RowView(0, text, (Stretch(text, "trained", False),), (Token(1, text, "read"),), text)
    console.print_line(console.console_of(sys.stdout), view.heading, "bold")
    assert is_one_line(caught.readouterr().out[:-1])
    console.print_styled([(marked(view), ""), *styled(view)])
    console.table(["", "id", "", "text"], token_lines(view))
    assert steering(caught.readouterr().out) == []


# Commands to copy


@place
def a_command(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    text = text.replace("\0", "")
    command = shell("lorafit", text, f"a={text}", f"-{text}")
    assert is_one_line(command)
    wanted = ["lorafit", text, f"a={text}", f"-{text}"]
    if "\ud800" not in text:  # which no file name holds
        assert words_of(command) == [word.encode(errors="surrogateescape") for word in wanted]


@place
def commands_in_hints(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    text = text.replace("\0", "").replace("\ud800", "").replace("/", ":")[:80]
    run = RunDirectory(folder / text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: True)
        with pytest.raises(lorafit.RunError) as caught_error:
            run.check_vacant()
    command = caught_error.value.problems[0].hint.split("`")
    hint = "`".join(command[1:-1])
    assert words_of(hint)[-1] == str(run.path).encode(errors="surrogateescape")
    setting = _setting({"instruction": text, "output": "null"})
    (word,) = words_of(setting)
    assert yaml.safe_load(word.decode().partition("=")[2]) == {"instruction": text, "output": "null"}
    hint = ConfigurationError([text]).explained("`x`", None)[1]
    assert words_of(hint) == [f"data.config={text}".encode(errors="surrogateescape")]
    download = Repository("dataset", "owner/name", text).download_command
    assert words_of(download)[-1:] == ([text.encode(errors="surrogateescape")] if text else [b"dataset"])


# Pages and pictures


@place
def the_report_of_a_run(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    if text != ALL:
        return
    plain = page.page(read_facts(RunDirectory(write_run(folder / "plain", 8))))
    foreign = page.page(read_facts(RunDirectory(write_run(folder / "foreign", 8, lambda _: text))))
    assert steering(foreign) == []
    assert {tag for tag in tags_of(foreign) if tag not in tags_of(plain)} <= {("div", ("class",)), ("td", ())}


@place
def a_page_of_rows(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    def written(text: str, ids: bool) -> str:
        view = RowView(0, text, (Stretch(text, "trained", False),), (Token(1, text, "read"),))
        return rows_page(text, [(view, [("-", text), ("+", text)])], ids=ids)

    for ids in (False, True):
        out = written(text, ids)
        assert steering(out) == []
        assert tags_of(out) == tags_of(written("plain", ids))


@place
def the_picture_of_a_sweep(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    chart = line_chart(text, [Line(text, "0", [(0, 1.0), (1, 0.5)], dots=True)], "{:.3f}".format)
    out = render("sweep.svg", title=text, chart=chart, names=[text])
    assert steering(out) == []
    plain = render("sweep.svg", title="plain", chart=chart, names=["plain"])
    tags = [[one.tag for one in ElementTree.fromstring(svg).iter()] for svg in (out, plain)]
    assert tags[0] == tags[1]


# Files of a run


@place
def the_files_of_a_run(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(folder)
    value = {"command": text, text: [text]}
    run.write_json(run.env_file, value)
    assert run.read_json(run.env_file) == value
    record = Record(run.metrics_file)
    for event in events_with(text):
        record(event)
    record.close()
    assert [event["text"] for event in read_metrics(run.metrics_file) if event["event"] == "note"] == [
        text
    ] * 2


@place
def the_config_of_a_run(text: str, folder: Path, caught: pytest.CaptureFixture[str]) -> None:
    if any(steering(text)):
        return  # a config refuses what is no text
    config = Config.model_validate({"model": {"name": "x"}, "data": {"path": ["rows.json"], "system": text}})
    (folder / "config.yaml").write_text(dump_config(config))
    assert load_config(folder / "config.yaml").data.system == text


@pytest.mark.parametrize("name", PLACES)
def test_foreign_text_is_text_where_it_leaves(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate((*NASTY, ALL)):
        folder = tmp_path / str(number)
        folder.mkdir()
        PLACES[name](text, folder, capsys)


def test_the_walk_notices_what_it_is_there_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the functions that quote, most places fail."""
    failed = set()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(
            "lorafit.redact._UNSEEN", SimpleNamespace(sub=lambda how, text: text, search=lambda text: None)
        )
        for name, walk in PLACES.items():
            for number, text in enumerate((NASTY[0], NASTY[5], ALL)):
                folder = tmp_path / name / str(number)
                folder.mkdir(parents=True)
                try:
                    walk(text, folder, capsys)
                except (AssertionError, ValueError, ElementTree.ParseError, yaml.YAMLError):
                    failed.add(name)
                    break
    assert set(PLACES) - failed <= {"commands_in_hints", "the_config_of_a_run", "the_files_of_a_run"}


# Completeness

# What writes text. A new call belongs in LEAVING, with the place above that walks it or the reason why it needs none.
WRITERS = {
    *(
        "print",
        "echo",
        "secho",
        "write",
        "writelines",
        "write_text",
        "write_bytes",
        "write_file",
        "write_lines",
    ),
    *("dump", "dumps", "safe_dump", "render", "getLogger", "add_name", "add_string"),
}
OWN = "no foreign text: numbers, hashes, or a text of lorafit"
BYTES = "bytes that are copied, or whose form is safetensors, GGUF tensors or a manifest in ASCII"
DATA = "for a digest, a child process, a cache or the prompt of a model, and for nobody's eyes"
SERVED = "tests/serve"
STUDIO = "tests/studio"
EXPORTED = "tests/export/test_card.py and test_quoting.py"
LEAVING: dict[str, dict[str, str]] = {
    "sweep/halving.py _run": {"write_file": "an_error"},
    "sweep/halving.py _write": {"write_file": DATA, "dumps": DATA},
    "sweep/halving.py _write_recipe": {"write_file": "the_config_of_a_run"},
    "check/machine_probe.py": {"print": OWN, "dumps": OWN},
    "check/preflight.py find": {"dumps": DATA},
    "cli/config.py config": {"dumps": OWN},
    "__main__.py run": {"print": OWN},
    "cli/main.py _print_error": {"print": "an_error"},
    "cli/output.py put_line": {"echo": "a_line_of_a_command"},
    "cli/output.py put_text": {"echo": "a_text_of_a_command"},
    "cli/output.py put_json": {"echo": "json_of_a_command"},
    "cli/show.py show": {"write_file": "a_page_of_rows"},
    "config/load.py override_words": {"dumps": DATA},
    "config/load.py dump_values": {"safe_dump": "the_config_of_a_run"},
    "data/chat_template.py ChatTemplate.parts": {"render": DATA},
    "data/chat_template.py ChatTemplate._holes": {"render": DATA},
    "data/chat_template.py ChatTemplate._asks_without_thought": {"render": DATA},
    "data/chat_template.py _forms": {"dumps": DATA},
    "data/content.py Message.text": {"dumps": DATA},
    "data/contract.py PromptContract.hash": {"dumps": DATA},
    "data/jinja_sandbox.py _Code.visit_Call": {"write": DATA},
    "data/memory_rows.py rows_file": {"dumps": DATA, "write_lines": DATA},
    "data/prompt.py Renderer._parts": {"render": DATA},
    "data/row_preview.py shipped": {"render": "rows_on_a_terminal"},
    "data/token_cache.py key_of": {"dumps": DATA},
    "data/token_cache.py store_array": {"write_bytes": BYTES},
    "data/token_dataset.py _Writer.add": {"write": BYTES, "render": DATA},
    "data/token_dataset.py _Writer._write": {"write": BYTES},
    "data/tokenizer.py Tokenizer.__init__": {"dumps": DATA},
    "data/tokenizer_files.py with_tokens": {"dumps": DATA},
    "data/turns.py _read": {"dumps": DATA},
    "data/turns.py _call": {"dumps": DATA},
    "data/turns.py _tools": {"dumps": DATA},
    "distributed/env.py mark_no_restart": {"write_text": OWN},
    "distributed/watchdog.py Heartbeat._beat": {"dumps": OWN},
    "distributed/watchdog.py Heartbeat._judge": {"write_file": OWN, "dumps": OWN, "print": "an_error"},
    "evaluate/why.py keep_for_page": {"write_file": "the_report_of_a_run", "dumps": DATA},
    "export/card.py card": {"render": EXPORTED},
    "export/chat_template.py chat_template": {"dumps": OWN},
    "export/chat_template.py render": {"render": DATA},
    "export/chat_template.py _ended_as_trained": {"render": DATA},
    "export/chat_template.py _literal": {"dumps": EXPORTED},
    "export/fit.py fit_run": {"write": EXPORTED},
    "export/gguf_model.py write_gguf": {"add_name": EXPORTED},
    "export/gguf_model.py write_lora": {"add_name": EXPORTED, "add_string": OWN},
    "export/kinds.py write_adapter": {"write_bytes": BYTES},
    "export/kinds.py _write_gguf_lora": {"write_text": EXPORTED},
    "export/llama_cpp.py Server._ask": {"dumps": DATA},
    "export/merge.py write_prompting": {"write_bytes": BYTES},
    "export/merge.py _write_shard": {"dumps": BYTES, "write": BYTES},
    "export/merge.py write_json": {"write_bytes": EXPORTED, "dumps": EXPORTED},
    "export/ollama.py write_modelfile": {"write_text": EXPORTED},
    "export/ollama.py to_go_template": {"dumps": EXPORTED},
    "export/ollama.py check_modelfile": {"render": DATA},
    "export/ollama.py _around": {"render": DATA},
    "export/parity.py _in_process": {"write_text": DATA, "dumps": DATA},
    "export/quoting.py yaml_text": {"safe_dump": EXPORTED},
    "export/readback.py main": {"print": "an_error", "write_text": DATA, "dumps": DATA},
    "export/readback.py by_llama_cpp": {"render": DATA},
    "export/readback.py _report": {"print": OWN},
    "export/run.py export_run": {"write": EXPORTED},
    "export/run.py _describe": {"write_text": EXPORTED},
    "forward.py _supervised": {"write": BYTES},
    "gguf_file/folder.py gguf_model_folder": {"dumps": DATA, "write_file": DATA},
    "hub/waits.py": {"getLogger": OWN},
    "infer/bulk.py answer_file": {"write": "json_of_a_command"},
    "infer/bulk.py AnswerFile.__init__": {"dumps": OWN, "write": "json_of_a_command"},
    "infer/bulk.py AnswerFile.add": {"write": "json_of_a_command"},
    "infer/bulk.py AnswerFile.finish": {"write_file": "json_of_a_command"},
    "model/adapter_file.py adapter_files": {"dumps": BYTES},
    "model/native/__init__.py trial": {"write_text": OWN},
    "model/native/__init__.py _compile": {"write_text": OWN},
    "model/quant.py _bitsandbytes": {"getLogger": OWN},
    "observe/console.py table": {"print": "a_table"},
    "observe/console.py print_styled": {"print": "a_line_of_the_console"},
    "observe/console.py side_by_side": {"print": "answers_side_by_side"},
    "observe/console.py _print_wrapped": {"print": "a_line_of_the_console"},
    "observe/console.py growing_side_by_side": {"print": "answers_side_by_side"},
    "observe/console.py flowing.put": {"write": "answers_side_by_side"},
    "observe/metrics_file.py Record.__call__": {"write": "the_files_of_a_run"},
    "observe/answer_losses.py write_answer_losses": {"write_lines": BYTES},
    "observe/visits.py VisitLog.add": {"write": OWN},
    "observe/metrics_file.py truncate_after": {"write_lines": BYTES},
    "observe/progress.py _Eta.render": {"render": OWN},
    "observe/metrics_file.py _line": {"dumps": "the_files_of_a_run"},
    "redact.py json_line": {"dumps": "json_of_a_command"},
    "redact.py logger_of": {"getLogger": "a_message_of_a_logger"},
    "redact.py _forms": {"dumps": DATA},
    "report/escape.py render": {"render": "the_report_of_a_run"},
    "report/escape.py rows_page": {"render": "a_page_of_rows"},
    "report/page.py write_report": {"write_file": "the_report_of_a_run"},
    "report/page.py page": {"render": "the_report_of_a_run"},
    "report/plot.py line_chart": {"dumps": "the_report_of_a_run"},
    "run_dir.py RunDirectory.write_config": {"write_file": "the_config_of_a_run"},
    "run_dir.py RunDirectory.write_json": {"write_file": "the_files_of_a_run", "dumps": "the_files_of_a_run"},
    "serve/app.py chat": {"render": DATA},
    "serve/app.py complete": {"render": DATA},
    "serve/connection.py Connection.send_400_response": {"write": OWN},
    "serve/errors.py ApiError.response": {"dumps": SERVED},
    "serve/protocol.py Only._check": {"dumps": SERVED},
    "serve/server.py _announce": {"print": "a_line_of_a_command"},
    "serve/server.py _log": {"print": "a_line_of_a_command"},
    "storage/atomic.py commit_files": {"write_bytes": BYTES},
    "storage/atomic.py write_file": {"write_lines": "the_files_of_a_run"},
    "storage/atomic.py _manifest_text": {"dumps": BYTES},
    "storage/atomic.py _write_synced": {"writelines": BYTES},
    "storage/digest_cache.py cached_sha256": {"dumps": DATA, "write_file": DATA},
    "storage/locks.py lock": {"write": OWN},
    "storage/locks.py exclusive_lock": {"write": "a_message_of_a_logger"},
    "storage/locks.py _claimed": {"write": OWN},
    "studio/data_page.py _upload.write": {"write": BYTES},
    "studio/compare.py _text": {"dumps": STUDIO},
    "studio/data_page.py _fields": {"dumps": STUDIO},
    "studio/row_pages.py RowPages._fill": {"write_file": DATA, "dumps": DATA},
    "studio/row_pages.py RowPages.search": {"dumps": DATA},
    "studio/row_pages.py _raw": {"dumps": DATA},
    "studio/row_pages.py digest_of": {"dumps": DATA},
    "studio/talk.py _task.append": {"write": STUDIO, "dumps": STUDIO},
    "studio/jobs.py Jobs.tie": {"write_file": DATA, "dumps": DATA},
    "studio/jobs.py Jobs._remember": {"write_file": DATA, "dumps": DATA},
    "studio/folder.py write_note": {"write_file": OWN},
    "studio/start.py _start": {"write_file": STUDIO},
    "studio/start.py _plan": {"write_file": DATA},
    "studio/schema_form.py _text": {"safe_dump": STUDIO},
    "studio/start.py _recipe_text": {"safe_dump": STUDIO},
    "studio/server.py run_studio.announce": {"print": OWN},
    "studio/app.py _failed": {"print": STUDIO},
    "studio/tables.py _cell": {"dumps": STUDIO},
    "studio/watch.py Watcher.run": {"print": STUDIO},
    "studio/watch.py Watcher.events": {"dumps": OWN},
    "studio/web.py filled": {"render": STUDIO},
    "studio/web.py refusal": {"render": STUDIO},
    "sweep/run.py draw_curves": {"write_file": "the_picture_of_a_sweep", "render": "the_picture_of_a_sweep"},
    "sweep/trials.py plan_sweep": {"write_file": BYTES, "dumps": BYTES},
    "sweep/trials.py work": {"write_file": "an_error"},
    "training/reference.py read_reference": {"dumps": DATA},
    "training/checkpoint.py snapshot": {"dumps": OWN},
    "training/setup.py prepare": {"dumps": DATA},
    "verify/reload.py main": {"print": "an_error"},
}


def leaving(source: Path) -> dict[str, set[str]]:
    """Each function below `source` that writes text, with what it calls for that."""
    found: dict[str, set[str]] = {}

    def search(node: ast.AST, file: str, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = within
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{within}.{child.name}" if within else child.name
            elif isinstance(child, ast.Call):
                called = child.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in WRITERS:
                    found.setdefault(f"{file} {within}".strip(), set()).add(name)
            search(child, file, inner)

    for path in sorted(source.rglob("*.py")):
        search(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(source).as_posix(), "")
    return found


def test_each_place_that_writes_text_is_in_the_list() -> None:
    found = leaving(Path(lorafit.__file__).parent)
    assert found == {where: set(calls) for where, calls in LEAVING.items()}
    reasons = {reason for calls in LEAVING.values() for reason in calls.values()}
    assert reasons <= {*PLACES, OWN, BYTES, DATA, SERVED, EXPORTED, STUDIO}


def test_a_new_place_is_found(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text("class A:\n    def f(self):\n        print(self.name)\n")
    assert leaving(tmp_path) == {"new.py A.f": {"print"}}

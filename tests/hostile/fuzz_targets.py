"""What every hostile value must come to: an error that says what and where, or the right result; no third thing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date as Date
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from tests.data.masks import trained_stretches
from tests.data.toy_tokenizers import load, toys
from tests.effort import is_slower
from tests.hostile import fuzz_programs as programs
from tests.hostile import fuzz_values as values
from tests.hostile.measure import peak_memory
from tests.hostile.template_grammar import Maker
from tests.report.runs import write_run
from tokenizers.normalizers import NFC

from lorafit.cli.main import main
from lorafit.config.load import dump_config, load_config, validate
from lorafit.data.chat_template import MAX_CHARACTERS, ChatTemplate
from lorafit.data.folders import SourceFile
from lorafit.data.formats import Chat, Completion, Content, Instruction, Message, Row
from lorafit.data.jinja_costs import BUDGET
from lorafit.data.jinja_sandbox import Sandbox
from lorafit.data.prompt import Dropped, PromptContract, Rendered, Renderer, contract
from lorafit.data.row_index import RowIndex
from lorafit.data.sources import Reading, Sources
from lorafit.data.token_dataset import encode_chunks, open_encoded
from lorafit.errors import DataError, LorafitError, Problem
from lorafit.observe.console import table
from lorafit.observe.metrics_file import read_metrics
from lorafit.observe.run_summary import summarize
from lorafit.report.page import page
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory, find_runs

STEERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SECONDS, SECONDS_UNBILLED, SECONDS_PER_UNIT = (
    0.5,
    0.1,
    40e-9,
)  # of a template; for the whole budget half a second
MEGABYTES = 200
# By a seed each: drawing every choice with hypothesis takes longer than the template.
COSTLY = st.integers(0, 2**60).map(lambda seed: Maker(Random(seed)).template())
TURNS = [{"role": role, "content": f"a {role} says hello\n"} for role in ("system", "user", "assistant")]
TOY_TEMPLATES = {
    "qwen": ("alpaca", "chat"),
    "qwen3": ("chat",),
    "legacy": ("classic", "chat"),
    "llama2": ("chat",),
}
TOY_TEMPLATES |= {"llama3": ("chat", "alpaca"), "vicuna": ("chat",), "zephyr": ("auto", "classic")}


class Scene:
    """Tokenizers, renderers and a run, made once, and a folder to write in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizers = {name: load(path) for name, path in toys(folder / "toys").items()}
        self.renderers = [
            Renderer(
                contract(
                    tokenizers[name],
                    template=template,
                    train_on=how,
                    max_length=64,
                    too_long=long,
                    add_eos=True,
                ),
                tokenizers[name],
            )
            for name, templates in TOY_TEMPLATES.items()
            for template in templates
            for how, long in (("response", "truncate"), ("all", "drop"))
        ]
        self.answering = [one for one in self.renderers if one.contract.train_on == "response"]
        self.run = write_run(folder / "runs" / "one", 4)
        self.good = {name: (self.run / name).read_bytes() for name in programs.RUN_FILES}
        self.work = folder / "work"
        (self.work / "empty").mkdir(parents=True)

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


def refused(error: LorafitError, place: str | None = None) -> None:
    """An error has to say what is wrong in every one of its problems, on one line, and where: below `place`."""
    assert error.problems
    for problem in error.problems:
        assert problem.message.strip(), error.problems
        assert place is None or problem.place.startswith(place), problem
    assert not STEERS.search(str(error)), repr(str(error))
    assert len(str(error).splitlines()) <= 3 * len(error.problems) + 1, repr(str(error))


def read(scene: Scene, path: Path, form: str, which: int) -> None:
    """Read a file as training does, and once more by numbers; render every row with renderer number `which`."""
    sources = Sources([SourceFile(path.name, path.name, path, "")], Reading(form))
    reader = sources.reader()
    renderer = scene.renderers[which % len(scene.renderers)]
    try:
        chunks = list(reader.chunks())
    except DataError as error:
        refused(error, path.name)
        return
    rows = [row for chunk in chunks for row in chunk.rows]
    assert [row.number for row in rows] == list(range(len(rows)))
    assert RowIndex(sources, reader.summaries).read([row.number for row in rows[-1:]]) == rows[-1:]
    for row, outcome in zip(rows, renderer.render_batch(rows), strict=True):
        rendered(renderer, row, outcome)
    if len(rows) > 2:
        encoded(scene, renderer, chunks, path.name)


def encoded(scene: Scene, renderer: Renderer, chunks: Sequence[Any], name: str) -> None:
    """Write the rows' tokens as training does, and read them."""
    folder = scene.folder / "tokens"
    folder.mkdir(exist_ok=True)
    try:
        facts = encode_chunks(chunks, renderer, folder)
    except DataError as error:
        refused(error)
        return
    found = open_encoded(folder, facts)
    for index in range(len(found)):
        ids, trained = found.row(index)
        assert 0 < len(ids) == len(trained) <= renderer.contract.max_length, name


def rendered(renderer: Renderer, row: Row, outcome: Rendered | Dropped | Problem) -> None:
    """A rendering is told by its place, or it is one in which something is trained."""
    if isinstance(outcome, Problem):
        refused(LorafitError.of([outcome]), row.place)
    elif isinstance(outcome, Rendered):
        assert len(outcome.ids) == len(outcome.trained)
        assert not any(outcome.trained[:1])
        assert max(outcome.ids, default=0) < renderer.tokenizer.vocab_size
        shown = "".join(span.text for span in renderer.text(row))
        assert shown or not outcome.ids
    else:
        assert outcome.reason


def any_rows(scene: Scene, drawn: tuple[str, Any, int]) -> None:
    """Any JSON as the rows of a file of any format."""
    form, rows, which = drawn
    read(scene, scene.file("rows.json", json.dumps(rows).encode()), form, which)


def any_bytes(scene: Scene, drawn: tuple[str, str, bytes, int]) -> None:
    """Any bytes as a file of rows."""
    suffix, form, content, which = drawn
    read(scene, scene.file(f"data{suffix}", content), form, which)


def any_texts(scene: Scene, drawn: tuple[list[tuple[str, str]], str, bool, int]) -> None:
    """Any text as a question and an answer: what is trained decodes to the answer, or the row is refused."""
    turns, other, chat, which = drawn
    renderer = scene.answering[which % len(scene.answering)]
    content: Content
    if chat and renderer.contract.template == "chat":
        content, answers = _chat(turns, other), [answer for _, answer in turns]
    elif chat:
        content, answers = Completion(other, turns[0][1]), [turns[0][1]]
    else:
        content, answers = Instruction(turns[0][0], other, turns[0][1]), [turns[0][1]]
    row = Row(0, "rows.json row 1", content)
    [outcome] = renderer.render_batch([row])
    rendered(renderer, row, outcome)
    if isinstance(outcome, Rendered):
        prompt = renderer.prompt_ids(content)
        if prompt:  # a first token has nothing that it could be learnt from
            says(renderer, outcome, answers)
        assert outcome.ids[: len(prompt)] == prompt, "generation begins with other ids"
    elif isinstance(outcome, Dropped):
        assert not answers[-1].strip()


def _chat(turns: Sequence[tuple[str, str]], system: str) -> Chat:
    said = [
        Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return Chat((*([Message("system", system)] if system.strip() else []), *said))


def says(renderer: Renderer, row: Rendered, answers: Sequence[str]) -> None:
    """The trained text is the answers, up to blanks, thinking, NFC and the stop tokens."""

    def bare(text: str) -> str:
        for control in renderer.tokenizer.control:
            text = text.replace(control, "")
        text = text.rpartition("</think>")[2]
        return NFC().normalize_str("".join(text.replace("▁", " ").split()))

    texts, _ = trained_stretches(renderer.tokenizer, row)
    said, meant = (NFC().normalize_str("".join(map(bare, stretches))) for stretches in (texts, answers))
    assert said == meant, f"{texts} is trained, not {answers}"


def any_config(scene: Scene, config: Any) -> None:
    """Any nested values as a configuration."""
    accepted(scene, lambda: validate(config if isinstance(config, dict) else {"model": config}))


def any_recipe(scene: Scene, text: str) -> None:
    """Any text as a recipe; what is wrong has the line."""
    path = scene.file("recipe.yaml", text.encode(errors="surrogatepass"))
    accepted(scene, lambda: load_config(path, ["model.name=m", "data.path=d.json"]))


def any_overrides(scene: Scene, given: list[str]) -> None:
    """Any words as `section.key=value`."""
    accepted(scene, lambda: load_config(None, given))


def accepted(scene: Scene, make: Callable[[], Any]) -> None:
    """A configuration that is taken comes back equal from the file that the run keeps."""
    try:
        config = make()
    except LorafitError as error:
        refused(error)
        return
    text = dump_config(config)
    if len(text) < 90_000:
        assert load_config(scene.file("config.yaml", text.encode())) == config


def any_arguments(scene: Scene, words: list[str]) -> None:
    """Any words after `lorafit`, with nothing there to train: exit code 0 or 2, and no traceback."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"),
    )
    environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    with (
        mock.patch.object(sys, "argv", ["lorafit", *words]),
        mock.patch.object(sys, "stdin", io.StringIO()),
        mock.patch.dict(os.environ, environment),
        contextlib.chdir(scene.work),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        os.environ.pop("LORAFIT_DEBUG", None)
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
        out.flush()
        err.flush()
    said = err.buffer.getvalue().decode()
    assert code in (0, 2), (code, said)
    assert "Traceback" not in said, said
    assert "bug in lorafit" not in said, said
    assert code == 0 or said.strip() or out.buffer.getvalue(), "it says nothing"


def any_template(scene: Scene, drawn: tuple[str, tuple[list[tuple[str, str]], str, bool, int]]) -> None:
    """Any Jinja as a chat template: a rendering whose parts are the whole, or an error with its line."""
    source, (turns, system, *_) = drawn
    chat = _chat(turns, system)
    try:
        template = ChatTemplate(source, bos="<s>", eos="</s>", date="2024-07-26")
        parts = template.parts(chat.messages)
        assert "".join(part.text for part in parts) == template.render(chat.messages)
        template.render(chat.messages[:-1], ask=True)
    except LorafitError as error:
        refused(error)


def bounded_template(scene: Scene, source: str) -> None:
    """Any program in the sandbox takes the time and the memory that it is billed for, and no more than is allowed.

    What is too slow is measured three times, and in relation to how slow the machine is then.
    """
    for _ in range(3):
        if not (excess := _excess(source)):
            return
    raise AssertionError(excess)


def _excess(source: str) -> str:
    """What a template takes too much of; "" for nothing."""
    sandbox = Sandbox(Date(2024, 7, 26))
    clock = [time.process_time()]
    with peak_memory() as peak, contextlib.suppress(Exception):  # a program may raise anything
        template = sandbox.from_string(source)
        clock.append(time.process_time())
        sandbox.begin(0)
        written = 0
        for piece in template.generate(messages=TURNS, bos_token="<s>", eos_token="</s>", tools=None):
            written += len(piece)
            if written > MAX_CHARACTERS:
                break
    clock.append(time.process_time())
    compiling, rendering = clock[1] - clock[0], clock[-1] - clock[1]
    bill = min(BUDGET - sandbox.budget.left, BUDGET)
    if is_slower(compiling, SECONDS):
        return f"{compiling:.2f} s to compile"
    if is_slower(rendering, SECONDS_UNBILLED + bill * SECONDS_PER_UNIT):
        return f"{rendering:.2f} s for {bill:,} units"
    return f"{peak.megabytes} MB for {bill:,} units" if peak.megabytes >= MEGABYTES else ""


def any_run(scene: Scene, drawn: tuple[str, str, list[int], Any, bytes]) -> None:
    """Anything in a file of a run: it is listed, and reported on but for what is missing."""
    name, how, path, new, some = drawn
    good = scene.good[name]
    (scene.run / name).write_bytes(_changed(name, good, how, path, new, some))
    run = RunDirectory(scene.run)
    try:
        read_run(scene, run)
        summary = [(found, summarize(found)) for found in find_runs(scene.run.parent)]
        rows = [[str(at.path), *told.cells()] for at, told in summary]
        table([""] * max(map(len, rows), default=0), rows, stream=io.StringIO())
        json.dumps([told.as_dict() for _, told in summary], allow_nan=False)
        facts = read_facts(run)
        page(facts).encode()
    except LorafitError as error:
        refused(error)
    finally:
        (scene.run / name).write_bytes(good)


def read_run(scene: Scene, run: RunDirectory) -> None:
    """Each file by its own reader: a value or an error."""
    for parse in (
        lambda: list(read_metrics(run.metrics_file)),
        lambda: run.read_json(run.ledger_file),
        lambda: PromptContract.from_json(run.read_json(run.prompt_file)),
        run.config,
        run.newest_checkpoint,
    ):
        try:
            parse()
        except LorafitError as error:
            refused(error)


def _changed(name: str, good: bytes, how: str, path: list[int], new: Any, some: bytes) -> bytes:
    if how == "bytes" or name.endswith(".yaml"):
        at = path[0] * 37 % (len(good) + 1)
        return good[:at] + some + good[at + len(path) :]
    if how == "whole":
        return json.dumps(new).encode()
    if name.endswith(".jsonl"):
        lines = good.splitlines()
        at = path[0] % len(lines)
        lines[at] = json.dumps(programs.replaced(json.loads(lines[at]), path[1:], new)).encode()
        return b"\n".join(lines) + b"\n"
    return json.dumps(programs.replaced(json.loads(good), path, new)).encode()


@dataclass(frozen=True, slots=True)
class Target:
    """Something that is fuzzed: what is drawn, what it must come to, and its part of all examples."""

    title: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Scene, Any], None]
    share: float


TARGETS = {
    "rows": Target("any JSON as rows", values.row_files, any_rows, 0.2),
    "bytes": Target("any bytes as a file of rows", values.files, any_bytes, 0.15),
    "texts": Target("any text as question and answer", values.conversations, any_texts, 0.15),
    "configs": Target("any values as a configuration", values.configs, any_config, 0.1),
    "recipes": Target("any text as a recipe", values.recipes, any_recipe, 0.1),
    "overrides": Target("any words as settings", values.overrides, any_overrides, 0.1),
    "templates": Target("any Jinja as a chat template", programs.templates, any_template, 0.05),
    "sandbox": Target("templates of the whole grammar, by their bill", COSTLY, bounded_template, 0.05),
    "arguments": Target("any words after `lorafit`", programs.arguments, any_arguments, 0.05),
    "runs": Target("anything in the files of a run", programs.changes, any_run, 0.05),
}

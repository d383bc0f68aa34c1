"""Many questions from a file, and their answers to a file: in order, resumable, whole or not there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.formats import ROLES, Instruction, Message
from lorafit.data.readers import place_of, read_file
from lorafit.data.sources import data_files
from lorafit.errors import ConfigError, DataError, LorafitError, Problems, RunError
from lorafit.infer.continuous_batch import Batch, Request
from lorafit.infer.model import Answer, Model, Question
from lorafit.infer.sampling import Sampling
from lorafit.model.adapter_file import adapter_tensors
from lorafit.model.lora import disable_adapter
from lorafit.redact import json_line
from lorafit.storage.atomic import sha256_file, write_file
from lorafit.storage.safe_read import MB, read_text

AT_ONCE = 16
MAX_TEXT = 256 * MB  # of a file with a prompt a line
_SYNC_SECONDS = 2.0
_KINDS = ("messages", "prompt", "instruction")


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of the file: as it stood there, and as it is asked."""

    raw: object
    ids: list[int]


def read_questions(path: Path, model: Model) -> list[Asked]:
    """The rows of a file as prompts for `model`.

    A row is a text, or an object with `prompt`, `messages` that end in a user turn, or `instruction` (and `input`,
    `system`); what else it holds is kept. Files ending in .txt have a prompt on each line, others are read as training
    rows are. Raises DataError with everything that cannot be asked, before anything is.
    """
    problems, asked = Problems(), []
    limit = model.network.arch.max_position_embeddings
    for number, (line, raw) in enumerate(_rows(path, problems), 1):
        place = place_of(path.name, number, line)
        try:
            ids = model.renderer.prompt_ids(_source(_question(raw)))
            if not 0 < len(ids) < limit:
                raise DataError(f"the prompt has {len(ids):,} tokens, the model reads 1 to {limit - 1:,}")
            asked.append(Asked(raw, ids))
        except LorafitError as error:
            problems.add(dataclasses.replace(problem, place=place) for problem in error.problems)
    if problems:
        raise DataError.of(problems.kept, problems.num_more)
    if not asked:
        raise DataError("there is no prompt", place=str(path))
    return asked


def answers(
    model: Model,
    asked: Sequence[Asked],
    *,
    max_tokens: int,
    sampling: Sampling,
    base: bool = False,
    start: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Answer]:
    """The answers to `asked[start:]` in order; `progress` gets how many are made, which may be ahead of that."""
    batch = Batch(model.network, AT_ONCE)
    stop_ids = frozenset(model.renderer.contract.stop_ids)
    ids: dict[int, list[int]] = {}
    done: dict[int, Answer] = {}
    coming, due = start, start
    with disable_adapter(model.network, when=base):
        while due < len(asked):
            steps = []
            while len(batch) < AT_ONCE and coming < len(asked):
                request = Request(asked[coming].ids, stop_ids, max_tokens, sampling, stream=coming)
                steps.append((coming, batch.add(coming, request)))
                coming += 1
            for key, step in (*steps, *batch.step()):
                assert isinstance(key, int)
                said = ids.setdefault(key, [])
                if step.end != "stop":
                    said.append(step.id)
                if step.end:
                    text = model.renderer.tokenizer.decode(ids.pop(key), skip_special=True).strip()
                    done[key] = Answer(text, len(said), step.end == "stop")
            progress(due + len(done))
            while due in done:
                yield done.pop(due)
                due += 1


def line_of(index: int, asked: Asked, answer: Answer) -> str:
    """An answer as a line of the output."""
    value = {
        "index": index,
        "input": asked.raw,
        "answer": answer.text,
        "stopped": answer.stopped,
        "num_tokens": answer.num_tokens,
    }
    return json_line(value)


class AnswerFile:
    """Lines that become `path` once all are there; until then they are in `path` with `.part` behind its name.

    `purpose` identifies what is being answered and how: lines that were made for something else are not gone on with.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        """Raises ConfigError where `path` is there already or its part belongs to something else."""
        self.path, self.part = path, path.with_name(path.name + ".part")
        if path.exists():
            raise ConfigError(f"`{path}` is there already", hint="give another --output, or remove it")
        self._head = json.dumps({"answers": purpose})
        self.lines = self._read()
        try:
            self._file = self.part.open("w", encoding="utf-8", newline="\n")
            self._file.write("".join(line + "\n" for line in (self._head, *self.lines)))
            self._sync()
        except OSError as error:
            raise RunError(f"cannot write: {error.strerror or error}", place=str(self.part)) from None

    def add(self, line: str) -> None:
        """One more line; on the disk within a few seconds. Raises RunError."""
        self.lines.append(line)
        try:
            self._file.write(line + "\n")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise RunError(f"cannot write: {error.strerror or error}", place=str(self.part)) from None

    def finish(self) -> None:
        """Make the whole file, durably. Raises RunError."""
        self.close()
        write_file(self.path, "".join(line + "\n" for line in self.lines))
        self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the part as it is, to go on with later."""
        if not self._file.closed:
            self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _read(self) -> list[str]:
        """The whole lines of an earlier process; one that was torn, and what follows it, is made again."""
        try:
            head, *lines = self.part.read_bytes().decode("utf-8", "replace").split("\n")[:-1] or [""]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", place=str(self.part)) from None
        if head and head != self._head:
            raise ConfigError(
                "it holds answers to other questions, or of another model or other settings",
                place=str(self.part),
                hint="remove it, or give another --output",
            )
        whole = []
        for index, line in enumerate(lines):
            try:
                if json.loads(line)["index"] != index:
                    break
            except (ValueError, KeyError, TypeError):
                break
            whole.append(line)
        return whole


def purpose_of(path: Path, model: Model, max_tokens: int, sampling: Sampling, base: bool) -> str:
    """What decides the answers: questions, prompt contract, adapter, some of the base's weights, settings."""
    digest = hashlib.sha256(sha256_file(path).encode())
    network = model.network
    for tensor in (
        *adapter_tensors(network).values(),
        network.model.norm.weight,
        network.lm_head.weight[:64],
    ):
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    kinds = sorted({type(module).__name__ for module in network.modules()})
    settings = (
        model.renderer.contract.hash,
        max_tokens,
        sampling,
        base,
        str(network.lm_head.weight.dtype),
        kinds,
    )
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def _rows(path: Path, problems: Problems) -> Iterator[tuple[int, object]]:
    if path.suffix.lower() != ".txt":
        for file in data_files(path):
            yield from ((row.line, row.value) for row in read_file(file, file.name, problems))
        return
    try:
        text = read_text(path, MAX_TEXT).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", place=str(path)) from None
    for line, prompt in enumerate(text.split("\n"), 1):
        if prompt.strip():
            yield line, prompt.rstrip("\r")


def _question(raw: object) -> Question:
    if isinstance(raw, str):
        return _text(raw, "the prompt")
    if not isinstance(raw, dict):
        raise DataError("the row is neither a text nor an object", hint=_HINT)
    kinds = [kind for kind in _KINDS if raw.get(kind) is not None]
    if len(kinds) != 1:
        what = f"has {' and '.join(f'`{kind}`' for kind in kinds)}" if kinds else "has none of them"
        raise DataError(
            f"the row must have one of `messages`, `prompt` and `instruction`, and {what}", hint=_HINT
        )
    match kinds[0]:
        case "messages":
            return _conversation(raw["messages"])
        case "prompt":
            return _text(raw["prompt"], "`prompt`")
        case _:
            given, system = (_text(raw.get(key) or "", f"`{key}`") for key in ("input", "system"))
            return Instruction(_text(raw["instruction"], "`instruction`"), given, "", system)


_HINT = 'write {"prompt": "..."}, {"messages": [...]} or {"instruction": "...", "input": "..."}'


def _conversation(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise DataError("`messages` is not a list of turns", hint=_HINT)
    messages = []
    for number, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise DataError(f"`messages[{number}]` has no role system, user or assistant")
        messages.append(Message(ROLES[role], _text(turn.get("content"), f"`messages[{number}].content`")))
    if messages[-1].role != "user":
        raise DataError("`messages` does not end in a user turn", hint="leave the answer out")
    return messages


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds a lone surrogate, which is no character") from None
    return value


def _source(question: Question) -> Any:
    return Instruction(question, "", "") if isinstance(question, str) else question

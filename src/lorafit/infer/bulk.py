"""Answers to the prompts of a file, written to a file: in order, resumable, and complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lorafit.errors import ConfigError
from lorafit.infer.model import Answer, Model
from lorafit.infer.prompts_file import PromptRow, read_prompts
from lorafit.infer.sampling import Sampling
from lorafit.model.adapter_file import adapter_tensors
from lorafit.observe.console import note
from lorafit.observe.progress import progress
from lorafit.redact import json_line
from lorafit.storage.atomic import run_error, sha256_file, write_file

_SYNC_SECONDS = 2.0


def answer_file(
    model: Model,
    prompts: Path,
    output: Path | None,
    *,
    max_tokens: int,
    sampling: Sampling,
    base: bool = False,
    show: Callable[[str], None],
) -> None:
    """Answer the prompts of a file. The answers, one JSON line each, go to `output` (.json: one list), or to `show`.

    The same call with `output` continues after the answers that an interrupted call has kept. Raises DataError,
    ConfigError or RunError.
    """
    rows = read_prompts(prompts, model)
    kept = AnswerFile(output, purpose_of(prompts, model, max_tokens, sampling, base)) if output else None
    start = len(kept.lines) if kept else 0
    if start:
        note(f"continues after {start:,} of {len(rows):,} answers")
    write = kept.add if kept else show
    try:
        with progress("answering") as advance:
            made = answers(
                model, rows, max_tokens=max_tokens, sampling=sampling, base=base, start=start, advance=advance
            )
            for index, answer in enumerate(made, start):
                write(line_of(index, rows[index], answer))
    except KeyboardInterrupt:
        if kept:
            count = f"{len(kept.lines):,} of {len(rows):,}"
            note(f"{count} answers are kept; the same command continues after them")
        raise
    finally:
        if kept:
            kept.close()
    if kept:
        kept.finish()
        show(str(output))


def answers(
    model: Model,
    rows: Sequence[PromptRow],
    *,
    max_tokens: int,
    sampling: Sampling,
    base: bool = False,
    start: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Answer]:
    """The answers to `rows[start:]` in order.

    `advance` gets the number of answers that are generated, which may be ahead of the order, and that of all rows.
    """
    requests = [model.request(row.ids, max_tokens, sampling, stream=index) for index, row in enumerate(rows)]
    done: dict[int, Answer] = {}
    num_yielded = 0
    for index, answer in model.answers(requests[start:], base=base):
        done[index] = answer
        advance(start + num_yielded + len(done), len(rows))
        while num_yielded in done:
            yield done.pop(num_yielded)
            num_yielded += 1


def line_of(index: int, row: PromptRow, answer: Answer) -> str:
    """An answer as a line of the output."""
    value = {
        "index": index,
        "input": row.raw,
        "answer": answer.text,
        "stopped": answer.stopped,
        "num_tokens": answer.num_tokens,
    }
    return json_line(value)


class AnswerFile:
    """The lines of `path`, kept in `path` with `.part` added to its name until all are written.

    `purpose` identifies prompts, model and settings. Lines of another purpose are refused.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        """Raises ConfigError where `path` exists, or its part has another purpose."""
        self.path, self.part = path, path.with_name(path.name + ".part")
        if path.exists():
            raise ConfigError(f"`{path}` exists already", hint="give another --output, or remove it")
        self._head = json.dumps({"answers": purpose})
        self.lines = self._read()
        with run_error("cannot write", self.part):
            self._file = self.part.open("w", encoding="utf-8", newline="\n")
            self._file.write("".join(line + "\n" for line in (self._head, *self.lines)))
            self._sync()

    def add(self, line: str) -> None:
        """Add a line, which is on the disk within a few seconds. Raises RunError."""
        self.lines.append(line)
        with run_error("cannot write", self.part):
            self._file.write(line + "\n")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()

    def finish(self) -> None:
        """Write the complete file, durably, and remove the part: lines, or one list for .json. Raises RunError."""
        self.close()
        is_list = self.path.suffix.lower() == ".json"
        text = (
            "[\n" + ",\n".join(self.lines) + "\n]\n"
            if is_list
            else "".join(f"{line}\n" for line in self.lines)
        )
        write_file(self.path, text)
        self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the part, which a later process can continue."""
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _read(self) -> list[str]:
        """The complete lines of an earlier process. A torn line, and all after it, are generated again."""
        try:
            head, *lines = self.part.read_bytes().decode("utf-8", "replace").split("\n")[:-1] or [""]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", place=str(self.part)) from None
        if head and head != self._head:
            raise ConfigError(
                "it contains answers to other prompts, or of another model or other settings",
                place=str(self.part),
                hint="remove it, or give another --output",
            )
        complete = []
        for index, line in enumerate(lines):
            try:
                if json.loads(line)["index"] != index:
                    break
            except (ValueError, KeyError, TypeError):
                break
            complete.append(line)
        return complete


def purpose_of(path: Path, model: Model, max_tokens: int, sampling: Sampling, base: bool) -> str:
    """A hash of all that decides the answers: prompts, contract, adapter, part of the base's weights, settings."""
    digest = hashlib.sha256(sha256_file(path).encode())
    network = model.network
    head = network.lm_head.weight
    for tensor in (*adapter_tensors(network).values(), network.decoder.final_norm.weight, head[:64]):
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    kinds = sorted({type(module).__name__ for module in network.modules()})
    settings = (model.renderer.contract.hash, max_tokens, sampling, base, str(head.dtype), kinds)
    digest.update(repr(settings).encode())
    return digest.hexdigest()

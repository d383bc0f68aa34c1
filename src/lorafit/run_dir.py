"""The run directory and its file names. Training appends to it; everything else only reads."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lorafit.config.load import MAX_RECIPE, dump_config, load_config, with_absolute_paths
from lorafit.config.schema import Config
from lorafit.errors import RunError
from lorafit.redact import shell, without_secrets
from lorafit.storage.atomic import (
    clean_orphans,
    is_orphan,
    make_folder,
    read_facts,
    remove_folder,
    run_error,
    sync,
    verify_folder,
    write_file,
)
from lorafit.storage.locks import CLAIM, Held, lock, refuse_others
from lorafit.storage.ownership import nobody_else_writes
from lorafit.storage.safe_read import MB, read_json, read_text

MAX_JSON = 64 * MB
PROMPT = "prompt.json"  # in each adapter folder and export too
# a name that YAML reads as it stands
_MODEL_NAME = re.compile(r"^model:\n  name: ([A-Za-z/][A-Za-z0-9_./-]*)\n", re.MULTILINE)
_NOT_MADE = "cannot make the run directory"
_CHECKPOINT = re.compile(r"step-(\d{6,})")


class RunDirectory:
    """Paths and small files of one run.

    config.yaml (resolved, every key) · env.json · prompt.json · ledger.json · check.json · metrics.jsonl ·
    checkpoints/step-000200/ · adapter/ (the final PEFT folder) · samples.json · proof.json · rows.json · visits.bin ·
    answer_losses.safetensors (of `lorafit rows --second-pass`) · row_list.json · why.json (answers that `lorafit why`
    explained) · report.html · drift.json (the answers of the base to neutral prompts, where they are used) ·
    heartbeat.json (of several ranks, when one was stuck) · exports/
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.env_file = path / "env.json"
        self.prompt_file = path / PROMPT
        self.ledger_file = path / "ledger.json"
        self.metrics_file = path / "metrics.jsonl"
        self.check_file = path / "check.json"
        self.samples_file = path / "samples.json"
        self.proof_file = path / "proof.json"
        self.rows_file = path / "rows.json"
        self.drift_file = path / "drift.json"
        self.visits_file = path / "visits.bin"
        self.answer_losses_file = path / "answer_losses.safetensors"
        self.row_list_file = path / "row_list.json"
        self.why_file = path / "why.json"
        self.report_file = path / "report.html"
        self.heartbeat_file = path / "heartbeat.json"
        self.lock_file = path / "run.lock"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.exports = path / "exports"
        self._written_first = (  # before config.yaml, which makes it a run
            *(self.prompt_file, self.ledger_file, self.rows_file, self.check_file, self.env_file),
            *(self.lock_file, path / f"{self.lock_file.name}{CLAIM}"),
        )
        self._held: Held | None = None

    @classmethod
    def new(cls, output: str | None, model_name: str) -> RunDirectory:
        """The run directory that `create` makes. Raises RunError when something exists there.

        Without `output` it is named by the model and the time, and made at once: of several processes that start in
        the same second, each gets a folder of its own. `removed_on_failure` removes it where no run begins.
        """
        if output is not None:
            run = cls(Path(output).expanduser())
            run.check_vacant()
            return run
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name) or "run"
        first = f"{stem[:100]}-{datetime.now():%Y%m%d-%H%M%S}"
        for number in itertools.count(1):
            run = cls(Path("runs") / (first if number == 1 else f"{first}-{number}"))
            with run_error(_NOT_MADE, run.path):
                make_folder(run.path.parent)
                with contextlib.suppress(FileExistsError):
                    run.path.mkdir()
                    return run
        raise AssertionError  # the loop has no other end

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove the folder if the block fails and nothing is in it."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise

    def check_vacant(self) -> None:
        """Raise RunError when something exists here."""
        if self.config_file.exists():
            raise RunError(
                f"`{self.path}` already holds a run",
                hint=f"resume it: `{shell('lorafit', 'train', '--resume', self.path)}`, or give another --output",
            )
        # files of a run that was killed before it had a config do not count
        is_vacant = self.path.is_dir() and all(
            (path in self._written_first or is_orphan(path.name)) and not path.is_symlink()
            for path in self.path.iterdir()
        )
        if self.path.exists() and not is_vacant:
            raise RunError(f"`{self.path}` is not empty", hint="give an --output that does not exist yet")

    def create(self, num_bytes: int | None = None) -> None:
        """Make the directory. Raises RunError when it cannot be written, naming the `num_bytes` that the run needs."""
        with run_error(_NOT_MADE, self.path, num_bytes):
            make_folder(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process. Raises RunError when another living process holds the lock.

        From then on nothing is written where the folder or the lock at the path is another one: see `check_held`.
        """
        with nobody_else_writes(), lock(self.lock_file) as held:
            if self.checkpoints.is_dir():
                refuse_others(self.checkpoints)
            self._held = held
            try:
                yield
            finally:
                self._held = None

    def check_held(self) -> None:
        """Raise RunError where this process has locked the run and the run was moved, removed or replaced since."""
        if self._held is not None:
            self._held.check()

    def keep_locked(self) -> tuple[contextlib.AbstractContextManager[object], Callable[[], None]]:
        """A context that holds the lock until it ends, and `check_held`, both also after `locked`: for a thread.

        Call this while the lock is held; the context may be entered later.
        """
        if self._held is None:
            return contextlib.nullcontext(), self.check_held
        return self._held.keep(), self._held.check

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run directory. Raises RunError when there is none."""
        run = cls(Path(path).expanduser())
        if not run.config_file.is_file():
            raise RunError(
                f"`{path}` is not a run directory: it has no config.yaml",
                hint="`lorafit runs` lists the runs below a folder",
            )
        return run

    def refuse_links(self) -> None:
        """Raise RunError if anything here or among the checkpoints is a link: a run writes only in its own folder."""
        for folder in (self.path, self.checkpoints):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_symlink():
                    raise RunError(
                        f"`{path.name}` is a link, and a run writes only in its own folder",
                        place=str(path),
                        hint="replace it by what it points to, or move the whole run",
                    )

    def config(self) -> Config:
        """The resolved config that the run was started with."""
        return load_config(self.config_file)

    def model_name(self) -> str:
        """`model.name` of the config, read without the rest where lorafit wrote it. Raises a LorafitError."""
        with contextlib.suppress(OSError, ValueError):
            if match := _MODEL_NAME.search(read_text(self.config_file, MAX_RECIPE)):
                return match[1]
        return self.config().model.name

    def started(self) -> float:
        """The start of the run, in seconds since 1970; 0 where its config cannot be read."""
        try:
            return self.config_file.stat().st_mtime
        except OSError:
            return 0.0

    def write_config(self, config: Config) -> None:
        """Write the resolved config, with absolute paths."""
        self.check_held()
        write_file(self.config_file, dump_config(with_absolute_paths(config)))

    def write_json(self, file: Path, value: Mapping[str, Any] | list[Any]) -> None:
        """Replace one of the run's JSON files, durably."""
        self.check_held()
        value = without_secrets(value) if file == self.env_file else value  # a command line may hold some
        write_file(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def read_json(self, file: Path) -> Any:
        """One of the run's JSON files. Raises RunError naming it when it is missing or damaged."""
        try:
            return read_json(file, MAX_JSON)
        except FileNotFoundError:
            raise RunError(f"the run has no `{file.name}`", place=str(self.path)) from None
        except (OSError, ValueError):
            raise RunError(f"`{file.name}` cannot be read", place=str(file)) from None

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint of an optimizer step."""
        return self.checkpoints / f"step-{step:06d}"

    def saved_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, oldest first; not verified."""
        if not self.checkpoints.is_dir():
            return []
        matches = [_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def newest_checkpoint(self) -> tuple[int | None, dict[int, str]]:
        """(newest step whose checkpoint verifies, newer ones and why they were skipped). None when none does."""
        skipped: dict[int, str] = {}
        for step in reversed(self.saved_steps()):
            folder = self.checkpoint(step)
            faults = verify_folder(folder)
            if not faults and (holds := read_facts(folder).get("step")) != step:
                faults = [f"it holds step {holds}"]
            if not faults:
                return step, skipped
            skipped[step] = f"checkpoint step-{step:06d} is damaged and was skipped: {faults[0]}"
        return None, skipped

    def has_adapter(self) -> bool:
        """Whether the final adapter exists and is whole."""
        return self.adapter.is_dir() and not verify_folder(self.adapter, may_have_more=True)

    def newest_adapter(self) -> Path:
        """The final adapter, else that of the newest checkpoint. Raises RunError when none is whole."""
        if self.adapter.is_dir():
            if faults := verify_folder(self.adapter, may_have_more=True):
                raise RunError(f"the adapter is damaged: {faults[0]}", place=str(self.adapter))
            return self.adapter
        step, skipped = self.newest_checkpoint()
        if step is None:
            why = next(iter(skipped.values())) if skipped else "it was stopped before its first checkpoint"
            raise RunError(f"the run has no adapter yet: {why}", place=str(self.path))
        return self.checkpoint(step)

    def rotate(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep` and the best steps that these name. Raises OSError, RunError."""
        self.check_held()
        steps = self.saved_steps()
        kept: set[int | None] = set(steps[-keep:])
        for step in steps[-keep:]:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged one names nothing
                kept.add(read_facts(self.checkpoint(step)).get("best_step"))
        for step in steps:
            if step not in kept:
                self.check_held()
                remove_folder(self.checkpoint(step))

    def set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that it is no longer used; its files stay. Raises RunError."""
        self.check_held()
        folder = self.checkpoint(step)
        aside = folder.with_name(f"damaged-{folder.name}")
        with run_error("cannot write here", folder):
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)

    def clean(self) -> None:
        """Remove the unfinished files of an earlier crash, and sync the finished ones. Raises RunError."""
        self.check_held()
        self.refuse_links()
        with run_error("cannot write here", self.path):
            for folder in (self.path.parent, self.path, self.checkpoints):  # names survive a power loss then
                with contextlib.suppress(FileNotFoundError, PermissionError):  # not there, or another user's
                    sync(folder)
            clean_orphans(self.path)
            clean_orphans(self.checkpoints)


def find_runs(folder: Path) -> list[RunDirectory]:
    """The run directories at `folder` and up to two levels below it, newest first."""
    folders = {path.parent for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}config.yaml")}
    runs = [RunDirectory(path) for path in folders]
    return sorted(runs, key=RunDirectory.started, reverse=True)

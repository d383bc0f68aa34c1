"""One trial of a campaign: the state of a dead run, and whether it resumes to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.jobs import digest, run_of, write_material
from tests.crash.server import Outcome, Servers


@dataclass(slots=True)
class Tally:
    """The number of trials of a campaign, the texts of its failures, and `facts`, numbers for the table."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, *problems: str) -> None:
        """Add a trial and its problems."""
        self.tried += 1
        if problems:
            self.failures.append(f"{name}: {'; '.join(problems)}")

    def count(self, fact: str, number: int = 1) -> None:
        self.facts[fact] = self.facts.get(fact, 0) + number

    def maximum(self, fact: str, number: int) -> None:
        self.facts[fact] = max(self.facts.get(fact, 0), number)


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a dead run: the last recorded step, the last step reported as saved, and the newest checkpoint."""

    last_step: int
    reported: int
    newest: int

    @classmethod
    def of(cls, root: Path) -> RunState:
        events = list(events_of(root))
        return cls(
            last_step=max((e["step"] for e in events if e["event"] == "step"), default=0),
            reported=max((e["step"] for e in events if e["event"] == "saved"), default=0),
            newest=run_of(root).newest_checkpoint()[0] or 0,
        )


def events_of(root: Path) -> Iterable[dict[str, Any]]:
    """The readable events of a run's metrics."""
    file = run_of(root).metrics_file
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


class Bench:
    """Servers, the settings of a tiny run, and the result of that run without faults.

    `mutation` is a mistake that is injected into lorafit in the children (see mutations.py); it must be detected.
    """

    mutation = ""

    def __init__(self, work: Path, servers: Servers, *changes: str) -> None:
        self.work, self.servers = work, servers
        material = work / "material"
        self.overrides: Sequence[str] = [*write_material(material), *changes]
        whole = self.servers.learn("start", work / "whole", overrides=self.overrides)
        assert whole.answer is not None
        assert whole.answer["finished"], whole.answer
        self.adapter: str = whole.answer["adapter"]
        self.state: str = whole.answer["state"]
        self.rows: list[tuple[int, list[int]]] = whole.answer["rows"]
        self.num_steps = len(self.rows)
        self.seconds = self.run("start", self.root("timed")).seconds

    def root(self, name: str) -> Path:
        """An empty folder for a trial."""
        root = self.work / "trials" / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        return root

    def run(self, job: str, root: Path, **how: Any) -> Outcome:
        """Run `job` in a child, in `root`."""
        return self.servers.run(job, root, overrides=self.overrides, mutation=self.mutation, **how)

    def with_mutation(self, name: str) -> Bench:
        """The same bench with a mistake in lorafit."""
        mutated = copy(self)
        mutated.mutation = name
        return mutated

    def is_detected(self, tally: Tally) -> bool:
        """Whether the mutation has made a trial fail; the trials after that show nothing more."""
        return bool(self.mutation and tally.failures)

    def finish(self, root: Path) -> list[str]:
        """Resume the run in `root` without faults. Returns its problems; without problems, removes `root`."""
        problems = self.end_of(root, self.run("resume", root))
        if not problems:
            shutil.rmtree(root)
        return problems

    def end_of(self, root: Path, outcome: Outcome) -> list[str]:
        """The problems of a run that was resumed without faults."""
        if outcome.fault or outcome.answer is None:
            return [f"it crashed: {outcome.fault}"]
        if not outcome.answer["finished"]:
            return [f"it did not finish: {outcome.answer['problems']}"]
        problems = []
        if digest(root) != self.adapter:
            problems.append("the final adapter differs")
        elif outcome.answer["state"] != self.state:
            problems.append("the last checkpoint differs")
        reported = any("no report" in event.get("text", "") for event in events_of(root))
        if not run_of(root).report_file.exists() and not reported:
            problems.append("there is no report and no message about it")
        steps = [event["step"] for event in events_of(root) if event["event"] == "step"]
        if steps != list(range(1, self.num_steps + 1)):
            problems.append(f"metrics.jsonl has the steps {steps}")
        run = run_of(root)
        remaining = [p.name for folder in (run.path, run.checkpoints) for p in folder.glob(".*")]
        return [*problems, *(f"{name} was not removed" for name in remaining)]

"""What the acceptance on a GPU found: checks with their bounds, speeds beside goals, as text and as JSON."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.report import table

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the device. `value` is what was measured, `most` its bound where it is a number."""

    part: str
    name: str
    verdict: str
    value: float | str
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """One measured rate. `goal` is the least tokens per second on an H100, None where there is none."""

    name: str
    tokens_per_second: float
    peak_gb: float
    tflops: float | None = None
    goal: float | None = None

    def row(self) -> list[str]:
        """The cells of the table of goals."""
        goal = "" if self.goal is None else f"{self.goal:,.0f}"
        reached = "" if self.goal is None else "reached" if self.tokens_per_second >= self.goal else "missed"
        tflops = "" if self.tflops is None else f"{self.tflops:.0f}"
        return [self.name, goal, f"{self.tokens_per_second:,.0f}", reached, tflops, f"{self.peak_gb:.1f}"]


@dataclass
class Results:
    """All that was found. `part` is what runs now."""

    end: float
    part: str = ""
    checks: list[Check] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def at_most(self, name: str, value: float, most: float) -> None:
        """A number that must not exceed `most`; one that is not finite fails."""
        good = math.isfinite(value) and value <= most
        self._add(name, good, value, most, f"{value:.3g} (at most {most:.3g})")

    def holds(self, name: str, good: bool, text: str = "") -> None:
        """A statement that is true or false; `text` says what was seen."""
        self._add(name, good, text or str(good), None, text)

    def skip(self, name: str, why: str) -> None:
        """A check that cannot run here."""
        self.checks.append(Check(self.part, name, NOT_RUN, why))
        print(f"  {NOT_RUN}  {name}: {why}", flush=True)

    def note(self, text: str) -> None:
        """A figure without a bound."""
        self.notes.append(f"{self.part}: {text}")
        print(f"  {text}", flush=True)

    def speed(self, speed: Speed) -> None:
        """A measured rate."""
        self.speeds.append(speed)
        print("  " + "  ".join(filter(None, speed.row())), flush=True)

    def run(self, name: str, part: Callable[[], None], reserve: float = 0.0) -> None:
        """Run a part, unless fewer than `reserve` seconds are left. One that raises fails, and the next one runs."""
        self.part = name
        if time.monotonic() > self.end - reserve:
            self.skip(name, "no time left")
            return
        print(name, flush=True)
        started = time.monotonic()
        try:
            part()
        except Exception as error:
            traceback.print_exc(limit=-6)
            self._add("runs to its end", False, f"{type(error).__name__}: {error}", None, str(error)[:300])
        self.seconds[name] = round(time.monotonic() - started, 1)

    def count(self, verdict: str) -> int:
        """How many checks have this verdict."""
        return sum(check.verdict == verdict for check in self.checks)

    def text(self) -> str:
        """The table of goals, the checks that failed or did not run, and the last line."""
        head = ["run", "goal, tokens/s", "measured", "", "TFLOP/s", "peak GB"]
        parts = [table(head, [speed.row() for speed in self.speeds])] if self.speeds else []
        parts += [
            f"{check.verdict}: {check.part}: {check.name}: {check.value}"
            for check in self.checks
            if check.verdict != PASSED
        ]
        not_run = f", {self.count(NOT_RUN)} not run" if self.count(NOT_RUN) else ""
        return "\n".join([*parts, f"{self.count(PASSED)} passed, {self.count(FAILED)} failed{not_run}"])

    def as_json(self, machine: dict[str, Any]) -> str:
        """Everything, with what the machine is."""
        lists = {name: [asdict(each) for each in getattr(self, name)] for name in ("checks", "speeds")}
        whole = {"machine": machine, **lists, "notes": self.notes, "seconds": self.seconds}
        return json.dumps(whole, indent=1, default=str) + "\n"

    def _add(self, name: str, good: bool, value: float | str, most: float | None, text: str) -> None:
        verdict = PASSED if good else FAILED
        self.checks.append(Check(self.part, name, verdict, value, most))
        print(f"  {verdict}  {name}  {text}", flush=True)

"""Many hostile values of every kind, one after another in this process: what each came to, and how long it took."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.marks import put_between
from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.hostile.fuzz_targets import TARGETS, Scene, Target

SECONDS = 2.0  # of the processor: a busy machine is slow, not wrong
BATCH = 2000  # examples with one seed; hypothesis remembers all of them


class TooSlowError(BaseException):
    """An example takes too long; no `except Exception` may hide it."""


@dataclass(slots=True)
class Tally:
    """What the examples of one target came to."""

    examples: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    slowest_example: str = ""
    failures: list[str] = field(default_factory=list)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what takes more processor time than that with TooSlowError (where Python gets to run at all)."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def example(
    scene: Scene, check: Callable[[Scene, Any], None], drawn: Any, tally: Tally, seconds: float = SECONDS
) -> None:
    """One example: AssertionError, or what came out of `check`, unless it ends well and in time."""
    started = time.process_time()
    try:
        with limited(seconds):
            check(scene, drawn)
    except TooSlowError:
        raise AssertionError(f"it took more than {seconds} s") from None
    finally:
        took = time.process_time() - started
        tally.examples += 1
        tally.seconds += took
        if took > tally.slowest:
            tally.slowest, tally.slowest_example = took, repr(drawn)
    assert took < seconds, f"it took {took:.1f} s"


def fuzz(
    scene: Scene,
    target: Target,
    count: int,
    tally: Tally,
    number: int | None = None,
    seconds: float = SECONDS,
) -> None:
    """Try `count` examples, from the seed `number` or as the profile says; raises for the smallest that fails."""

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(target.strategy)
    def run(drawn: Any) -> None:
        example(scene, target.check, drawn, tally, seconds)

    (run if number is None else seed(number)(run))()


def campaign(
    scene: Scene, names: Sequence[str], count: int, minutes: float | None, first_seed: int
) -> dict[str, Tally]:
    """`count` examples shared out among the targets `names`, in rounds of BATCH, or as many as fit in `minutes`."""
    ends = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    shares = sum(TARGETS[name].share for name in names)
    wanted = {name: round(count * TARGETS[name].share / shares) for name in names}
    tallies = {name: Tally() for name in names}
    number = first_seed
    while open_ones := [name for name in names if tallies[name].examples < wanted[name]]:
        for name in open_ones:
            if time.monotonic() > ends:
                return tallies
            tally, number = tallies[name], number + 1
            left = wanted[name] - tally.examples
            size = min(left, max(50, round(BATCH * TARGETS[name].share / shares)))
            try:
                fuzz(scene, TARGETS[name], size, tally, number)
            except Exception as error:
                said = "".join(traceback.format_exception_only(error)).strip()
                where = traceback.extract_tb(error.__traceback__)[-1]
                tally.failures.append(f"{said}\n(seed {number}, {Path(where.filename).name}:{where.lineno})")
                print(f"{name}: {tally.failures[-1]}", file=sys.stderr, flush=True)
    return tallies


def markdown(tallies: dict[str, Tally]) -> str:
    """The table for docs/security.md."""
    lines = ["| fuzzed | examples | slowest | failed |", "|---|---:|---:|---:|"]
    for name, tally in tallies.items():
        lines.append(
            f"| {TARGETS[name].title} | {tally.examples:,} | {tally.slowest:.2f} s | {len(tally.failures)} |"
        )
    total, failed = sum(t.examples for t in tallies.values()), sum(len(t.failures) for t in tallies.values())
    lines.append(
        f"| **all** | **{total:,}** | {max(t.slowest for t in tallies.values()):.2f} s | **{failed}** |"
    )
    return "\n".join(lines)


def main() -> int:
    """Run the campaign; exit code 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200_000, help="in all")
    parser.add_argument("--minutes", type=float, default=None, help="end after this time, with what there is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, default=None, help="put the table into this page")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all without any")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tallies = campaign(
            Scene(Path(folder)), wanted.targets or list(TARGETS), wanted.examples, wanted.minutes, wanted.seed
        )
    table = markdown(tallies)
    print(table)
    for name, tally in tallies.items():
        print(f"{name}: {tally.seconds:.0f} s; slowest {tally.slowest:.2f} s: {tally.slowest_example[:300]}")
    if wanted.into:
        put_between(wanted.into, "fuzz", table)
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

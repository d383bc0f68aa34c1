"""R1 and R2: sends SIGKILL at every call that changes files, and at random times; then resumes the run."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from tests.crash.shim import Call, Injection, read_log
from tests.crash.trial import Bench, RunState, Tally

SAVE_EVERY = 2  # steps between two saves of the run in jobs.py


def calls_of_a_run(bench: Bench) -> list[Call]:
    """Every call that changes files in one run, with its cache of rows."""
    root, log = bench.root("recorded"), bench.work / "calls.log"
    log.unlink(missing_ok=True)
    outcome = bench.run("start", root, log=log)
    assert outcome.answer is not None, outcome.fault
    return list(read_log(log, root))


def injections(calls: Sequence[Call]) -> list[Injection]:
    """A kill before each call, in the middle of each write, and after the last call of each thread.

    The calls of the main thread between two commits depend on time, so there are three more calls per thread.
    """
    last = {call.thread: call.number for call in calls}
    writes = {(call.thread, call.number) for call in calls if call.kind == "w"}
    before = [Injection(t, number, "kill") for t, end in last.items() for number in range(1, end + 4)]
    return before + [Injection(t, number, "tear") for t, number in sorted(writes)]


def kill_at_calls(bench: Bench, every: int = 1, at: str = "") -> Tally:
    """R1, at every `every`-th injection, or only at calls whose path contains `at`.

    Saving overlaps with training. A kill can lose the save in progress and the steps since the previous save. These are
    at most two intervals if a commit takes as long as an interval, as it does here.
    """
    tally = Tally()
    calls = calls_of_a_run(bench)
    tally.facts["calls that change files"] = len(calls)
    tally.facts["saves"] = sum(call.kind == "r" and "checkpoints/step" in call.target for call in calls)
    selected = {(call.thread, call.number) for call in calls if at in call.path}
    chosen = [
        injection
        for injection in injections(calls)
        if not at or (injection.thread, injection.call) in selected
    ]
    random.Random(0).shuffle(chosen)  # with a time limit, the campaign is a random sample

    def trial(injection: Injection) -> tuple[Injection, list[str], RunState | None]:
        root = bench.root(f"kill-{injection.thread}-{injection.call}-{injection.act}")
        outcome = bench.run("start", root, injection=injection)
        if not outcome.killed:  # the run ended before the injection
            return injection, bench.end_of(root, outcome), None
        state = RunState.of(root)
        problems = (
            [] if state.newest >= state.reported else [f"the checkpoint of step {state.reported} is lost"]
        )
        if (lost := state.last_step - state.newest) > 2 * SAVE_EVERY:
            problems.append(f"{lost} steps are lost")
        return injection, problems + bench.finish(root), state

    for injection, problems, state in bench.servers.each(trial, chosen[::every]):
        if state is None and not problems:
            tally.count("not reached")
            continue
        tally.add(str(injection), *problems)
        if bench.is_detected(tally):
            break
        if state:
            lost = state.last_step - state.newest
            tally.maximum("maximum of lost steps", lost)
            tally.count("kills that lost more than one interval", lost > SAVE_EVERY)
    return tally


def kill_at_random_times(bench: Bench, kills: int, seed: int = 0) -> Tally:
    """R2: chains of up to five kills, until `kills` kills; then each chain is resumed to the end."""
    tally = Tally()
    tally.facts["kills"] = 0

    def chain(number: int) -> tuple[int, int, list[str]]:
        random_times = random.Random(f"{seed}-{number}")
        root = bench.root(f"chain-{number}")
        num_kills, problems = 0, []
        job = "start"
        for _ in range(random_times.randint(1, 5)):
            reported = RunState.of(root).reported if num_kills else 0
            outcome = bench.run(job, root, kill_after=random_times.uniform(0, 1.1 * bench.seconds))
            if not outcome.killed:
                break
            num_kills, job = num_kills + 1, "resume"
            if RunState.of(root).newest < reported:
                problems.append(f"the checkpoint of step {reported} is lost")
        return number, num_kills, problems + bench.finish(root)

    for number, num_kills, problems in bench.servers.each(chain, itertools.count()):
        tally.add(f"chain {number}", *problems)
        tally.count("kills", num_kills)
        tally.maximum("longest chain", num_kills)
        if tally.facts["kills"] >= kills:
            break
    return tally

"""R1 and R2: SIGKILL at every call that changes files, and at random times; then the run is resumed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.crash.shim import Call, Strike, read_log
from tests.crash.trial import Bench, Left, Tally

SAVE_EVERY = 2  # steps, of the run in jobs.py


def calls_of_a_run(bench: Bench) -> list[Call]:
    """Every call that changes files in one run, its cache of rows included."""
    root, log = bench.root("recorded"), bench.work / "calls.log"
    log.unlink(missing_ok=True)
    outcome = bench.run("start", root, log=log)
    assert outcome.answer is not None, outcome.fault
    return list(read_log(log, root))


def strikes(calls: Sequence[Call]) -> list[Strike]:
    """A kill before each call, one in the middle of each write, and one after the last call of each thread.

    Which calls the main thread makes between two commits depends on time, so a few more than were counted.
    """
    last = {call.thread: call.number for call in calls}
    writes = {(call.thread, call.number) for call in calls if call.kind == "w"}
    before = [Strike(t, number, "kill") for t, end in last.items() for number in range(1, end + 4)]
    return before + [Strike(t, number, "tear") for t, number in sorted(writes)]


def kill_at_calls(bench: Bench, every: int = 1, at: str = "") -> Tally:
    """R1, at every `every`-th of these strikes, or of those at calls whose path contains `at`.

    Saving overlaps with training. So the save under way may be lost, and with it the steps that were made since the
    one before: up to two intervals where a commit takes as long as an interval, as it does here; never more.
    """
    tally = Tally()
    calls = calls_of_a_run(bench)
    tally.facts["calls that change files"] = len(calls)
    tally.facts["saves"] = sum(call.kind == "r" and "checkpoints/step" in call.target for call in calls)
    wanted = {(call.thread, call.number) for call in calls if at in call.path}
    chosen = [strike for strike in strikes(calls) if not at or (strike.thread, strike.call) in wanted]
    random.Random(0).shuffle(chosen)  # one that is cut short is a sample

    def trial(strike: Strike) -> tuple[Strike, list[str], Left | None]:
        root = bench.root(f"kill-{strike.thread}-{strike.call}-{strike.act}")
        outcome = bench.run("start", root, strike=strike)
        if not outcome.killed:  # this time the run was over before it
            return strike, bench.end_of(root, outcome), None
        left = Left.by(root)
        problems = [] if left.newest >= left.reported else [f"the checkpoint of step {left.reported} is gone"]
        if (lost := left.last_step - left.newest) > 2 * SAVE_EVERY:
            problems.append(f"{lost} steps are lost")
        return strike, problems + bench.finish(root), left

    for strike, problems, left in bench.servers.each(trial, chosen[::every]):
        if left is None and not problems:
            tally.count("not reached")
            continue
        tally.add(str(strike), *problems)
        if left:
            lost = left.last_step - left.newest
            tally.most("most steps lost", lost)
            tally.count("kills that lost more than one interval", lost > SAVE_EVERY)
    return tally


def kill_at_random_times(bench: Bench, kills: int, seed: int = 0) -> Tally:
    """R2: chains of up to five kills, until `kills` hit; each chain then goes on to the end."""
    tally = Tally()
    tally.facts["kills"] = 0

    def chain(number: int) -> tuple[int, int, list[str]]:
        random_times = random.Random(f"{seed}-{number}")
        root = bench.root(f"chain-{number}")
        hits, problems = 0, []
        job = "start"
        for _ in range(random_times.randint(1, 5)):
            reported = Left.by(root).reported if hits else 0
            outcome = bench.run(job, root, kill_after=random_times.uniform(0, 1.1 * bench.seconds))
            if not outcome.killed:
                break
            hits, job = hits + 1, "go_on"
            if Left.by(root).newest < reported:
                problems.append(f"the checkpoint of step {reported} is gone")
        return number, hits, problems + bench.finish(root)

    number = 0
    while tally.facts["kills"] < kills and not bench.servers.cut_short:
        chains = range(number, number + 4 * bench.servers.count)
        for name, hits, problems in bench.servers.each(chain, chains):
            tally.add(f"chain {name}", *problems)
            tally.count("kills", hits)
            tally.most("longest chain", hits)
        number = chains.stop
    return tally

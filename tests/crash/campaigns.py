"""The campaigns by name: what each does, its target, and its short and its long form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.crash import corruption, faults, kills, parity, power, syscalls, trainer
from tests.crash.server import Servers
from tests.crash.trial import Bench, Tally


@dataclass(frozen=True, slots=True)
class Campaign:
    """`run` works in an empty folder, with servers of `module`; True asks for the long form.

    `missing` says why it cannot run here, "" where it can.
    """

    what: str
    target: str
    run: Callable[[Path, Servers, bool], Tally]
    module: str = "tests.crash.power"
    missing: Callable[[], str] = lambda: ""


def _kill_at_calls(work: Path, servers: Servers, long: bool) -> Tally:
    return kills.kill_at_calls(Bench(work, servers), 1 if long else 16)


def _kill_at_random_times(work: Path, servers: Servers, long: bool) -> Tally:
    return kills.kill_at_random_times(Bench(work, servers), 2000 if long else 8)


def _cut_the_power(work: Path, servers: Servers, long: bool) -> Tally:
    if not long:
        return power.cut_the_power(Bench(work, servers), ["stopped", 0.5], 12, 60, 8)
    histories: list[power.History] = ["undisturbed", "stopped", 0.3, 0.45, 0.6, 0.75, 0.9]
    return power.cut_the_power(Bench(work, servers), histories, 50, 100)


def _fail_calls(work: Path, servers: Servers, long: bool) -> Tally:
    return faults.fail_calls(Bench(work, servers, *faults.SHORT_RUN), 1 if long else 67)


def _fill_disks(work: Path, servers: Servers, long: bool) -> Tally:
    return faults.fill_disks(Bench(work, servers, *faults.SHORT_RUN), 50 if long else 5)


def _flip_bits(work: Path, servers: Servers, long: bool) -> Tally:
    return corruption.flip_bits(Bench(work, servers), 1 if long else 61)


def _damage_files(work: Path, servers: Servers, long: bool) -> Tally:
    return corruption.damage_files(Bench(work, servers), 1 if long else 40)


def _lie_in_writes(work: Path, servers: Servers, long: bool) -> Tally:
    return corruption.lie_in_writes(Bench(work, servers, *faults.SHORT_RUN), 1 if long else 4)


def _resume_everywhere(work: Path, servers: Servers, long: bool) -> Tally:
    chosen = list(parity.configurations())[:: 1 if long else 13]
    return parity.resume_everywhere(work, servers, chosen, 1 if long else 4)


def _compare_with_strace(work: Path, servers: Servers, long: bool) -> Tally:
    return syscalls.compare(Bench(work, servers))


def _kill_trainer(work: Path, servers: Servers, long: bool) -> Tally:
    return trainer.kill_trainer(work, servers, 120 if long else 4)


CAMPAIGNS: Mapping[str, Campaign] = {
    "R1": Campaign(
        "SIGKILL at every call that changes files, and in the middle of every write; then resume",
        "exhaustive; no failed resume, the same SHA-256, at most one save interval lost",
        _kill_at_calls,
    ),
    "R1-trace": Campaign(
        "the calls of one run, counted by strace as well, for each kind of call",
        "the same counts",
        _compare_with_strace,
        missing=syscalls.strace_fault,
    ),
    "R2": Campaign(
        "SIGKILL at random times, also during resume, chains of up to 5",
        "2,000 kills, no failure",
        _kill_at_random_times,
    ),
    "R3": Campaign(
        "power loss: the images of the disk that are legal at each moment of recorded runs",
        "20,000 images; no checkpoint reported as saved is lost, no damaged one accepted",
        _cut_the_power,
    ),
    "R4": Campaign(
        "ENOSPC, EDQUOT, EIO, EROFS at every call, once and for good; every write cut short",
        "the last good checkpoint loads, the message names path, cause and bytes, the resume is equal",
        _fail_calls,
    ),
    "R4-disk": Campaign(
        "a real file system of 50 sizes that is full, then made larger",
        "the same",
        _fill_disks,
        missing=faults.mount_fault,
    ),
    "R5": Campaign(
        "one bit flipped in every byte of a checkpoint and of an adapter",
        "all found before use, each time the checkpoint before is taken",
        _flip_bits,
    ),
    "R5-files": Campaign(
        "files of a checkpoint missing, cut, longer, zeroed, exchanged, out of date; then resume",
        "all found, all resumes equal",
        _damage_files,
    ),
    "R5-writes": Campaign(
        "a disk that changes a bit of a write, at every write of a save and of the export",
        "all found before an older checkpoint goes, all resumes equal",
        _lie_in_writes,
    ),
    "R6": Campaign(
        "resume from every step of runs of many configurations",
        "60 configurations; bytes and row ids equal",
        _resume_everywhere,
    ),
    "Trainer": Campaign(
        "R1 on transformers' Trainer with peft, at 120 of its places, resumed as its documentation says",
        "for comparison",
        _kill_trainer,
        module=trainer.MODULE,
    ),
}

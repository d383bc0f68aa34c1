"""The campaigns by name: description, target, and short and long form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.crash import corruption, faults, folders, kills, parity, power, syscalls, trainer
from tests.crash.server import Servers
from tests.crash.trial import Bench, Tally


@dataclass(frozen=True, slots=True)
class Campaign:
    """`run` gets an empty folder, servers of `module`, and True for the long form.

    `missing` returns the reason why the campaign cannot run on this machine, or "".
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


def _corrupt_writes(work: Path, servers: Servers, long: bool) -> Tally:
    return corruption.corrupt_writes(Bench(work, servers, *faults.SHORT_RUN), 1 if long else 4)


def _resume_everywhere(work: Path, servers: Servers, long: bool) -> Tally:
    chosen = list(parity.configurations())[:: 1 if long else 13]
    return parity.resume_everywhere(work, servers, chosen, 1 if long else 4)


def _take_folders_away(work: Path, servers: Servers, long: bool) -> Tally:
    return folders.take_folders_away(work, servers, 300 if long else 6)


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
        "the calls of one run, counted by the library and by strace, per kind of call",
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
        "power loss: the disk images that are possible at each moment of recorded runs",
        "20,000 images; no checkpoint reported as saved is lost, no damaged checkpoint is accepted",
        _cut_the_power,
    ),
    "R4": Campaign(
        "ENOSPC, EDQUOT, EIO, EROFS at every call, once and permanently; every write truncated",
        "the last good checkpoint loads, the message names path, cause and bytes, the resumed run is equal",
        _fail_calls,
    ),
    "R4-disk": Campaign(
        "real file systems of 50 sizes: full, then enlarged",
        "the same",
        _fill_disks,
        missing=faults.mount_fault,
    ),
    "R5": Campaign(
        "one bit flipped in every byte of a checkpoint and of an adapter",
        "all detected before use, and each time the previous checkpoint is used",
        _flip_bits,
    ),
    "R5-files": Campaign(
        "files of a checkpoint missing, truncated, longer, zeroed, exchanged or out of date; then resume",
        "all detected, all resumed runs equal",
        _damage_files,
    ),
    "R5-writes": Campaign(
        "a disk that changes a bit of a write, at every write of a save and of the export",
        "all detected before an older checkpoint is removed, all resumed runs equal",
        _corrupt_writes,
    ),
    "R6": Campaign(
        "resume from every step of runs of many configurations",
        "60 configurations; bytes and row ids equal",
        _resume_everywhere,
    ),
    "R7": Campaign(
        "the folder of a run that trains removed, moved, copied over, linked, its lock removed; kills; resumes; up to "
        "three processes on one path",
        "300 sequences; what is reported as saved is whole and of one seed, no folder holds two runs",
        _take_folders_away,
    ),
    "Trainer": Campaign(
        "R1 on transformers' Trainer with peft, at 120 calls, resumed as in its documentation",
        "for comparison",
        _kill_trainer,
        module=trainer.MODULE,
    ),
}

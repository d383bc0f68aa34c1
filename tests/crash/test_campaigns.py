"""The campaigns in short form: no failure, and each injected mistake of the protocol is detected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.crash import corruption, faults, kills, parity, power, syscalls
from tests.crash.mutations import MUTATIONS
from tests.crash.server import Servers
from tests.crash.shim import unavailable
from tests.crash.trial import Bench, Tally

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available"),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("servers"), "tests.crash.power") as running:
        yield running


@pytest.fixture(scope="module")
def bench(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), servers)


@pytest.fixture(scope="module")
def short(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A run with three saves, of which one is kept."""
    return Bench(tmp_path_factory.mktemp("short"), servers, *faults.SHORT_RUN)


def parities(bench: Bench, *chosen: tuple[str, ...], every: int = 3) -> Tally:
    return parity.resume_everywhere(bench.work, bench.servers, chosen, every, bench.mutation)


def test_kills_at_calls(bench: Bench) -> None:
    tally = kills.kill_at_calls(bench, every=25)
    assert not tally.failures
    assert tally.tried > 8
    assert tally.facts["saves"] >= 6


def test_kills_at_random_times(bench: Bench) -> None:
    tally = kills.kill_at_random_times(bench, 6)
    assert not tally.failures
    assert tally.facts["kills"] >= 6


def test_power_cuts(bench: Bench) -> None:
    tally = power.cut_the_power(bench, ["stopped", 0.5], per_moment=12, sample=100, stride=12)
    assert not tally.failures
    assert tally.tried > 200
    assert tally.facts["resumed to the end"] >= 2


def test_failing_calls(short: Bench) -> None:
    tally = faults.fail_calls(short, every=131)
    assert not tally.failures
    assert tally.tried > 10


def test_folders_that_cannot_be_made(short: Bench) -> None:
    tally = faults.fail_calls(short, every=3, kinds="m")
    assert not tally.failures
    assert tally.tried > 10


@pytest.mark.skipif(bool(faults.mount_fault()), reason=faults.mount_fault() or "available")
def test_full_disks(short: Bench) -> None:
    tally = faults.fill_disks(short, 5)
    assert not tally.failures
    assert tally.facts["stopped with a message"] >= 3


def test_damage(bench: Bench) -> None:
    flips = corruption.flip_bits(bench, every=61)
    assert not flips.failures
    assert flips.tried > 500
    files = corruption.damage_files(bench, sample=60)
    assert not files.failures
    assert files.tried > 100
    writes = corruption.corrupt_writes(bench, every=11)
    assert not writes.failures
    assert writes.tried > 2


def test_resumes_from_steps_of_many_configurations(bench: Bench) -> None:
    tally = parities(bench, *list(parity.configurations())[::16], every=5)
    assert not tally.failures
    assert tally.facts["configurations"] >= 5


@pytest.mark.skipif(bool(syscalls.strace_fault()), reason=syscalls.strace_fault() or "available")
def test_the_shim_sees_every_call_that_strace_sees(bench: Bench) -> None:
    tally = syscalls.compare(bench)
    assert not tally.failures


# mistake -> the smallest campaign that detects it
DETECTED_BY: dict[str, Callable[[Bench, Bench], Tally]] = {
    "files are not synced": lambda bench, _: power.cut_the_power(bench, ["undisturbed"], 8, 10**6, 13),
    "the staging folder is not synced": lambda bench, _: power.cut_the_power(
        bench, ["undisturbed"], 8, 10**6, 13
    ),
    "the parent is not synced": lambda bench, _: power.cut_the_power(bench, ["undisturbed"], 8, 10**6, 13),
    "the parents of new folders are not synced": lambda bench, _: power.cut_the_power(
        bench, ["undisturbed"], 8, 10**6, 13
    ),
    "small files are written in place": lambda bench, _: kills.kill_at_calls(bench, at="config.yaml"),
    "older checkpoints are removed before the new one is complete": lambda _, short: faults.fail_calls(
        short, 53, "c"
    ),
    "orphans are not removed": lambda bench, _: kills.kill_at_calls(bench, 7, at="/.staging-step-000002"),
    "written files are not verified": lambda _, short: corruption.corrupt_writes(short, every=4),
    "an error of fsync is ignored": lambda _, short: faults.fail_calls(short, 61, "s"),
    "metrics of lost steps are not removed": lambda bench, _: kills.kill_at_calls(bench, 9, at="step-000006"),
    "random states are not restored": lambda bench, _: parities(bench, ("lora.dropout=0.1",)),
    "the optimizer is reset": lambda bench, _: parities(bench, ("lora.dropout=0",)),
    "the loss scale is reset": lambda bench, _: parities(bench, parity.OVERFLOWS),
    "a resume restarts its epoch": lambda bench, _: parities(bench, ("lora.dropout=0",)),
    "the state is read during training": lambda bench, _: parities(bench, ("lora.dropout=0",)),
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_each_mistake_is_detected(bench: Bench, short: Bench, mistake: str) -> None:
    tally = DETECTED_BY[mistake](bench.with_mutation(mistake), short.with_mutation(mistake))
    assert tally.tried
    assert tally.failures


def test_a_manifest_that_is_not_verified_is_detected(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(folder: Path, *, may_have_more: bool = False) -> list[str]:
        return [] if (folder / "manifest.json").is_file() else ["it is missing"]

    monkeypatch.setattr("lorafit.run_dir.verify_folder", accept)
    tally = corruption.flip_bits(bench, every=4001)
    assert len(tally.failures) == tally.tried

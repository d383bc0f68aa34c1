"""What all tests share: fixed examples of the property tests, a cache of their own, one thread, the shared files."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from tests.command import Cli, command_line
from tests.shared_files import shared_dir

from lorafit.cli.main import COLLECT

# Both before torch and its friends are imported. The networks of the tests are too small to share among threads.
os.environ["OMP_NUM_THREADS"] = "1"  # children inherit it
gc.set_threshold(*COLLECT)

# Property tests draw the same examples on every machine, in CI and outside. No limit is in seconds, nothing is read
# from or written to a folder of earlier examples. `--hypothesis-seed=N` draws other examples, and more: what is drawn
# again each time finds what was changed, fresh seeds find what was never right.
settings.register_profile(
    "fixed",
    parent=settings.get_profile("default"),
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("seed", parent=settings.get_profile("fixed"), derandomize=False, max_examples=100)
# hypothesis also draws the constants of the modules of this project that are imported so far. Which those are depends
# on the tests that ran before in the same process, so the examples would depend on it too.
NO_CONSTANTS = providers.Constants()
providers._get_local_constants = lambda: NO_CONSTANTS  # test_same_examples.py sees whether this works


def pytest_configure(config: pytest.Config) -> None:
    """The profile of this session: settings that are made in a test module are derived from it.

    Below nohup and in the background of a script some signals are ignored, and children inherit that. Tests that stop a
    run would wait for ever.
    """
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)
    settings.load_profile("fixed" if seed_of(config) is None else "seed")


# What `make quick` runs, without the tests that are marked slow: the layers below the model, and the files themselves.
QUICK = {
    "bugs", "check", "config", "data", "demo", "docs", "gguf_file", "hub", "observe", "plan", "report", "storage",
    "studio", "sweep", "test_layers.py", "test_redact.py", "test_sources.py",
}  # fmt: skip
TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what `make quick` runs."""
    is_ours = item.path.is_relative_to(TESTS)
    if is_ours and item.path.relative_to(TESTS).parts[0] in QUICK and not item.get_closest_marker("slow"):
        item.add_marker("quick")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, files with slow tests come first: at the end, no worker waits for a long file."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


def seed_of(config: pytest.Config) -> str | None:
    """The seed that was given with --hypothesis-seed."""
    seed: str | None = config.getoption("--hypothesis-seed")
    return seed


def pytest_report_header(config: pytest.Config) -> str:
    """Which examples the property tests draw."""
    seed = seed_of(config)
    return f"property tests: {'fixed examples' if seed is None else f'--hypothesis-seed={seed}'}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the command that draws the same examples to the report of a property test that fails."""
    report: pytest.TestReport = yield  # type: ignore[assignment, misc]
    if report.failed and item.get_closest_marker("hypothesis"):
        seed = seed_of(item.config)
        option = "" if seed is None else f" --hypothesis-seed={seed}"
        report.sections.append(("same examples again", f"python -m pytest{option} '{item.nodeid}'"))
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models and data."""
    return shared_dir()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cache for these tests alone: the user's is neither read nor written.

    Only the compiled kernels stay for the next session, in pytest's cache. Their names are digests of their source.
    """
    folder = tmp_path_factory.mktemp("cache")
    if (kept := getattr(request.config, "cache", None)) is not None:
        native = kept.mkdir("native")
        native.chmod(0o700)
        (folder / "native").symlink_to(native, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def short_answers() -> Iterator[None]:
    """Runs in this process answer held-out prompts with 16 tokens at most instead of 128: no test is about that."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # else no test of this session trains
            patch.setattr("lorafit.evaluate.samples.SAMPLE_TOKENS", 16)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of the smallest model on 40 rows; the files are shared and not to be changed."""
    from tests.runs import tiny_settings

    return tiny_settings(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose adapter says something else than its base; shared and not to be changed."""
    from tests.runs import run_to_export

    return run_to_export(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`lorafit` with the given words, in this process."""
    return command_line(monkeypatch, capsys)

"""Trackers get the curves through their own libraries, and none of them can stop a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorafit.errors import ConfigError
from lorafit.observe.events import Event, Heldout, Message, Saved, Step
from lorafit.observe.trackers import tracker

CONFIG = {"model": {"name": "tiny"}, "lora": {"rank": 8, "targets": ["q_proj"]}}
RUN: list[Event] = [
    Step(1, 2, 0.5, 2.5, 2e-4, 0.7, 90, 120, 4, 312.0, 0.4, 10**9),
    Message("nothing for a tracker"),
    Step(2, 2, 1.0, 2.0, 1e-4, 0.6, 90, 120, 4, 314.0, 0.4, 10**9),
    Saved(2, "checkpoints/step-000002", "last"),
    Heldout(2, 1.5, 2.5, True),
]
STEP_1 = {
    "train/loss": 2.5,
    "train/learning_rate": 2e-4,
    "train/grad_norm": 0.7,
    "train/tokens_per_second": 312.0,
}
STEP_2 = {
    "train/loss": 2.0,
    "train/learning_rate": 1e-4,
    "train/grad_norm": 0.6,
    "train/tokens_per_second": 314.0,
}
LOGGED = [(STEP_1, 1), (STEP_2, 2), ({"heldout/loss": 1.5}, 2)]


class Fake(ModuleType):
    """A tracker's library that keeps what it is called with; from the `fails_at`-th call on it raises."""

    def __init__(self, name: str, fails_at: int = 100) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, object]] = []
        self.fails_at = fails_at

    def _call(self, name: str, values: object) -> Fake:
        self.calls.append((name, values))
        if len(self.calls) >= self.fails_at:
            raise ConnectionError("the server is gone")
        return self

    def init(self, **options: object) -> Fake:
        return self._call("init", options)

    def log(self, values: object, step: int) -> None:
        self._call("log", (values, step))

    def finish(self) -> None:
        self._call("finish", None)

    def set_tracking_uri(self, uri: str) -> None:
        self._call("set_tracking_uri", uri)

    def set_experiment(self, name: str) -> None:
        self._call("set_experiment", name)

    def start_run(self, run_name: str) -> None:
        self._call("start_run", run_name)

    def log_params(self, params: object) -> None:
        self._call("log_params", params)

    def log_metrics(self, values: object, step: int) -> None:
        self._call("log_metrics", (values, step))

    def end_run(self) -> None:
        self._call("end_run", None)


def fake(name: str, monkeypatch: pytest.MonkeyPatch, fails_at: int = 100) -> Fake:
    module = Fake(name, fails_at)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def observe_run(name: str, folder: Path) -> None:
    observer = tracker(name, "run-1", folder, CONFIG)
    for event in RUN:
        observer(event)
    observer.close()
    observer.close()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # so that what is set in between is taken back
        monkeypatch.delenv(name)


def test_tensorboard_files_hold_the_curves(tmp_path: Path) -> None:
    observe_run("tensorboard", tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in STEP_1:
        curve = [(event.step, event.tensor_proto.float_val[0]) for event in read.Tensors(name)]
        assert curve == [(1, pytest.approx(STEP_1[name])), (2, pytest.approx(STEP_2[name]))]
    assert [(event.step, event.tensor_proto.float_val[0]) for event in read.Tensors("heldout/loss")] == [
        (2, 1.5)
    ]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake("wandb", monkeypatch)
    observe_run("wandb", tmp_path)
    options = {"project": "lorafit", "name": "run-1", "dir": str(tmp_path), "config": CONFIG}
    assert module.calls == [("init", options), *(("log", logged) for logged in LOGGED), ("finish", None)]


def test_wandb_keeps_the_users_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake("wandb", monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracker("wandb", "run-1", tmp_path, CONFIG)
    assert module.calls[0][1] == {"project": "mine", "name": "run-1", "dir": str(tmp_path), "config": CONFIG}


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake("trackio", monkeypatch)
    observe_run("trackio", tmp_path)
    options = {"project": "lorafit", "name": "run-1", "config": CONFIG}
    assert module.calls == [("init", options), *(("log", logged) for logged in LOGGED), ("finish", None)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake("mlflow", monkeypatch)
    observe_run("mlflow", tmp_path)
    assert module.calls == [
        ("set_tracking_uri", (tmp_path / "mlruns").as_uri()),
        ("set_experiment", "lorafit"),
        ("start_run", "run-1"),
        ("log_params", {"model.name": "tiny", "lora.rank": 8, "lora.targets": ["q_proj"]}),
        *(("log_metrics", logged) for logged in LOGGED),
        ("end_run", None),
    ]


def test_mlflow_keeps_the_users_server_and_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake("mlflow", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.invalid")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tracker("mlflow", "run-1", tmp_path, CONFIG)
    assert [name for name, _ in module.calls] == ["start_run", "log_params"]


@pytest.mark.parametrize("fails_at", [2, 3, 5])
def test_a_failing_tracker_is_left_out_with_one_warning(
    fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = fake("wandb", monkeypatch, fails_at)
    observe_run("wandb", tmp_path)
    assert len(module.calls) == fails_at
    assert [record.message for record in caplog.records] == [
        "wandb failed and gets no more values: the server is gone"
    ]


def test_a_tracker_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("wandb", monkeypatch, fails_at=1)
    with pytest.raises(ConfigError, match="`wandb` did not start: the server is gone"):
        tracker("wandb", "run-1", tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_library_names_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ConfigError) as caught:
        tracker(name, "run-1", tmp_path, CONFIG)
    assert caught.value.problems[0].hint == f"pip install 'lorafit[{name}]'"


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracker `tensorbord`") as caught:
        tracker("tensorbord", "run-1", tmp_path, CONFIG)
    assert caught.value.problems[0].hint == "did you mean `tensorboard`?"
    with pytest.raises(ConfigError) as caught:
        tracker("x", "run-1", tmp_path, CONFIG)
    assert caught.value.problems[0].hint == "one of: tensorboard, wandb, mlflow, trackio"

"""A sweep: one load of the base, no finished run twice, failures that stop nothing, a table and a picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from lorafit.cli.main import app
from lorafit.config.load import load_config
from lorafit.errors import RunError
from lorafit.model import build
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import sha256_file
from lorafit.storage.locks import lock
from lorafit.sweep import trials
from lorafit.sweep.run import TrialResult, draw_curves
from lorafit.training.run import Result, start_run

pytestmark = pytest.mark.slow

VARY = ["--vary", "lora.rank=2,4", "--vary", "train.learning_rate=0.001,0.01"]


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> list[str]:
    return [*tiny, "train.max_steps=3", "train.eval_every=1"]


Sweep = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def run(words: list[str], tmp_path: Path) -> Sweep:
    def call(*more: str, code: int = 0, resume: bool = False) -> tuple[int, list[dict[str, Any]]]:
        given = ["--resume", str(tmp_path / "s")] if resume else [*words, "--output", str(tmp_path / "s")]
        done = CliRunner().invoke(app, ["sweep", *given, "--quiet", "--json", *more])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == code, done.output
        return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()]

    return call


def test_a_grid_loads_its_base_once_and_its_runs_are_those_of_train(
    run: Sweep, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = build.load_network

    def counted(folder: Path, *rest: Any, **more: Any) -> Any:
        loads.append(folder)
        return load(folder, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(build, "load_network", counted)
        _, found = run(*VARY)
    assert len(loads) == 1
    assert [entry["state"] for entry in found] == ["finished"] * 4
    losses = [entry["heldout_loss"] for entry in found]
    assert losses == sorted(losses)
    assert found[0]["varies"]["train.learning_rate"] == "0.01"
    point = [f"{key}={value}" for key, value in found[0]["varies"].items()]
    alone = start_run(load_config(None, [*words, *point, f"run.output={tmp_path / 'alone'}"]), quiet=True)
    adapter = Path(found[0]["run"]) / "adapter" / "adapter_model.safetensors"
    assert sha256_file(adapter) == sha256_file(alone.adapter / "adapter_model.safetensors")

    def never(*_: Any, **__: Any) -> Result:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(trials, "start_run", never)
    monkeypatch.setattr(trials, "resume_run", never)
    assert run(*VARY)[1] == found == run(resume=True)[1]
    with pytest.raises(RunError, match="holds a sweep of other trials"):
        run("--vary", "lora.rank=2,8")
    root = ElementTree.parse(tmp_path / "s" / "sweep.svg").getroot()
    widths = [path.get("stroke-width") for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert (widths.count("1.5"), widths.count("3")) == (3, 1)  # the lines; the best trial's is the boldest
    assert len(ElementTree.tostring(root)) > 2000


def test_a_sweep_that_was_killed_goes_on_within_its_runs(run: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = trials.start_run, []

    def killed(config: Any, **more: Any) -> Result:
        begun.append(config.run.output)
        if len(begun) == 2:
            start(
                config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})}), **more
            )
            Path(config.run.output, "adapter", "manifest.json").unlink()  # as if before the last rename
            raise KeyboardInterrupt
        return start(config, **more)

    monkeypatch.setattr(trials, "start_run", killed)
    run("--vary", "lora.rank=2,4,8", code=130)
    _, found = run(resume=True)
    assert [entry["state"] for entry in found] == ["finished"] * 3
    assert len(begun) == 3  # the second one went on by itself


def test_a_run_that_fails_is_said_and_does_not_stop_the_others(run: Sweep, tmp_path: Path) -> None:
    _, found = run("--vary", "data.max_length=8,2048", code=2)
    assert [entry["state"] for entry in found] == ["finished", "failed"]
    assert "data.max_length" in (tmp_path / "s" / "trial-001.error.txt").read_text()


def test_what_somebody_else_works_on_is_left_to_them(run: Sweep, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with pytest.raises(RunError, match="is not empty"), lock(tmp_path / "s" / ".trial-001.lock"):
        run("--vary", "lora.rank=2,4")
    (tmp_path / "s" / ".trial-001.lock").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.sweep.run.work", lambda *_, **__: True)
        run("--vary", "lora.rank=2,4")
    with lock(tmp_path / "s" / ".trial-001.lock"):
        _, found = run(resume=True)
    assert {Path(entry["run"]).name: entry["state"] for entry in found} == {
        "trial-001": "waiting",
        "trial-002": "finished",
    }


def test_names_in_a_picture_are_text(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "a < b"
    trial = trials.Trial(
        RunDirectory(folder / "trial-001"), {"train.x": "<script>"}, load_config(None, words)
    )
    trial.run.path.mkdir(parents=True)
    losses = {1: 2.0, 2: "x", 3: 1.5}
    lines = [json.dumps({"event": "heldout", "step": step, "loss": loss}) for step, loss in losses.items()]
    trial.run.metrics_file.write_text("\n".join(lines) + "\n")
    root = ElementTree.fromstring(draw_curves(folder, [TrialResult(trial, None)]).read_text())
    assert "x=<script>" in [element.text for element in root.iter()]
    [line] = [path for path in root.iter() if path.get("stroke-width") == "3"]
    assert line.get("d") == "M333.3 0.0L1000.0 250.0"  # step 1 of 0 to 3, loss from 0
    draw_curves(folder, [])  # nothing was measured


@pytest.mark.parametrize("replaced", [False, True])
def test_a_sweep_that_is_moved_ends_and_makes_no_folder(
    run: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    begun = []

    def moved(config: Any, **more: Any) -> Result:
        begun.append(config.run.output)
        (tmp_path / "s").rename(tmp_path / "moved")
        if replaced:
            shutil.copytree(tmp_path / "moved", tmp_path / "s")
        raise RunError("the run directory was moved or replaced")

    monkeypatch.setattr(trials, "start_run", moved)
    with pytest.raises(RunError, match="the sweep directory was moved or replaced"):
        run("--vary", "lora.rank=2,4")
    assert len(begun) == 1
    assert (tmp_path / "s").exists() == replaced
    assert not list(tmp_path.glob("*/*.error.txt"))


def test_two_sweeps_that_start_in_one_folder(run: Sweep, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".staging-sweep.json").touch()  # of a start that was killed
    with (
        lock(tmp_path / "s" / "sweep.lock", "sweep"),
        pytest.raises(RunError, match="another process is writing this sweep"),
    ):
        run("--vary", "lora.rank=2,4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.sweep.run.work", lambda *_, **__: True)
        run("--vary", "lora.rank=2,4")
        with pytest.raises(RunError, match="holds a sweep of other trials"):
            run("--vary", "lora.rank=2,8")

"""Ctrl-C in each phase of a command: one line, exit code 130, no traceback, and nothing lost that was saved."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.command import TINY, Cli
from tests.tiny_models import write_model, write_rows

from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import is_orphan


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ctrl-c")
    write_model(folder / "model")
    write_rows(folder / "rows.json", 12)
    return folder


@pytest.fixture(scope="module")
def trained(material: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lorafit", *words(material, material / "trained")])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module("lorafit.cli.main").main()
        assert not ended.value.code
    return material / "trained"


def words(material: Path, output: Path, *more: str) -> list[str]:
    model, data = str(material / "model"), str(material / "rows.json")
    steps = ["train.max_steps=4", "train.eval_every=2", "train.save_every=2", "data.holdout=4"]
    return ["train", "--model", model, "--data", data, "--output", str(output), *TINY, *steps, *more]


def press(place: str, patch: pytest.MonkeyPatch, *, call: int = 1) -> None:
    """A real SIGINT arrives as the function at `place` is called for the `call`-th time."""
    module_name, _, name = place.rpartition(".")
    module = importlib.import_module(module_name)
    real, calls = getattr(module, name), 0

    def pressed(*rest: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*rest, **named)

    patch.setattr(module, name, pressed)


BEFORE = {
    "reading the config": "lorafit.config.load.config_from_args",
    "reading rows": "lorafit.data.build.encode_files",
    "loading the model": "lorafit.training.setup.build",
}
AFTER = {
    "compiling": ("lorafit.training.run.enable_compile", []),
    "plan": ("lorafit.training.run.make_plan", []),
    "export of the adapter": ("lorafit.training.finish.export_adapter", [2, 4]),
    "asking": ("lorafit.training.finish.what_was_learned", [2, 4]),
    "list of rows": ("lorafit.training.finish.page_values", [2, 4]),
    "report": ("lorafit.training.finish.write_report", [2, 4]),
}


@pytest.mark.parametrize("phase", BEFORE)
def test_before_the_run_begins_nothing_is_left(
    material: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    press(BEFORE[phase], monkeypatch)
    done = cli(*words(material, tmp_path / "run"))
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] in ("interrupted", "Ctrl-C: stopped")
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("phase", AFTER)
def test_outside_of_the_steps_the_last_line_continues_the_run_and_checkpoints_stay(
    material: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    place, saved = AFTER[phase]
    press(place, monkeypatch)
    done = cli(*words(material, output := tmp_path / "run"))
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == f"Ctrl-C: stopped; continue with: lorafit train --resume {output}"
    assert done.err.count("Ctrl-C") == 1
    assert "Traceback" not in done.err
    assert RunDirectory(output).saved_steps() == saved


@pytest.mark.parametrize(("place", "saved"), [("_gradients", 1), ("heldout_loss", 2), ("_save", 3)])
def test_between_the_first_step_and_the_last_the_step_is_saved(
    material: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, place: str, saved: int
) -> None:
    press(f"lorafit.training.loop.{place}", monkeypatch)
    done = cli(*words(material, output := tmp_path / "run"))
    assert (done.code, done.out) == (130, f"{output}\n")
    assert done.err.count("Ctrl-C") == 1
    assert f"continue with: lorafit train --resume {output}" in done.err.splitlines()
    assert "Traceback" not in done.err
    assert RunDirectory(output).newest_checkpoint() == (saved, {})


OTHERS: dict[str, tuple[str, list[str]]] = {
    "check": ("lorafit.data.build.encode_files", []),
    "generate": ("lorafit.infer.model.build_saved", ["hi"]),
    "chat": ("lorafit.infer.model.build_saved", []),
    "serve": ("lorafit.infer.multi_adapter.build_saved", []),
    "eval": ("lorafit.data.build.encode_files", []),
}


@pytest.mark.parametrize("verb", OTHERS)
def test_other_commands_end_with_one_line(
    trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    place, more = OTHERS[verb]
    press(place, monkeypatch)
    run = trained / "config.yaml" if verb == "check" else trained
    done = cli(verb, run, *more)
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


@pytest.mark.parametrize("place", ["make_reference", "card"])
def test_an_export_leaves_nothing(
    trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr("lorafit.export.parity.missing", lambda export: "not needed here")
    press(f"lorafit.export.run.{place}", monkeypatch)
    done = cli("export", trained, "merged")
    assert (done.code, done.out, done.err.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in done.err
    assert not any(is_orphan(path.name) for path in (trained / "exports").iterdir())
    assert not (trained / "exports" / "merged-f32").exists()


@pytest.mark.slow
def test_a_sweep_names_the_way_to_go_on_of_its_own(
    material: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    press("lorafit.training.finish.export_adapter", monkeypatch)
    _, *rest = words(material, tmp_path / "sweep")
    done = cli("sweep", *rest, "--vary", "lora.alpha=8,16")
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1].endswith("interrupted; the same command goes on")


def test_a_reader_of_the_output_that_has_gone_is_no_bug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*rest: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back
    monkeypatch.setattr("lorafit.cli.main.put_line", gone)
    assert cli("--version") == (141, "", "")
    sys.stdout.close()  # the empty file that main() put there

"""What happens to a run from outside: signals, short memory, damage, changed settings, a failing disk."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runs import digest, events, interrupt_after, tiny_run, without_clock
from tests.waiting import HANGS

from lorafit.errors import RunError
from lorafit.observe.units import count
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts, sha256_file
from lorafit.storage.locks import is_locked
from lorafit.training import checkpoint_writer, finish, loop, setup
from lorafit.training import run as training_run
from lorafit.training.run import resume_run, start_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "train.eval_every=3", "train.save_every=2", "train.max_steps=6", "lora.dropout=0.1"]


def warnings(path: Path) -> list[str]:
    return [event["text"] for event in events(path, "note") if event["level"] == "warning"]


class Short:
    """A machine on which a pass of more than `most` tokens does not fit, from step `first` on."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int, error: BaseException, first: int = 1) -> None:
        self.passes: list[int] = []
        real, step = loop.pack_losses, loop._gradients
        at = [0]

        def count(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
            at[0] = state.step + 1
            return step(job, state, *rest)

        def pack_losses(network: Any, pack: Any) -> Any:
            if at[0] >= first and len(pack.ids) > most:
                raise error
            self.passes.append(len(pack.ids))
            return real(network, pack)

        patch.setattr(loop, "_gradients", count)
        patch.setattr(loop, "pack_losses", pack_losses)


CUDA = torch.OutOfMemoryError("CUDA out of memory")
HOST = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


@pytest.mark.parametrize("error", [CUDA, HOST, MemoryError()], ids=["cuda", "host", "python"])
def test_out_of_memory_saves_the_step_before_and_says_what_to_change(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    with monkeypatch.context() as patch:
        Short(patch, 200, error, first=4)
        with pytest.raises(RunError, match="out of memory in step 4; step 3 is saved and verified") as caught:
            tiny_run(material, tmp_path / "run")
    assert "train.micro_batch_tokens=" in caught.value.problems[0].hint
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.newest_checkpoint() == (3, {})
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)


def test_out_of_memory_in_the_first_step_saves_nothing(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Short(monkeypatch, 0, CUDA)
    with pytest.raises(RunError, match=r"out of memory in step 1\n"):
        tiny_run(material, tmp_path / "run")


def test_out_of_memory_while_measuring_saves_the_step_and_the_measurement_is_made_up(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")

    def short(*_: Any) -> float:
        raise CUDA

    with monkeypatch.context() as patch:
        patch.setattr(loop, "heldout_loss", short)
        with pytest.raises(RunError, match="out of memory measuring held-out rows; step 3 is saved"):
            tiny_run(material, tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run").newest_checkpoint() == (3, {})
    resumed = resume_run(tmp_path / "run", quiet=True)
    assert digest(resumed) == digest(whole)
    measured = [[event["loss"] for event in events(r, "heldout")] for r in (whole, resumed)]
    assert measured[0] == measured[1]


def test_where_asked_for_memory_that_ran_out_halves_the_passes_and_the_run_goes_on(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [*material, "lora.dropout=0", "run.too_large=auto"]
    whole = tiny_run(plain, tmp_path / "whole")
    with monkeypatch.context() as patch:
        short = Short(patch, 200, CUDA, first=3)
        interrupt_after(4, patch)
        halved = tiny_run(plain, tmp_path / "run")
    assert (halved.finished, halved.step) == (False, 4)
    assert max(short.passes[-3:]) <= 200
    assert any("out of memory in step 3" in text for text in warnings(tmp_path / "run"))
    with monkeypatch.context() as patch:
        Short(patch, 200, RuntimeError("the resumed run took passes that had not fitted"))
        resumed = resume_run(tmp_path / "run", quiet=True)
    for one, two in zip(events(whole, "step"), events(resumed, "step"), strict=True):
        assert one["rows"] == two["rows"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_one_row_that_does_not_fit_is_not_halved_forever(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Short(monkeypatch, 0, CUDA)
    with pytest.raises(RunError, match="out of memory in step 1") as caught:
        tiny_run(material, tmp_path / "run", "run.too_large=auto")
    assert "train.recompute=layers" in caught.value.problems[0].hint


def test_another_error_is_not_taken_for_short_memory(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Short(monkeypatch, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        tiny_run(material, tmp_path / "run", "run.too_large=auto")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs POSIX signals")
def test_usr1_saves_at_once_and_changes_nothing_else(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = [*material, "train.save_every=100", "train.eval_every=100", "train.keep=9"]
    whole = tiny_run(quiet, tmp_path / "whole")
    gradients = loop._gradients

    def asked(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        if state.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return gradients(job, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_gradients", asked)
        result = tiny_run(quiet, tmp_path / "run")
    assert RunDirectory.open(result.path).saved_steps() == [3, 6]
    assert next(event["reason"] for event in events(result, "saved")) == "asked for"
    assert digest(result) == digest(whole)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_second_signal_stops_at_once_and_loses_nothing_saved(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    gradients = loop._gradients

    def twice(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        if state.step + 1 == 4:
            os.kill(os.getpid(), getattr(signal, name))
            os.kill(os.getpid(), getattr(signal, name))
        return gradients(job, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_gradients", twice)
        tiny_run(material, tmp_path / "run")
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)


def test_a_stop_while_measuring_ends_before_the_next_step(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    measure = loop.heldout_loss

    def signalled(*rest: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(loop, "heldout_loss", measure)
        return measure(*rest)

    monkeypatch.setattr(loop, "heldout_loss", signalled)
    result = tiny_run(material, tmp_path / "run")
    assert (result.finished, result.step) == (False, 3)
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)


@pytest.mark.parametrize("when", ["loading", "after the last step"])
def test_signals_outside_of_steps_are_answered_and_none_kills_without_a_word(
    material: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    from lorafit.config.load import load_config

    module, place = (setup, "build") if when == "loading" else (finish, "export_adapter")
    real = getattr(module, place)

    def signalled(*rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*rest)

    config = load_config(None, [*material, "train.max_steps=2", f"run.output={tmp_path / 'run'}"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="SIGTERM: stopped"):
        patch.setattr(module, place, signalled)
        start_run(config)
    said = capsys.readouterr().err
    assert "SIGUSR1: no step is under way" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    saved = RunDirectory(tmp_path / "run").saved_steps()
    assert saved == ([] if when == "loading" else [2])


def test_a_save_that_outlives_its_run_keeps_the_lock_and_a_resume_waits_for_it(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook: Ctrl-C twice, and the cell is run again while the thread still writes."""
    whole = tiny_run(material, tmp_path / "whole")
    go, held, real = threading.Event(), [], checkpoint_writer.commit_files

    def slow(folder: Path, *rest: Any) -> None:
        if folder.name == "step-000004":
            assert go.wait(HANGS)
            held.append(is_locked(tmp_path / "run" / "run.lock"))
        real(folder, *rest)

    gradients = loop._gradients

    def twice(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        if state.step + 1 == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(job, state, *rest)

    monkeypatch.setattr(checkpoint_writer, "commit_files", slow)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_gradients", twice)
        tiny_run(material, tmp_path / "run")
    wait = training_run.wait_for_left
    monkeypatch.setattr(training_run, "wait_for_left", lambda: (go.set(), wait()))  # it is here that it waits
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)
    assert held == [True]


def test_a_step_does_not_wait_for_the_disk(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hangs from the first save on; training goes on until the next one is due."""
    reached, real = threading.Event(), checkpoint_writer.commit_files

    def hang(folder: Path, *rest: Any) -> None:
        if folder.name == "step-000002":
            assert reached.wait(HANGS), "training waited for the disk"
        real(folder, *rest)

    gradients = loop._gradients

    def spy(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        if state.step + 1 == 4:
            reached.set()
        return gradients(job, state, *rest)

    monkeypatch.setattr(checkpoint_writer, "commit_files", hang)
    monkeypatch.setattr(loop, "_gradients", spy)
    result = tiny_run(material, tmp_path / "run", "train.eval_every=100")
    saved = [(event["step"]) for event in events(result, "saved")]
    assert saved == [2, 4, 6]


def test_what_is_saved_is_the_state_of_its_step_though_training_went_on(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole", "train.keep=9")
    passed, real = threading.Event(), checkpoint_writer.commit_files

    def late(folder: Path, *rest: Any) -> None:
        if folder.name == "step-000004":
            assert passed.wait(HANGS)
        real(folder, *rest)

    gradients = loop._gradients

    def spy(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        found = gradients(job, state, *rest)
        if state.step + 1 == 6:
            passed.set()
        return found

    monkeypatch.setattr(checkpoint_writer, "commit_files", late)
    monkeypatch.setattr(loop, "_gradients", spy)
    result = tiny_run(material, tmp_path / "run", "train.keep=9")
    for name in ("adapter_model.safetensors", "state.safetensors", "state.json"):
        one, two = (r.path / "checkpoints" / "step-000004" / name for r in (whole, result))
        assert sha256_file(one) == sha256_file(two), name


def test_a_full_disk_stops_the_run_with_cause_and_size_and_the_last_checkpoint_resumes(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "000004" in path.parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            RunError, match=r"step-000004`: No space left on device \([\d,]+ bytes are needed\)"
        ):
            tiny_run(material, tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run").newest_checkpoint() == (3, {})
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)


def test_a_failing_sync_of_the_metrics_stops_the_run_with_its_cause(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_writer, "sync", failing)
    with pytest.raises(
        RunError, match=r"cannot save: Input/output error \([\d,]+ bytes.*\n   at: .*metrics\.jsonl"
    ):
        tiny_run(material, tmp_path / "run")


def test_two_runs_of_one_seed_hold_the_same_state_and_not_only_the_same_adapter(
    material: list[str], tmp_path: Path
) -> None:
    folders = []
    for name in ("one", "two"):
        random.random(), np.random.random()  # what a process had drawn before
        tiny_run(material, tmp_path / name, "train.max_steps=2")
        folders.append(tmp_path / name / "checkpoints" / "step-000002")
    for file in ("state.json", "state.safetensors", "adapter_model.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_a_run_that_is_stopped_after_its_adapter_was_written_still_gets_its_report(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lorafit.training.finish.write_report", stop)
        tiny_run(material, tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.has_adapter()
    assert not directory.report_file.exists()
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)
    assert directory.report_file.exists()


def stopped(material: list[str], path: Path, patch: pytest.MonkeyPatch) -> Path:
    with patch.context() as context:
        interrupt_after(4, context)
        assert not tiny_run(material, path).finished
    return path


def test_resume_refuses_another_mathematics_names_the_key_and_goes_on_knowingly(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(material, tmp_path / "run", monkeypatch)
    before = (path / "config.yaml").read_bytes()
    with pytest.raises(RunError, match=r"train\.learning_rate changed: was 0\.01, is 0\.02") as caught:
        resume_run(path, ["train.learning_rate=0.02", "train.max_grad_norm=3"], quiet=True)
    assert "train.max_grad_norm changed: was 1.0, is 3.0" in str(caught.value)
    assert "--accept-changes" in str(caught.value)
    assert (path / "config.yaml").read_bytes() == before
    resumed = resume_run(path, ["train.learning_rate=0.02"], accept_changes=True, quiet=True)
    assert resumed.finished
    assert any("train.learning_rate changed" in text for text in warnings(path))
    assert RunDirectory.open(path).config().train.learning_rate == 0.02


def test_another_prompt_is_named_key_by_key_and_where_accepted_it_is_the_one_that_is_used(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(material, tmp_path / "run", monkeypatch)
    frozen = (path / "prompt.json").read_bytes()
    with pytest.raises(RunError, match=r"prompt\.system changed: was , is Be brief\."):
        resume_run(path, ["data.system=Be brief."], quiet=True)
    assert (path / "prompt.json").read_bytes() == frozen
    resume_run(path, ["data.system=Be brief."], accept_changes=True, quiet=True)
    assert json.loads((path / "prompt.json").read_text())["system"] == "Be brief."


def test_two_that_start_in_one_folder_do_not_overwrite_each_other(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first is not there yet, and is ready when the first is done."""
    create, finished = RunDirectory.create, []

    def late(directory: RunDirectory, *rest: Any, **more: Any) -> None:
        if not finished:
            finished.append(None)
            finished[0] = digest(tiny_run(material, tmp_path / "run"))
        create(directory, *rest, **more)

    monkeypatch.setattr(RunDirectory, "create", late)
    monkeypatch.setattr(training_run, "_only_run", nullcontext)  # as in two processes
    with pytest.raises(RunError, match="already holds a run"):
        tiny_run(material, tmp_path / "run", "train.seed=1")
    assert sha256_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors") == finished[0]


def test_a_config_edited_by_hand_is_another_mathematics_too(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(material, tmp_path / "run", monkeypatch)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(RunError, match=r"train\.seed changed: was 42, is 43"):
        resume_run(path, quiet=True)


def test_a_config_edited_after_the_run_had_ended_is_named(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished_run, path)
    config = path / "config.yaml"
    text = config.read_text()
    assert resume_run(path).finished
    assert "changed" not in capsys.readouterr().err.replace("nothing was changed", "")
    config.write_text(text.replace("seed: 42", "seed: 43").replace("rank: 4", "rank: 8"))
    with pytest.raises(RunError) as caught:
        resume_run(path)
    assert [problem.message for problem in caught.value.problems] == [
        "lora.rank changed: was 4, is 8",
        "train.seed changed: was 42, is 43",
    ]
    assert caught.value.exit_code == 2
    assert resume_run(path, accept_changes=True).finished
    assert "train.seed changed: was 42, is 43" in capsys.readouterr().err
    config.write_text(
        text.replace("train_on: response", "train_on: all")
    )  # no result of this model depends on it
    assert resume_run(path).finished
    assert "config.yaml was changed after the run had ended" in capsys.readouterr().err


def test_ranks_whose_agent_has_ended_save_and_end(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    gradients = loop._gradients
    with monkeypatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
            patch.setenv(name, value)

        def killed(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
            if state.step + 1 == 4:
                patch.setattr(os, "getppid", lambda: 1)
            return gradients(job, state, *rest)

        patch.setattr(loop, "_gradients", killed)
        result = tiny_run(material, tmp_path / "run")
    assert (result.finished, result.step) == (False, 4)
    assert RunDirectory.open(result.path).newest_checkpoint() == (4, {})
    said = [event["text"] for event in events(result, "note")]
    assert "the agent of this process has ended: saving after this step" in said
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)


def test_what_is_no_mathematics_may_change(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [*material, "lora.dropout=0"]
    whole = tiny_run(plain, tmp_path / "whole")
    path = stopped(plain, tmp_path / "run", monkeypatch)
    resumed = resume_run(path, ["train.micro_batch_tokens=100", "train.recompute=layers"], quiet=True)
    for one, two in zip(events(whole, "step"), events(resumed, "step"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert RunDirectory.open(path).config().train.micro_batch_tokens == 100


def test_another_machine_is_said(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(material, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(
        "lorafit.training.run.machine_facts", lambda device: {"device": "abacus", "torch": "1"}
    )
    resume_run(path, quiet=True)
    assert any("device was cpu and is abacus" in text for text in warnings(path))


def test_another_number_of_threads_is_said(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's float32 products split their sums by threads: seen on a processor of AMD."""
    path = stopped(material, tmp_path / "run", monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        resume_run(path, quiet=True)
    finally:
        torch.set_num_threads(threads)
    was, now = (f"CPU, {count(number, 'thread')}" for number in (threads, threads + 1))
    assert any(f"machine was {was}" in text and f"is {now}" in text for text in warnings(path))


def test_damaged_checkpoints_are_set_aside(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    path = stopped(material, tmp_path / "run", monkeypatch)
    newest = path / "checkpoints" / "step-000004"
    (newest / "state.json").write_text("{}")
    resumed = resume_run(path, quiet=True)
    assert digest(resumed) == digest(whole)
    assert (path / "checkpoints" / "damaged-step-000004" / "state.json").read_text() == "{}"


def test_a_lost_best_step_is_said_and_later_ones_count(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(material, tmp_path / "run", monkeypatch)
    best = read_facts(path / "checkpoints" / "step-000004")["best_step"]
    assert best == 3
    (path / "checkpoints" / "step-000003" / "state.json").write_text("{}")
    resumed = resume_run(path, quiet=True)
    assert resumed.finished
    assert any("the best step so far, 3, is lost" in text for text in warnings(path))


def test_a_best_step_that_was_damaged_is_not_exported(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits rot while later steps are trained."""
    rising = iter([4.0, 1.0, 3.0])
    monkeypatch.setattr(loop, "heldout_loss", lambda *_: next(rising))
    gradients = loop._gradients

    def rot(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        if state.step == 5:
            weights = job.run.checkpoint(3) / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        return gradients(job, state, *rest)

    monkeypatch.setattr(loop, "_gradients", rot)
    result = tiny_run(material, tmp_path / "run")
    assert result.finished
    assert any("the best step, 3, is lost" in text for text in warnings(result.path))
    assert read_facts(result.adapter)["step"] == 6


def test_metrics_that_a_power_cut_damaged_do_not_stop_a_resume(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole")
    path = stopped(material, tmp_path / "run", monkeypatch)
    metrics = path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if b'"event": "step"' in line)
    lines[at] = b"\0" * 40 + b"\n"
    metrics.write_bytes(b"".join(lines))
    resumed = resume_run(path, quiet=True)
    assert digest(resumed) == digest(whole)
    assert any("1 damaged lines were dropped from metrics.jsonl" in text for text in warnings(path))
    kept = [without_clock(event) for event in events(resumed, "step")]
    assert kept == [without_clock(event) for event in events(whole, "step")][1:]


def test_a_start_that_was_killed_before_it_began_leaves_room_for_another(
    material: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.lock", "prompt.json", ".staging-config.yaml"):
        (folder / name).write_text("")
    assert tiny_run(material, folder, "train.max_steps=1").finished


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_base_resumes_to_the_same_bytes(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    words = [*material, "model.dtype=bfloat16", f"model.quantize={quantize}"]
    whole = tiny_run(words, tmp_path / "whole")
    path = stopped(words, tmp_path / "run", monkeypatch)
    assert digest(resume_run(path, quiet=True)) == digest(whole)
    assert whole.loss is not None
    assert whole.loss < events(whole, "step")[0]["loss"]


def test_recompute_gives_the_same_bytes_and_keeps_less(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def measured(network: Any, pack: Any, real: Callable[..., Any] = loop.pack_losses) -> Any:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = real(network, pack)
        kept.append(sum(sizes))
        return found

    monkeypatch.setattr(loop, "pack_losses", measured)
    plain = tiny_run(material, tmp_path / "plain", "train.max_steps=2")
    least, kept[:] = min(kept), []
    again = tiny_run(material, tmp_path / "again", "train.max_steps=2", "train.recompute=layers")
    assert max(kept) < least / 2
    assert digest(again) == digest(plain)


def test_missing_kernels_are_said_once(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.training.run.missing", lambda: "no C++ compiler was found")
    result = tiny_run(material, tmp_path / "run", "train.max_steps=1")
    assert [text for text in warnings(result.path) if "no compiled kernels" in text and "compiler" in text]

"""Whole runs on a tiny model: same bytes for one seed, exact resume, and nothing changes when a step is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.runs import digest, events, interrupt_after, tiny_run, without_clock
from tests.tiny_models import write_rows

from lorafit.data.batch import RankShare
from lorafit.errors import LorafitError, RunError, TrainingError
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts, sha256_file, verify_folder
from lorafit.training import loop
from lorafit.training import run as training_run
from lorafit.training.run import resume_run


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "train.eval_every=3", "train.save_every=2", "run.samples=1"]


def test_a_run_learns_and_leaves_everything_that_the_contract_names(
    material: list[str], tmp_path: Path
) -> None:
    result = tiny_run(material, tmp_path / "run", "train.epochs=4")
    assert result.finished
    assert result.heldout_loss is not None
    assert result.base_loss is not None
    assert result.heldout_loss < 0.8 * result.base_loss
    names = {path.name for path in result.path.iterdir()}
    expected = {"config.yaml", "env.json", "prompt.json", "ledger.json", "metrics.jsonl", "samples.json"}
    assert expected | {"checkpoints", "adapter"} <= names
    assert verify_folder(result.adapter) == []
    step = events(result, "step")[0]
    keys = [
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "supervised_tokens",
        "tokens",
        "tokens_per_second",
        "seconds",
    ]
    assert set(keys) <= step.keys()
    assert [event["step"] for event in events(result, "step")] == list(range(1, 25))
    sample = json.loads((result.path / "samples.json").read_text())[0]
    assert sample["prompt"].startswith("Say the number")
    assert sample["base"]["text"] != sample["tuned"]["text"]


def test_after_one_step_every_adapter_matrix_has_moved(material: list[str], tmp_path: Path) -> None:
    result = tiny_run(material, tmp_path / "run", "train.max_steps=1", "train.warmup=0")
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    b_matrices = [tensor for name, tensor in tensors.items() if ".lora_B." in name]
    assert len(b_matrices) == 14
    assert all(bool(tensor.abs().max() > 0) for tensor in b_matrices)


def test_one_seed_gives_the_same_bytes_and_another_does_not(material: list[str], tmp_path: Path) -> None:
    dropout = "lora.dropout=0.1"
    first = tiny_run(material, tmp_path / "a", "train.max_steps=8", dropout)
    second = tiny_run(material, tmp_path / "b", "train.max_steps=8", dropout)
    third = tiny_run(material, tmp_path / "c", "train.max_steps=8", dropout, "train.seed=7")
    assert digest(first) == digest(second) != digest(third)
    for one, two in zip(events(first, "step"), events(second, "step"), strict=True):
        assert without_clock(one) == without_clock(two)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("micro", [2048, 120], ids=["one-pass", "accumulation"])
def test_interrupted_and_resumed_equals_uninterrupted(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, micro: int
) -> None:
    overrides = [
        f"model.dtype={dtype}",
        f"train.micro_batch_tokens={micro}",
        "lora.dropout=0.1",
        "train.max_steps=9",  # an epoch is six steps: the cut falls into the second
    ]
    whole = tiny_run(material, tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        cut = tiny_run(material, tmp_path / "cut", *overrides)
    assert not cut.finished
    assert cut.step == 7
    resumed = resume_run(cut.path, quiet=True)
    assert resumed.finished
    assert digest(resumed) == digest(whole)
    for one, two in zip(events(whole, "step"), events(resumed, "step"), strict=True):
        assert without_clock(one) == without_clock(two)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6, 9])  # where a measurement is due; 9 is the last step
def test_interrupted_where_a_measurement_is_due_still_equals_uninterrupted(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = tiny_run(material, tmp_path / "whole", "train.max_steps=9")
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        cut = tiny_run(material, tmp_path / "cut", "train.max_steps=9")
    assert (cut.finished, cut.step) == (False, step)
    resumed = resume_run(cut.path, quiet=True)
    assert digest(resumed) == digest(whole)
    assert resumed.heldout_loss == whole.heldout_loss
    assert events(resumed, "heldout") == events(whole, "heldout")


def test_resume_without_a_word_at_the_end_equals_uninterrupted(material: list[str], tmp_path: Path) -> None:
    """A killed run: the newest checkpoint is taken, and metrics after it are made again."""
    whole = tiny_run(material, tmp_path / "whole", "train.max_steps=6", "train.keep=5")
    directory = RunDirectory.open(whole.path)
    before = [without_clock(event) for event in events(whole, "step")]
    final = digest(whole)
    for step in directory.saved_steps():
        if step > 2:
            shutil.rmtree(directory.checkpoint(step))
    resumed = resume_run(whole.path, quiet=True)
    assert digest(resumed) == final
    assert [without_clock(event) for event in events(resumed, "step")] == before


def test_a_damaged_checkpoint_is_skipped_with_a_word(material: list[str], tmp_path: Path) -> None:
    whole = tiny_run(material, tmp_path / "run", "train.max_steps=6", "train.keep=3", "data.holdout=0")
    final = digest(whole)
    newest = whole.path / "checkpoints" / "step-000006" / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content))
    resumed = resume_run(whole.path, quiet=True)
    assert digest(resumed) == final
    notes = [event["text"] for event in events(resumed, "note") if event["level"] == "warning"]
    assert any("step-000006 is damaged" in note and "SHA-256" in note for note in notes)


@pytest.mark.slow
def test_gradients_do_not_depend_on_how_the_step_is_cut(material: list[str], tmp_path: Path) -> None:
    cuts = [
        ["train.micro_batch_tokens=2048"],
        ["train.micro_batch_tokens=150"],
        ["train.micro_batch_tokens=8"],
        ["data.packing=false"],
    ]
    adapters = []
    for index, cut in enumerate(cuts):
        result = tiny_run(material, tmp_path / str(index), "train.max_steps=3", "data.holdout=0", *cut)
        adapters.append(load_file(result.adapter / "adapter_model.safetensors"))
    for other in adapters[1:]:
        for name, tensor in adapters[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_raw_gradients_of_every_cut_agree_to_1e_6(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads: list[dict[str, torch.Tensor]] = []
    original = loop._gradients

    def spy(job: loop.TrainContext, *rest: Any) -> tuple[float, float]:
        out = original(job, *rest)
        named = job.network.named_parameters()
        grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return out

    monkeypatch.setattr(loop, "_gradients", spy)
    for index, cut in enumerate(
        ["micro_batch_tokens=2048", "micro_batch_tokens=150", "micro_batch_tokens=8"]
    ):
        tiny_run(
            material, tmp_path / str(index), "train.max_steps=1", "train.max_grad_norm=0", f"train.{cut}"
        )
    assert len(grads[0]) == 28
    for other in grads[1:]:
        for name, gradient in grads[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def stop_with(
    material: list[str], output: Path, monkeypatch: pytest.MonkeyPatch, loss: Callable[..., Any]
) -> str:
    pack_losses, calls = loop.pack_losses, []

    def sabotaged(network: Any, pack: Any) -> Any:
        calls.append(pack)
        total, each = pack_losses(network, pack)
        return (loss(total) if len(calls) == 4 else total), each

    with monkeypatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(loop, "pack_losses", sabotaged)
        tiny_run(material, output, "train.save_every=1", "data.holdout=0", "train.max_steps=5")
    return str(caught.value)


@pytest.mark.slow
def test_a_non_finite_loss_stops_before_weights_change_and_names_step_and_rows(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = stop_with(material, tmp_path / "run", monkeypatch, lambda loss: loss * float("nan"))
    assert "step 4: the loss is not finite" in text
    assert "rows.json row" in text
    assert RunDirectory.open(tmp_path / "run").saved_steps()[-1] == 3
    healthy = tiny_run(
        material, tmp_path / "healthy", "train.save_every=1", "data.holdout=0", "train.max_steps=5"
    )
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(healthy)


def test_a_non_finite_gradient_stops_too(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(loss: torch.Tensor) -> torch.Tensor:
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    text = stop_with(material, tmp_path / "run", monkeypatch, explode)
    assert "step 4: the gradient is not finite" in text


def test_a_step_without_supervised_tokens_stops(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_step = RankShare.of

    def masked(share: RankShare, rows: Any, *rest: Any) -> Any:
        untrained = SimpleNamespace(row=lambda index: (rows.row(index)[0], rows.row(index)[1] & False))
        return of_step(share, untrained, *rest)

    monkeypatch.setattr(RankShare, "of", masked)
    with pytest.raises(TrainingError, match="step 1 has no supervised tokens"):
        tiny_run(material, tmp_path / "run", "train.max_steps=2")


@pytest.mark.slow
def test_float16_overflow_repeats_the_step_with_the_same_rows(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = loop.clip_grad_norm_

    def counted(output: str, overflow_at: int) -> tuple[int, list[float]]:
        calls = []

        def clip_or_overflow(*arguments: Any) -> torch.Tensor:
            calls.append(1)
            return torch.tensor(float("inf")) if len(calls) == overflow_at else clip(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "clip_grad_norm_", clip_or_overflow)
            overrides = ["model.dtype=float16", "train.max_steps=4", "lora.dropout=0.1"]
            result = tiny_run(material, tmp_path / output, *overrides)
        return len(calls), [event["loss"] for event in events(result, "step")]

    attempts, losses = counted("smooth", overflow_at=0)
    jolted_attempts, jolted_losses = counted("jolted", overflow_at=attempts)
    assert jolted_attempts == attempts + 1  # one more attempt, not one step less
    assert jolted_losses == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
def test_rotation_keeps_the_newest_and_the_best(material: list[str], tmp_path: Path) -> None:
    result = tiny_run(material, tmp_path / "run", "train.max_steps=9", "train.save_every=1", "train.keep=2")
    directory = RunDirectory.open(result.path)
    best = min(events(result, "heldout"), key=lambda event: event["loss"])["step"]
    named = {read_facts(directory.checkpoint(step))["best_step"] for step in (8, 9)}
    assert best in named
    assert set(directory.saved_steps()) == {8, 9} | named


@pytest.mark.slow
def test_the_final_adapter_is_the_best_one(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [9.0, 3.0, 1.0, 2.0, 2.5]  # the base, then after each step
    overrides = ["train.max_steps=4", "train.eval_every=1"]
    for output, best, keep_best in (("best", 2, "true"), ("last", 4, "false")):
        remaining = iter(scores)
        monkeypatch.setattr(loop, "heldout_loss", lambda *_, left=remaining: next(left))
        result = tiny_run(material, tmp_path / output, *overrides, f"train.keep_best={keep_best}")
        checkpoint = result.path / "checkpoints" / f"step-{best:06d}"
        assert digest(result) == sha256_file(checkpoint / "adapter_model.safetensors")
        assert (result.base_loss, result.heldout_loss) == (9.0, 1.0)


@pytest.mark.slow
def test_continuing_an_adapter_starts_where_it_ended(material: list[str], tmp_path: Path) -> None:
    first = tiny_run(material, tmp_path / "a", "train.epochs=3")
    second = tiny_run(
        material, tmp_path / "b", "train.max_steps=1", f"lora.init_from={first.adapter}", "train.warmup=0"
    )
    assert events(second, "step")[0]["loss"] < 0.8 * events(first, "step")[0]["loss"]
    assert second.base_loss == pytest.approx(first.base_loss)
    with pytest.raises(LorafitError, match="`lora.alpha` is 3.0, but the adapter to continue has 32"):
        tiny_run(material, tmp_path / "c", f"lora.init_from={first.adapter}", "lora.alpha=3")


def test_resume_refuses_other_rows_and_says_what_changed(material: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    result = tiny_run(material, tmp_path / "run", "train.max_steps=4", f"data.path={rows}")
    shutil.rmtree(RunDirectory.open(result.path).checkpoint(4))
    write_rows(rows, count=41)
    with pytest.raises(RunError, match="the data changed"):
        resume_run(result.path, quiet=True)


def test_two_processes_cannot_write_one_run(material: list[str], tmp_path: Path) -> None:
    from lorafit.storage.locks import lock

    result = tiny_run(material, tmp_path / "run", "train.max_steps=1")
    with lock(result.path / "run.lock"), pytest.raises(RunError, match="another process is writing this run"):
        resume_run(result.path, quiet=True)


def test_an_output_that_holds_something_is_not_touched(material: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty"):
        tiny_run(material, tmp_path / "run", "train.max_steps=1")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_weighted_sources_are_seen_as_often_as_asked(material: list[str], tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.json", 10), write_rows(tmp_path / "b.json", 20)
    result = tiny_run(
        material,
        tmp_path / "run",
        f"data.path=['{first}', '{second}']",
        "data.weights=[2, 0.5]",
        "data.holdout=0",
        "train.batch_size=1",
    )
    assert result.step == 2 * 10 + 10


def test_rows_longer_than_the_model_reads_are_refused(material: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "long.json"
    rows.write_text(json.dumps([{"instruction": "Count.", "output": "one " * 100}] * 20))
    with pytest.raises(LorafitError, match="the model reads at most 256") as caught:
        tiny_run(material, tmp_path / "run", f"data.path={rows}")
    assert "data.max_length=256" in caught.value.problems[0].hint
    assert not (tmp_path / "run").exists()


def test_trackers_receive_the_run(material: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    result = tiny_run(material, tmp_path / "run", "train.max_steps=2", "run.trackers=[tensorboard]")
    assert list(result.path.rglob("events.out.tfevents.*"))


def test_a_failed_start_leaves_nothing_behind(material: list[str], tmp_path: Path) -> None:
    with pytest.raises(LorafitError, match="matches no linear"):
        tiny_run(material, tmp_path / "run", "lora.targets=q_prj")
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_changes_nothing(material: list[str], tmp_path: Path) -> None:
    first = tiny_run(material, tmp_path / "run", "train.max_steps=2")
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    again = resume_run(first.path, quiet=True)
    assert again == first
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == before


def test_a_second_run_in_one_process_is_refused_and_the_first_keeps_its_bytes(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*material, "train.max_steps=2", "lora.dropout=0.1"]
    alone = tiny_run(words, tmp_path / "alone")
    gradients, refused = loop._gradients, []

    def second(*rest: Any) -> Any:
        for begin in (lambda: tiny_run(words, tmp_path / "b"), lambda: resume_run(alone.path, quiet=True)):
            with pytest.raises(RunError, match="this process is training another run") as caught:
                begin()
            refused.append(caught.value)
        return gradients(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_gradients", second)
        assert digest(tiny_run(words, tmp_path / "a")) == digest(alone)
    assert len(refused) == 4
    assert not (tmp_path / "b").exists()
    tiny_run(words, tmp_path / "b")  # the refused one left nothing behind


def test_deterministic_kernels_are_used_by_a_run_and_its_resume(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[bool] = []

    @contextmanager
    def noted(value: bool) -> Iterator[None]:
        wanted.append(value)
        yield

    monkeypatch.setattr(training_run, "deterministic_kernels", noted)
    interrupt_after(2, monkeypatch)
    result = tiny_run(material, tmp_path / "run", "train.max_steps=3", "train.deterministic=true")
    assert not result.finished
    assert wanted == [True]
    resume_run(result.path, quiet=True)
    assert wanted[1:] == [True]

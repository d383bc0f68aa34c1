"""`lorafit plan` and the head of a run: exact counts, refusals, what --auto picks, and no trace in the results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from tests.runs import events, tiny_settings
from tests.tiny_models import random_network

from lorafit.config.load import config_from_args, flag_overrides, load_config
from lorafit.config.schema import Config
from lorafit.data.packing import Packer, TokenRow
from lorafit.data.row_order import RowOrder
from lorafit.data.token_dataset import TokenDataset
from lorafit.distributed.env import ProcessEnv
from lorafit.errors import RunError
from lorafit.model import memory
from lorafit.model.memory import available_bytes, resident_bytes
from lorafit.plan import calibrate as calibration
from lorafit.plan import planner
from lorafit.plan.cadence import Cadence
from lorafit.plan.cost_model import PassCost
from lorafit.plan.machine import Machine, watch_peak
from lorafit.plan.planner import Fit, RunInputs, fit, make_plan, plan_run, settings_of
from lorafit.plan.predict import predict_memory
from lorafit.plan.table import short_lines, table_rows
from lorafit.plan.workload import Workload, estimate_workload
from lorafit.storage.atomic import sha256_file
from lorafit.training.run import resume_run, start_run


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    batches = ("train.batch_size=7", "train.micro_batch_tokens=256")
    return tiny_settings(tmp_path_factory.mktemp("plan"), *batches, num_rows=60)


def config_of(material: list[str], *overrides: str) -> Config:
    return load_config(None, [*material, *overrides])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.epochs=2"],
        ["train.max_steps=11", "data.packing=false"],
        ["train.epochs=0.5", "data.weights=[1.5]", "train.micro_batch_tokens=100"],
        ["train.epochs=1.3", "data.train_on=all", "data.shuffle=false", "data.holdout=0"],
    ],
    ids=str,
)
def test_counts_are_exactly_those_of_the_run(
    material: list[str], overrides: list[str], tmp_path: Path
) -> None:
    config = config_of(material, f"run.output={tmp_path / 'run'}", *overrides)
    plan = plan_run(config, quiet=True)
    assert not (tmp_path / "run").exists()
    result = start_run(config, quiet=True)
    steps = events(result.path, "step")
    (started,) = events(result.path, "run_started")
    assert plan.steps == len(steps) == result.step
    assert plan.supervised_tokens == sum(step["supervised_tokens"] for step in steps)
    assert plan.tokens == sum(step["tokens"] for step in steps)
    assert (plan.parameters, plan.trainable) == (started["num_parameters"], started["num_trainable"])
    assert plan.rows == started["num_rows"]
    if "train.epochs=2" in overrides:
        ledger = json.loads((result.path / "ledger.json").read_text())
        assert plan.supervised_tokens_per_epoch == ledger["trained"]["trained"]
        assert plan.tokens_per_epoch == ledger["trained"]["total"]
    assert plan.rates is not None
    assert plan.rates.measured
    assert plan.rates.peak_bytes is not None
    assert plan.times is not None
    assert plan.times.total > plan.times.steps > 0
    assert plan.fits
    assert json.loads(json.dumps(plan.as_dict()))["fits"] is True


@pytest.mark.slow
def test_a_run_begins_with_its_plan_and_a_calibration_leaves_no_trace(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.epochs=3", "lora.dropout=0.1", "data.holdout=5", "train.eval_every=5"]
    spent = []
    calibrate = planner.calibrate

    def counted(*arguments: Any) -> Any:
        spent.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(planner, "calibrate", counted)
    plain = start_run(config_of(material, f"run.output={tmp_path / 'plain'}", *settings), quiet=True)
    assert not spent  # a short run starts at once
    monkeypatch.setattr(planner, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(planner, "MOST_SHARE", 1.0)
    measured = start_run(config_of(material, f"run.output={tmp_path / 'measured'}", *settings), quiet=True)
    assert len(spent) == 1
    weights = "adapter_model.safetensors"
    assert sha256_file(plain.adapter / weights) == sha256_file(measured.adapter / weights)
    losses = [[step["loss"] for step in events(run.path, "step")] for run in (plain, measured)]
    assert losses[0] == losses[1]
    for run, says_about in ((plain, True), (measured, False)):
        (line,) = [note["text"] for note in events(run.path, "note") if note["text"].startswith("plan: ")]
        assert (", about " in line) == says_about
        assert "supervised of" in line
    monkeypatch.setattr(planner, "LEAST_STEPS", 1000)
    start_run(config_of(material, f"run.output={tmp_path / 'few'}", "train.max_steps=2"), quiet=True)
    assert len(spent) == 1


class Short:
    """A machine with so much memory, on which compiled products take none: beside a tiny network they are all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free
        monkeypatch.setattr("lorafit.plan.predict._KERNEL_BYTES", 0)
        monkeypatch.setattr("lorafit.plan.machine.resident_bytes", lambda: 0)
        monkeypatch.setattr("lorafit.plan.machine.available_bytes", lambda device: self.free)


def inputs(config: Config) -> tuple[RunInputs, Machine]:
    return RunInputs.read(config, quiet=True), Machine.read(torch.device("cpu"), ProcessEnv())


def needed(config: Config) -> int:
    return planner._memory(config, *inputs(config)).total


def fitted(config: Config) -> Fit:
    return fit(config, *inputs(config))


def test_what_does_not_fit_is_refused_with_what_would(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Short(monkeypatch, 2**60)
    config = config_of(material, f"run.output={tmp_path / 'run'}")
    whole = needed(config)
    smaller = config_of(material, "train.micro_batch_tokens=128")
    assert needed(smaller) < whole
    machine.free = (needed(smaller) + whole) // 2
    for act in (start_run, plan_run):
        with pytest.raises(RunError, match=r"training needs about .* are available") as caught:
            act(config, quiet=True)
        assert caught.value.exit_code == 2
        (problem,) = caught.value.problems
        assert "train.micro_batch_tokens=128 needs" in problem.hint
        assert "train.recompute" not in problem.hint
        assert "--auto" in problem.hint
        assert "CPU" in problem.place
    machine.free = 1000
    with pytest.raises(RunError, match="no setting makes it fit"):
        start_run(config, quiet=True)
    assert not (tmp_path / "run").exists()
    tried = start_run(
        config_of(material, f"run.output={tmp_path / 'tried'}", "run.too_large=try", "train.max_steps=1"),
        quiet=True,
    )
    assert tried.finished


def test_auto_picks_the_cheapest_and_the_run_keeps_it(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Short(monkeypatch, 2**60)
    plain = start_run(
        config_of(material, f"run.output={tmp_path / 'plain'}", "train.max_steps=3"), quiet=True
    )
    whole = needed(config_of(material))
    small = [
        needed(config_of(material, "train.micro_batch_tokens=128", *words))
        for words in ([], ["train.recompute=layers"])
    ]
    assert small[0] < whole
    assert small[1] < small[0]
    auto = ["run.too_large=auto", "train.max_steps=3"]
    machine.free = small[0]
    first = start_run(config_of(material, f"run.output={tmp_path / 'first'}", *auto), quiet=True)
    kept = load_config(first.path / "config.yaml")
    assert kept.train.micro_batch_tokens == 128
    assert (kept.train.recompute, kept.model.quantize) == ("none", "none")
    (line,) = [e["text"] for e in events(first.path, "note") if e["text"].startswith("picked ")]
    assert "train.micro_batch_tokens=128" in line
    assert line.endswith("the result does not change")
    assert first.loss == pytest.approx(plain.loss, rel=1e-4)
    machine.free = small[1]
    picked = fitted(config_of(material, *auto)).config
    assert picked.train.recompute == "layers"
    assert picked.model.quantize == "none"
    machine.free = 10
    assert resume_run(first.path, quiet=True).finished  # what began here is not refused
    assert flag_overrides(None, None, None, auto=True) == {"run.too_large": "auto"}
    given = config_from_args(
        ["model.name=m", "data.path=d"], None, flag_overrides(None, None, None, auto=True)
    )
    assert given.run.too_large == "auto"


def test_choices_go_from_cheap_to_dear_and_int8_says_that_numbers_change(
    material: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(material, "train.micro_batch_tokens=1024", "run.too_large=auto")
    settings = [settings_of(candidate, config) for candidate in planner.candidates(config, 300)]
    sizes = ["", "train.micro_batch_tokens=512", "train.micro_batch_tokens=300"]
    assert settings[:3] == sizes
    assert settings[3:6] == [f"{size} train.recompute=layers".strip() for size in sizes]
    assert settings[6:9] == [f"{size} model.quantize=int8".strip() for size in sizes]
    assert settings[11] == "train.micro_batch_tokens=300 train.recompute=layers model.quantize=int8"
    assert settings[12:] == [f"{choice} model.offload=layers".strip() for choice in settings[:12]]
    machine = Short(monkeypatch, 2**60)
    longest = inputs(config)[0].workload(config).longest_row
    made = [each for each in planner.candidates(config, longest) if each.model.offload == "none"]
    without = min(needed(candidate) for candidate in made if candidate.model.quantize == "none")
    machine.free = without - 1
    data, free = inputs(config)
    chosen = fit(config, data, free)
    assert chosen.config.model.quantize == "int8"
    assert config.model.quantize == "none"  # a fit is a new value
    assert "changes the base's numbers" in make_plan(chosen, data, free, None).picked
    machine.free = 10
    wide = config_of(material, "model.dtype=float64")  # has no int8
    with pytest.raises(RunError, match="no setting makes it fit"):
        fitted(wide)


def test_fit_is_a_function_of_config_rows_and_machine(material: list[str]) -> None:
    config = config_of(material, "run.too_large=auto")
    data, free = inputs(config)
    assert fit(config, data, free) == Fit(config, "")
    needs = planner._memory(config, data, free).total
    less = dataclasses.replace(free, available_bytes=needs - 1)
    smaller = fit(config, data, less)
    assert smaller == fit(config, data, less)
    assert smaller.note.startswith("picked ")
    assert fit(config, data, dataclasses.replace(free, available_bytes=None)) == Fit(config, "")
    tight = dataclasses.replace(free, available_bytes=needs)
    assert fit(config, data, tight, beyond=0).config == config
    assert fit(config, data, tight, beyond=1).config != config


@pytest.mark.parametrize(
    ("every", "num_steps", "steps_per_epoch"), [((3, 5, 2), 11, 4), ((0, 4, 0), 12, 5), ((7, 0, None), 6, 9)]
)
def test_a_cadence_counts_what_the_loop_does_step_by_step(
    every: tuple[int, int, int | None], num_steps: int, steps_per_epoch: int
) -> None:
    cadence = Cadence(*every, num_steps, steps_per_epoch)
    by_step = [cadence.at(step) for step in range(1, num_steps + 1)]
    assert cadence.times() == [due for due in by_step if any(due)]
    assert by_step[-1] == (True, True, False)
    for due, step in zip(by_step[:-1], range(1, num_steps), strict=True):
        spans = [span if span is None else span or steps_per_epoch for span in every]
        assert list(due) == [span is not None and step % span == 0 for span in spans]


class Rows:
    """Rows of these lengths; the last `targets` tokens of each are supervised."""

    def __init__(self, texts: Sequence[np.ndarray], targets: Sequence[int]) -> None:
        self.texts = texts
        self.lengths, self.targets = np.array([len(text) for text in texts]), np.array(targets)

    @property
    def to_pack(self) -> Rows:
        return self

    def row(self, index: int) -> TokenRow:
        text = self.texts[index]
        return text.astype(np.uint16), np.arange(len(text)) >= len(text) - self.targets[index]


def survey_of(
    rows: list[int] | Sequence[np.ndarray], targets: Sequence[int], num_steps: int = 5, capacity: int = 1024
) -> Workload:
    """The workload of these rows; numbers stand for rows of that length that share no prefix."""
    order = RowOrder([np.arange(len(rows))], [1.0], 4, 0, True)
    texts = [np.arange(row) + 1000 * n if isinstance(row, int) else row for n, row in enumerate(rows)]
    return estimate_workload(cast(TokenDataset, Rows(texts, targets)), order, num_steps, Packer(capacity))


def test_a_long_run_is_sampled_but_its_tokens_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(5, 200, 403)
    targets = lengths // 2
    whole = survey_of(lengths.tolist(), targets.tolist(), num_steps=900)
    monkeypatch.setattr("lorafit.plan.workload._SAMPLED_STEPS", 90)
    sampled = survey_of(lengths.tolist(), targets.tolist(), num_steps=900)
    assert (sampled.tokens, sampled.supervised) == (whole.tokens, whole.supervised)
    assert len(sampled.passes) < len(whole.passes) / 5
    assert sampled.num_passes == pytest.approx(whole.num_passes, rel=0.05)
    assert sampled.computed_tokens == pytest.approx(whole.computed_tokens, rel=0.1)
    assert whole.longest_row == lengths.max()


def test_what_rows_begin_alike_with_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    lengths = generator.integers(20, 60, 120)
    preambles = (np.arange(10), np.arange(10, 26))
    texts = [
        np.concatenate([preambles[n % 2], generator.integers(0, 9999, length)])[:length]
        for n, length in enumerate(lengths)
    ]
    targets = [len(text) // 2 for text in texts]
    work = survey_of(texts, targets, num_steps=30, capacity=150)
    for found, members in zip(work.passes, work.pack_of, strict=True):
        beginnings = {tuple(texts[at][: end + 1]) for at in members for end in range(lengths[at] - 1)}
        assert found[0] == len(beginnings)
        assert found[1] == sum(targets[at] for at in members)
    apart = survey_of(lengths.tolist(), targets, num_steps=30, capacity=150)
    assert work.shared == apart.passes[:, 0].sum() - work.passes[:, 0].sum() > 300
    assert apart.shared == 0
    monkeypatch.setattr("lorafit.plan.workload._SAMPLED_PACKS", 12)
    sampled = survey_of(texts, targets, num_steps=30, capacity=150)
    assert sampled.shared == pytest.approx(work.shared, rel=0.2)
    assert sampled.computed_tokens == pytest.approx(work.computed_tokens, rel=0.05)
    assert (sampled.tokens, sampled.supervised) == (work.tokens, work.supervised)


def test_the_head_of_a_run_is_short_and_the_table_closes(material: list[str]) -> None:
    config = config_of(material)
    plan = make_plan(Fit(config, ""), *inputs(config), None)
    assert plan.times is None
    assert len(short_lines(plan)) == 1
    assert "about" in short_lines(plan)[0]
    assert {len(row) for row in table_rows(plan)} == {3}
    for mixes_by_row in (True, False):  # of a hybrid, and of other networks
        shared = dataclasses.replace(plan, shared_tokens=plan.tokens // 2, mixes_by_row=mixes_by_row)
        said = {row[0]: row[2] for row in table_rows(shared)}["tokens"]
        assert said.startswith("about 50")
        assert said.endswith("convolutions and states for each row") == mixes_by_row
    assert not plan.mixes_by_row
    memory = plan.memory
    assert memory.total == round(sum(dataclasses.asdict(memory).values())) == plan.peak_bytes
    assert memory.kernels == 0  # float32
    network = random_network()
    assert memory.base == sum(parameter.numel() for parameter in network.parameters()) * 4


def test_memory_is_bounded_by_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/outer/inner\n")
    groups = tmp_path / "groups"
    (groups / "outer" / "inner").mkdir(parents=True)
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    free = 2**50
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free - 1000))
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1000)
    cpu = torch.device("cpu")
    assert available_bytes(cpu) == free
    (groups / "outer" / "inner" / "memory.max").write_text("max\n")
    (groups / "outer" / "memory.max").write_text("2000000\n")
    assert available_bytes(cpu) == 2_000_000
    (tmp_path / "self" / "cgroup").write_text("5:cpu,memory:/box\n1:name=systemd:/\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    assert available_bytes(cpu) == 1_000_000
    (groups / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert available_bytes(cpu) == free
    assert available_bytes(torch.device("mps")) is None
    (tmp_path / "self" / "cgroup").unlink()
    assert available_bytes(cpu) == free


def test_the_peak_of_a_block_is_seen_below_an_earlier_one() -> None:
    cpu = torch.device("cpu")
    before = resident_bytes()
    if not before:
        pytest.skip("resident memory cannot be asked here")
    large = torch.ones(60 * 2**20 // 4)
    del large
    with watch_peak(cpu) as peak:
        held = torch.ones(30 * 2**20 // 4)
        for _ in range(20):
            held.mul_(1.0)
        total = float(held.sum())
    assert total == 30 * 2**20 / 4
    assert before + 20 * 2**20 < peak.num_bytes


@pytest.mark.shared
@pytest.mark.slow
def test_tinystories_takes_about_what_was_planned(shared: Path, tmp_path: Path) -> None:
    """Counts and memory; benchmarks/plan.py measures how near the time is."""
    config = load_config(
        None,
        [
            f"model.name={shared / 'models' / 'tinystories-656k'}",
            f"data.path={shared / 'data' / 'alpaca_en_demo.json'}",
            "data.template=alpaca",
            "data.max_length=512",
            "data.too_long=drop",
            "model.dtype=float32",
            "train.max_steps=12",
            "run.samples=0",
            "run.verify=false",
            f"run.output={tmp_path / 'run'}",
        ],
    )
    plan = plan_run(config, quiet=True)
    result = start_run(config, quiet=True)
    steps = events(result.path, "step")
    assert plan.supervised_tokens == sum(step["supervised_tokens"] for step in steps)
    assert plan.times is not None
    assert plan.times.steps > 0
    assert 0.5 < plan.peak_bytes / steps[-1]["memory_bytes"] < 2


def test_a_pass_of_nothing_costs_nothing() -> None:
    assert survey_of([10], [4], num_steps=1).at(0) == PassCost(9.0, 4.0, 0.0, 55.0)


def test_a_gpu_is_timed_after_its_kernels_are_loaded_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call takes a minute there, one of the CPU does not."""
    for kind, calls in (("cpu", 3), ("cuda", 4)):
        clock, done = [0.0], []

        def work(clock: list[float] = clock, done: list[int] = done, kind: str = kind) -> None:
            clock[0] += 60.0 if kind == "cuda" and not done else 0.01
            done.append(1)

        monkeypatch.setattr(calibration.time, "perf_counter", lambda clock=clock: clock[0])
        monkeypatch.setattr(calibration, "_wait", lambda device: None)
        assert calibration.best_seconds(work, torch.device(kind)) == pytest.approx(0.01)
        assert len(done) == calls


def test_the_context_of_cuda_is_not_counted_beside_free_memory_that_is_without_it(
    material: list[str],
) -> None:
    """The free memory is read when the context is there."""
    config = load_config(None, material)
    data = RunInputs.read(config, quiet=True)
    shape, work = planner._shape(config, data.arch, torch.device("cpu")), data.workload(config)
    memory = predict_memory(shape, work, torch.device("cuda"), 10**9)
    assert memory.process == 0
    measured = predict_memory(shape, work, torch.device("cuda"), 10**9, measured_bytes=10**8)
    assert 10**8 < measured.total < 2 * 10**8

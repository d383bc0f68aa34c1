"""Whole runs on a fake CUDA device: devices, types, shapes, and what CUDA's kernels refuse. See test_devices.py."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401  (it reads what torch.cuda says: before there is a fake device)
import pytest
import torch
from benchmarks.gpu_results import FAILED, Results
from tests.gpu.device import A100, H100, T4
from tests.gpu.fake import FakeCuda, compiled_as_one, fake_cuda
from tests.gpu.kernels import counted, fused, installed
from tests.gpu.networks import (
    TINYLLAMA,
    empty_network,
    planned_bytes,
    rows_of,
    shape_of,
    train_step,
    trainable,
)
from tests.gpu.runs_here import FirstOfTwo, settings, short_proof, train, write_pairs
from tests.gpu.streams import streams
from tests.runs import events, interrupt_after

from benchmarks import gpu_runs, gpu_speed
from lorafit.config.load import load_config
from lorafit.data.packing import Pack, Packer
from lorafit.distributed.ranks import Ranks
from lorafit.errors import ConfigError, RunError
from lorafit.export.run import export_run
from lorafit.forward import pack_loss
from lorafit.infer.continuous_batch import ContinuousBatch, Request
from lorafit.infer.engine import decode_attention
from lorafit.infer.model import load
from lorafit.infer.sampling import Sampling
from lorafit.model import native
from lorafit.model.adamw import AdamW
from lorafit.model.architecture import parse_architecture
from lorafit.model.build import build_saved
from lorafit.model.llama import Llama
from lorafit.model.multi_lora import Adapters
from lorafit.model.offload import check_offload
from lorafit.plan import planner
from lorafit.plan.cost_model import copied_bytes
from lorafit.plan.machine import Machine
from lorafit.plan.table import table_rows
from lorafit.run_dir import RunDirectory
from lorafit.training import loop
from lorafit.training.run import Result, resume_run

EIGHT_BILLION: dict[str, Any] = {
    **TINYLLAMA,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}
ALL = ("lora.dropout=0.1", "train.recompute=layers")
GRADIENTS = loop._gradients
CHIPS = {"t4": T4, "h100": H100}
slow = pytest.mark.slow


@pytest.fixture
def compiles_nothing() -> Iterator[None]:
    """A run on CUDA needs no kernel of the CPU, so it compiles and loads none."""

    def refuse(*words: object) -> None:
        raise AssertionError(f"compiles {words}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_compiled", refuse)
        for cached in (native._build, native.blocks):
            cached.cache_clear()
        yield


@pytest.mark.parametrize(
    ("chip", "quantize", "more"),
    [
        ("t4", "none", ALL),
        ("h100", "none", ("train.deterministic=true",)),
        pytest.param("t4", "int8", ALL, marks=slow),
        pytest.param("t4", "nf4", (), marks=slow),
        pytest.param("h100", "int8", ("model.offload=layers",), marks=slow),
        pytest.param("h100", "fp8", ALL, marks=slow),
        pytest.param("h100", "nf4", ALL, marks=slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # the CPU's kernels use it
def test_everything_that_a_run_and_its_adapter_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiles_nothing: None,
    chip: str,
    quantize: str,
    more: tuple[str, ...],
) -> None:
    has_triton = chip == "h100"
    with fake_cuda(CHIPS[chip]) as gpu, installed(gpu) if has_triton else nullcontext():
        interrupt_after(1, monkeypatch)
        stopped = train(tmp_path, "run", f"model.quantize={quantize}", *more)
        assert not stopped.finished
        monkeypatch.setattr(loop, "_gradients", GRADIENTS)
        with short_proof():
            result = resume_run(stopped.path, quiet=True)
        assert result.step == 2
        shows_every_part(result)
        answers_and_serves(result, quantize)
    kernels = {record.name for record in gpu.records if record.name.startswith("triton")}
    assert ("triton rms_norm_backward" in kernels) == has_triton
    assert ("triton fill" in kernels) == (has_triton and quantize == "none")  # merged products
    said = [event["text"] for event in events(result, "note") if "between" in event["text"]]
    assert len(said) == 2  # of each process
    assert "math" not in gpu.chosen  # it keeps all scores in float32
    assert gpu.chosen["efficient"] or gpu.chosen["flash"]


def shows_every_part(result: Result) -> None:
    """The run measured, answered, saved, and wrote its proof and report."""
    run = RunDirectory(result.path)
    assert events(result, "heldout")
    assert json.loads(run.samples_file.read_text())
    assert run.saved_steps()
    assert {check["name"] for check in json.loads(run.proof_file.read_text())["checks"]} == {
        "changed",
        "reload",
        "stop",
        "heldout",
    }
    assert run.report_file.exists()


def answers_and_serves(result: Result, quantize: Any) -> None:
    model = load(result.path, device="cuda")
    assert len(model.generate(["Say it"] * 3, max_tokens=3)) == 3
    model.generate(["Say it", "What?"], max_tokens=3, sampling=Sampling(temperature=1.0, top_k=5, top_p=0.9))
    config = RunDirectory(result.path).config()
    network, _ = build_saved(Path(config.model.name), None, "cuda", "auto", None, quantize)
    batch = ContinuousBatch[int](
        network, 4, 64, Adapters(network, {"a": result.adapter, "b": result.adapter})
    )
    for key, name in enumerate(["a", "b", None]):
        request = Request([5, 6, 7 + key], frozenset(), 6, adapter=name, top_logprobs=2)
        batch.add([(key, request)])
    assert len(batch.step()) == 3
    batch.drop(0)
    assert len(batch.step()) == 2


def test_an_adapter_of_a_device_is_exported(tmp_path: Path) -> None:
    with fake_cuda(H100):
        result = train(tmp_path, "run", "run.verify=false", "run.samples=0", "data.holdout=0")
        export_run(result.path, "merged", output=tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("capability", [T4, A100, H100])
def test_an_answers_attention_never_takes_the_kernel_that_copies_the_cache(
    capability: tuple[int, int],
) -> None:
    with fake_cuda(capability) as gpu:
        dtype = torch.float16

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda")

        angles = torch.empty(3, 8, device="cuda"), torch.empty(3, 8, device="cuda")
        caches = empty(3, 2, 64, 16), empty(3, 2, 64, 16)
        positions = torch.tensor([3, 4, 5], device="cuda")
        with torch.inference_mode():
            out = decode_attention(
                empty(3, 8, 16), empty(3, 2, 16), empty(3, 2, 16), angles, 5, *caches, positions
            )
        assert out.shape == (3, 8, 16)
        assert dict(gpu.chosen) == {"efficient": 1}


def peak_of_a_step(gpu: FakeCuda, network: Llama, packs: Sequence[Pack]) -> int:
    """The bytes at the peak of a step that is not the first; `gpu` has its records."""
    optimizer = AdamW(trainable(network), 0.0)
    train_step(network, optimizer, packs)  # it makes the optimizer's state
    gpu.records.clear()
    gpu.memory.peak = gpu.memory.now
    train_step(network, optimizer, packs)
    return gpu.memory.peak


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mean", [100, 1000])
@pytest.mark.parametrize("capability", [T4, H100])
def test_the_plan_has_the_memory_of_short_and_long_documents(
    capability: tuple[int, int], mean: int, recompute: bool
) -> None:
    dtype = torch.float16 if capability == T4 else torch.bfloat16
    with fake_cuda(capability) as gpu:
        network = empty_network({**TINYLLAMA, "num_hidden_layers": 3}, dtype)
        network.recompute = recompute
        packs = Packer(2048).packs(rows_of(2048, mean=mean))
        peak = peak_of_a_step(gpu, network, packs)
        planned = planned_bytes(shape_of(network.arch, dtype, recompute=recompute), packs[0])
    assert peak == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("quantize", [pytest.param("int8", marks=slow), "nf4"])
def test_eight_billion_parameters_fit_into_6_gb_with_the_layers_on_the_host(quantize: Any) -> None:
    """The plan's formula is measured with three of the 32 layers: memory, and what the bus carries."""
    with fake_cuda(H100) as gpu:
        network = empty_network(
            {**EIGHT_BILLION, "num_hidden_layers": 3}, torch.bfloat16, quantize, offload=True
        )
        network.recompute = True
        packs = Packer(2048).packs(rows_of(2048))
        peak, waits = peak_of_a_step(gpu, network, packs), gpu.waits()
        copied = sum(record.num_bytes for record in gpu.records if record.name == "copy to cuda")
        shape = shape_of(network.arch, torch.bfloat16, quantize, recompute=True, offload=True)
        whole = dataclasses.replace(
            shape,
            arch=parse_architecture(EIGHT_BILLION, "test"),
            adapted=shape.adapted[:1] * EIGHT_BILLION["num_hidden_layers"],
        )
    assert waits == {"upload": 1}
    assert copied == pytest.approx(copied_bytes(shape), rel=0.001)
    assert peak == pytest.approx(planned_bytes(shape, packs[0]), rel=0.05)
    assert planned_bytes(whole, packs[0]) < 5.8e9


def test_a_base_that_does_not_fit_is_offered_a_place_on_the_host(tmp_path: Path) -> None:
    with fake_cuda(H100):
        config = load_config(None, settings(tmp_path, "lora.targets=[q_proj]", num_hidden_layers=12))
        data = planner.RunInputs.read(config, quiet=True)
        machine = Machine(torch.device("cuda"), 10**10, 0, host_bytes=10**9)

        def with_memory(available: int, host: int = 10**9, **changes: Any) -> Any:
            run = data.config.run.model_copy(update=changes)
            there = dataclasses.replace(machine, available_bytes=available, host_bytes=host)
            return planner.fit(data.config.model_copy(update={"run": run}), data, there)

        away = data.config.model.model_copy(update={"offload": "layers"})
        small = data.config.train.model_copy(update={"recompute": "layers", "micro_batch_tokens": 128})
        least = planner._memory(
            data.config.model_copy(update={"model": away, "train": small}), data, machine
        ).total
        picked = with_memory(least, too_large="auto")
        assert picked.config.model.offload == "layers"
        assert (picked.config.model.quantize, picked.config.train.recompute) == ("none", "layers")
        assert "the result does not change" in picked.note
        with pytest.raises(RunError) as refused:
            with_memory(least)
        assert "model.offload=layers needs" in refused.value.problems[0].hint
        with pytest.raises(RunError, match="no setting makes it fit"):
            with_memory(least, host=1000)
        plan = planner.make_plan(picked, data, machine, None)
    assert plan.offloaded is not None
    assert plan.choice["offload"] == "layers"
    copied = plan.offloaded.bytes_per_step * plan.steps / plan.passes
    assert copied == pytest.approx(plan.offloaded.host_bytes * (2 * 12 - 4) / 12)
    row = next(row for row in table_rows(plan) if row[0] == "layers on the host")
    assert "copied to the device per step" in row[2]


def test_layers_are_offloaded_to_the_host_of_a_gpu_only() -> None:
    with pytest.raises(ConfigError, match="this run computes on cpu"):
        check_offload("layers", torch.device("cpu"), "auto")
    with pytest.raises(ConfigError, match="sharded"):
        check_offload("layers", torch.device("cuda"), "fsdp")
    check_offload("layers", torch.device("cuda"), "ddp")
    check_offload("none", torch.device("cpu"), "fsdp")


@pytest.mark.slow
def test_the_parts_of_the_acceptance_that_only_a_device_runs(tmp_path: Path) -> None:
    """On a small model: `--simulate` leaves them out, because they measure memory and speed."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 260}
    results = Results(end=0.0)
    with fake_cuda(H100), mock.patch.dict(TINYLLAMA, small), mock.patch.object(gpu_speed, "STEPS", 2):
        gpu_runs.write_large(tmp_path / "model")
        gpu_runs.write_texts(tmp_path / "rows.jsonl", 64, 150)
        gpu_speed.training(results, tmp_path, "bfloat16", 600, "int8")
        gpu_speed.generation(results, 2, tokens=3)
        gpu_runs.out_of_memory(results, tmp_path / "short")
    assert [speed.name.partition(",")[0] for speed in results.speeds] == ["lorafit", "generation"]
    assert results.checks[0].name == "passes were made smaller"
    failed = {check.name for check in results.checks if check.verdict == FAILED}
    # the device has no numbers: the loss of each pass is 1, so that of a step depends on the passes
    assert failed <= {"difference of the losses"}


MOST = {"forward": 19, "backward": 29}  # launches of a layer that computes all tokens
MOST_BYTES = 1.25e9  # of it, both passes over 2,048 tokens


def test_a_layer_needs_few_launches_and_moves_few_bytes() -> None:
    """With Triton's kernels, rows that share tokens: the difference of a step of three layers and one of two."""
    found = []
    for layers in (2, 3):
        with fake_cuda(H100) as gpu, compiled_as_one(gpu), counted(gpu):
            network = fused(empty_network({**TINYLLAMA, "num_hidden_layers": layers}, torch.bfloat16))
            optimizer = AdamW(trainable(network), 0.0)
            (pack,) = Packer(2048).packs(rows_of(2048, prefix=60))
            train_step(network, optimizer, [pack])  # it makes the optimizer's state
            shape = shape_of(network.arch, torch.bfloat16)
            gpu.records.clear()
            gpu.memory.peak = gpu.memory.now
            gpu.phase = "forward"
            loss = pack_loss(network, pack)
            gpu.phase = "backward"
            loss.backward()
            planned, waits = planned_bytes(shape, pack), gpu.waits()
        assert (
            0.75 * planned < gpu.memory.peak < planned
        )  # it counts copies in float32, which kernels do not make
        assert waits == {"upload": 1}
        found.append(
            Counter({phase: sum(r.launches for r in gpu.records if r.phase == phase) for phase in MOST})
        )
        found[-1]["bytes"] = sum(record.num_bytes for record in gpu.records)
    two, three = found
    for phase, most in MOST.items():
        assert 0.8 * most <= three[phase] - two[phase] <= most
    assert three["bytes"] - two["bytes"] <= MOST_BYTES


@pytest.mark.parametrize(
    ("method", "is_alone"),
    [
        ("sft", True),
        ("kto", False),
        pytest.param("sft", False, marks=slow),
        pytest.param("dpo", True, marks=slow),
        pytest.param("orpo", True, marks=slow),
    ],
)
def test_the_device_never_waits_for_the_host_within_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, is_alone: bool
) -> None:
    """A step has one upload, nothing is read, and the numbers of the step before are there when they are asked for."""
    stalls: dict[int, int] = {}
    collectives: dict[int, tuple[int, int]] = {}
    ranks = Ranks() if is_alone else FirstOfTwo()
    steps = loop._steps

    def watched(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        gpu.phase = f"step {state.step + 1}"
        stalls[state.step + 1] = streams.stalls
        if isinstance(ranks, FirstOfTwo):
            collectives[state.step + 1] = ranks.on_host, ranks.on_device
        return GRADIENTS(job, state, *rest)

    def with_ranks(job: loop.TrainContext, *rest: Any) -> Any:
        return steps(dataclasses.replace(job, ranks=ranks), *rest)

    monkeypatch.setattr(loop, "_gradients", watched)
    monkeypatch.setattr(loop, "_steps", with_ranks)
    more = ["run.verify=false", "train.micro_batch_tokens=2048", f"train.method={method}"]
    if method != "sft":
        more.append(f"data.path={write_pairs(tmp_path / 'pairs.json')}")
    rare = (
        "train.max_steps=6",
        "train.eval_every=6",
        "train.save_every=6",
        "run.check=none",
        "run.samples=0",
    )
    with fake_cuda(H100) as gpu:
        result = train(tmp_path, "run", *rare, *more)
    assert [event["step"] for event in events(result, "step")] == [1, 2, 3, 4, 5, 6]
    compared = [event for event in events(result, "preferences") if event["rows"] == "train"]
    assert len(compared) == (0 if method == "sft" else 6)
    passes = 1 if method != "kto" else 2  # that of the divergence
    for step in (2, 3, 4, 5):
        waits = [record.wait for record in gpu.records if record.phase == f"step {step}" and record.wait]
        assert waits == ["upload"] * passes
    assert stalls[6] == stalls[2]
    if not is_alone:  # of each step: whether memory ran out, the numbers of the step before, who has signals
        assert collectives[5][0] - collectives[4][0] == (4 if method == "kto" else 3)
        assert collectives[5][1] - collectives[4][1] == (2 if method == "kto" else 1)


# The most launches, bytes moved and pageable uploads in a step of 2,048 tokens with three layers of TinyLlama's shape,
# without compiled kernels. Lower them as they fall.
BUDGETS = {(H100, False): (900, 14e9, 1), (H100, True): (1350, 24.5e9, 1), (T4, False): (1440, 22e9, 2)}


@pytest.mark.parametrize(
    ("capability", "recompute", "prefix"),
    [
        pytest.param(H100, False, 60, id="flash"),
        pytest.param(H100, True, 1, id="recompute", marks=slow),
        pytest.param(T4, False, 1, id="batches", marks=slow),
    ],
)
def test_a_step_needs_the_memory_of_the_plan_and_stays_within_its_budgets(
    capability: tuple[int, int], recompute: bool, prefix: int
) -> None:
    dtype = torch.float16 if capability == T4 else torch.bfloat16
    with fake_cuda(capability) as gpu:
        network = empty_network({**TINYLLAMA, "num_hidden_layers": 3}, dtype)
        network.recompute = recompute
        packs = Packer(2048).packs(rows_of(2048, prefix=prefix))
        peak = peak_of_a_step(gpu, network, packs)
        planned = planned_bytes(shape_of(network.arch, dtype, recompute=recompute), packs[0])
        waits = gpu.waits()
    assert peak == pytest.approx(planned, rel=0.05)
    assert "math" not in gpu.chosen
    most_launches, most_bytes, most_uploads = BUDGETS[capability, recompute]
    assert waits == {"upload": most_uploads}
    launches = sum(record.launches for record in gpu.records)
    num_bytes = sum(record.num_bytes for record in gpu.records)
    assert 0.8 * most_launches <= launches <= most_launches
    assert 0.8 * most_bytes <= num_bytes <= most_bytes

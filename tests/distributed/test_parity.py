"""The same rows and steps on one, two, three and four processes: the same mathematics, whoever computes what."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.distributed.ranks import together
from tests.runs import events, tiny_settings
from tests.tiny_models import random_network
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lorafit.config.load import load_config
from lorafit.data.packing import build_pack
from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.fsdp import shard_base
from lorafit.distributed.parallel import ReplicatedEngine
from lorafit.distributed.ranks import Ranks
from lorafit.errors import ConfigError
from lorafit.forward import pack_losses
from lorafit.model.linear import Frozen
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.quant import Int8Linear
from lorafit.run_dir import RunDirectory
from lorafit.training import loop
from lorafit.training.run import start_run

STEPS = 6
REFIT = ("train.refit=true", "data.holdout=8")


@dataclass
class Bench:
    """A folder of runs with the same rows and model."""

    folder: Path
    material: list[str]

    def job(self, name: str, *settings: str, **more: Any) -> dict[str, Any]:
        return {"settings": [*self.material, f"run.output={self.folder / name}", *settings], **more}

    def one_process(self, name: str, *settings: str, stop: int = 0) -> Path:
        """The run in this process, by itself, stopped in the step `stop`."""
        gradients = loop._gradients

        def watched(given: Any, state: Any, *rest: Any) -> Any:
            if state.step + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return gradients(given, state, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_gradients", watched)
            result = start_run(load_config(None, self.job(name, *settings)["settings"]), quiet=True)
        assert result.finished == (not stop)
        return result.path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("ranks")
    material = tiny_settings(
        folder,
        "train.batch_size=7",  # no multiple of the ranks
        "train.micro_batch_tokens=128",  # more than one pass a rank
        "train.learning_rate=0.002",
        f"train.max_steps={STEPS}",
        "train.eval_every=3",
        "train.save_every=3",
        num_rows=60,
    )
    return Bench(folder, material)


@pytest.fixture(scope="module")
def one(bench: Bench) -> Path:
    bench.one_process("stopped-1", stop=4)
    bench.one_process("few-1", "train.batch_size=1")
    bench.one_process("dropped-1", "lora.dropout=0.2")
    bench.one_process("refit-1", *REFIT)
    return bench.one_process("one")


@pytest.fixture(scope="module")
def two(bench: Bench, one: Path) -> list[dict[str, Any]]:
    return together(
        2,
        [
            bench.job("two"),
            bench.job("stopped-2", stop=[1, 4]),
            {"resume": str(bench["stopped-1"])},
            bench.job("few-2", "train.batch_size=1"),  # a rank without rows
            bench.job("refit-2", *REFIT),
            bench.job("stopped-refit-2", *REFIT, stop=[1, STEPS + 2]),
            {"resume": str(bench["stopped-refit-2"])},
            bench.job("dropped-2", "lora.dropout=0.2", "train.micro_batch_tokens=200"),
            bench.job("sharded", "distributed.strategy=fsdp"),
            bench.job(
                "sharded-few", "distributed.strategy=fsdp", "train.batch_size=1", "train.recompute=layers"
            ),
            bench.job("int8", "model.quantize=int8"),
            bench.job("sharded-int8", "model.quantize=int8", "distributed.strategy=fsdp"),
        ],
        bench.folder,
    )


@pytest.fixture(scope="module")
def more(bench: Bench, two: list[dict[str, Any]]) -> None:
    together(4, [bench.job("four"), bench.job("stopped-4", stop=[3, 4])], bench.folder)
    together(3, [{"resume": str(bench["stopped-2"])}], bench.folder)


def assert_same(path: Path, whole: Path) -> None:
    """Losses, held-out losses and final adapters agree to 1e-6."""
    for kind in ("step", "heldout"):
        losses, expected = ([event["loss"] for event in events(run, kind)] for run in (path, whole))
        assert losses == pytest.approx(expected, rel=1e-6)
    seen, expected_seen = (
        [(e["rows"], e["tokens"], e["supervised_tokens"]) for e in events(run, "step")]
        for run in (path, whole)
    )
    assert seen == expected_seen
    weights, expected_weights = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (path, whole)
    )
    for name, tensor in weights.items():
        assert float((tensor - expected_weights[name]).abs().max()) < 1e-6, name


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(bench: Bench, one: Path, two: list[dict[str, Any]]) -> None:
    assert_same(bench["two"], one)
    assert [event["ranks"] for event in events(bench["two"], "step")] == [2] * STEPS
    assert all(0 <= event["imbalance"] < 0.5 for event in events(bench["two"], "step"))


@pytest.mark.slow
def test_the_held_out_loss_of_the_same_adapter_has_the_same_bits(
    bench: Bench, one: Path, two: list[dict[str, Any]]
) -> None:
    base = [{event["base_loss"] for event in events(run, "heldout")} for run in (one, bench["two"])]
    assert base[0] == base[1]
    assert len(base[0]) == 1


@pytest.mark.slow
def test_a_rank_without_rows_takes_part(bench: Bench, one: Path, two: list[dict[str, Any]]) -> None:
    assert_same(bench["few-2"], bench["few-1"])


@pytest.mark.slow
def test_the_second_phase_is_the_same_on_all_rows_also_when_interrupted(
    bench: Bench, one: Path, two: list[dict[str, Any]]
) -> None:
    (refit,) = events(bench["refit-1"], "refit")
    assert refit["num_rows"] == 60
    assert refit["step"] == STEPS < refit["num_steps"]
    for name in ("refit-2", "stopped-refit-2"):
        assert events(bench[name], "refit") == [
            {**refit, "heldout_loss": pytest.approx(refit["heldout_loss"])}
        ]
        assert_same(bench[name], bench["refit-1"])


@pytest.mark.slow
def test_dropout_takes_the_same_from_a_row_whoever_computes_it(
    bench: Bench, one: Path, two: list[dict[str, Any]]
) -> None:
    assert_same(bench["dropped-2"], bench["dropped-1"])
    losses = [events(bench[name], "step")[-1]["loss"] for name in ("one", "dropped-1")]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_only_the_gradient_of_the_adapter_travels(bench: Bench, two: list[dict[str, Any]]) -> None:
    adapter = load_file(bench["two"] / "adapter" / "adapter_model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
    assert [answer["reduced_bytes"] for answer in two[0]["ranks"]] == [STEPS * size] * 2


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(bench: Bench, two: list[dict[str, Any]]) -> None:
    assert [(answer["step"], answer["finished"]) for answer in two[1]["ranks"]] == [(4, False)] * 2
    assert RunDirectory.open(bench["stopped-2"]).newest_checkpoint() == (4, {})
    assert [event["reason"] for event in events(bench["stopped-2"], "saved")][-1] == "stopped"


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two(bench: Bench, one: Path, two: list[dict[str, Any]]) -> None:
    assert_same(bench["stopped-1"], one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "whole"), [("sharded", "one"), ("sharded-few", "few-1"), ("sharded-int8", "int8")]
)
def test_a_base_that_is_shared_out_computes_the_same(
    bench: Bench, one: Path, two: list[dict[str, Any]], sharded: str, whole: str
) -> None:
    assert_same(bench[sharded], bench[whole])


@pytest.mark.slow
def test_four_ranks_compute_what_one_does(bench: Bench, one: Path, more: None) -> None:
    assert_same(bench["four"], one)


@pytest.mark.slow
def test_a_run_of_four_goes_on_with_two_and_one_of_two_with_three(
    bench: Bench, one: Path, more: None
) -> None:
    together(2, [{"resume": str(bench["stopped-4"])}], bench.folder)
    assert_same(bench["stopped-4"], one)
    assert_same(bench["stopped-2"], one)


def test_ranks_of_one_strategy_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but distributed.strategy=single is one"):
        start_run(load_config(None, [*bench.material, "distributed.strategy=single"]), quiet=True)


def test_only_plain_numbers_are_shared_out(bench: Bench) -> None:
    words = [*bench.material, "distributed.strategy=fsdp", "model.quantize=nf4"]
    with pytest.raises(ConfigError, match="a base in nf4 cannot be sharded"):
        start_run(load_config(None, words), quiet=True)


def test_each_rank_keeps_its_part_of_the_base_only(bench: Bench) -> None:
    """A group of one rank that stands for the first of four: what is left is a quarter."""
    network = random_network()
    before = sum(parameter.numel() for parameter in network.parameters())
    attach(network, LoraSpec(2, 4.0, 0.0, ("all-linear",), False), seed=0)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        shard_base(network, torch.device("cpu"))
        held = [p.to_local() for p in network.parameters() if isinstance(p, DTensor)]
        assert sum(tensor.numel() for tensor in held) == pytest.approx(before / 4, rel=0.01)
        assert not any(isinstance(p, DTensor) for p in network.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_only_the_adapters_gradients_are_communicated(quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network()
    for name, module in list(network.named_modules()):
        if quantize == "int8" and isinstance(module, Frozen):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Int8Linear(module.weight.detach()))
    attach(network, LoraSpec(2, 4.0, 0.0, ("all-linear",), False), seed=0)
    network.train()
    assert any(True for _ in network.buffers()) == (quantize == "int8")
    broadcast: list[int] = []
    real = dist._broadcast_coalesced

    def counted(group: Any, tensors: list[torch.Tensor], *rest: Any) -> None:
        broadcast.extend(tensor.numel() for tensor in tensors)
        real(group, tensors, *rest)

    monkeypatch.setattr(dist, "_broadcast_coalesced", counted)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        engine = ReplicatedEngine(network)
        pack = build_pack([(np.arange(3, 30, dtype=np.uint16), np.arange(27) > 5)])
        for _ in range(2):
            engine.loss(pack_losses, pack)[0].backward()
        trainable = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        assert engine.reduced_bytes == 2 * trainable
        assert broadcast == []
    finally:
        dist.destroy_process_group()


def test_a_run_alone_is_the_same_bytes_twice(bench: Bench, one: Path) -> None:
    again = bench.one_process("again")
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == (
        one / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_nccl_connects_with_the_group_and_not_in_the_first_step(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **words: given.update(words))
    store = dist.HashStore()
    Ranks(ProcessEnv(), store).connect(torch.device(device), 60.0)
    assert given["device_id"] == (torch.device(device) if device.startswith("cuda") else None)

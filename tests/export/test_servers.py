"""Whether vLLM and SGLang load an adapter: by their rules of names, ranks, scales and variants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.command import Cli
from tests.tiny_models import random_network, write_adapter, write_model

from lorafit.errors import RunError
from lorafit.export.servers import SERVERS, check_servers
from lorafit.model.adapter_file import CONFIG, WEIGHTS
from lorafit.model.lora import LoraSpec

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter(
    folder: Path, rank: int = 4, rslora: bool = False, targets: Sequence[str] = ALL, **config: Any
) -> Path:
    """An adapter of a tiny model, with other keys in its config."""
    base = write_model(folder / "base")
    spec = LoraSpec(rank=rank, alpha=8, dropout=0.0, targets=tuple(targets), rslora=rslora)
    path = write_adapter(folder / "adapter", random_network(), spec, base=str(base))
    (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | config))
    return path


def renamed(path: Path, old: str, new: str) -> Path:
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS)
    return path


def test_a_plain_adapter_is_loaded_whole(tmp_path: Path) -> None:
    assert check_servers(adapter(tmp_path), ["vllm", "sglang", "vllm"], offline=True) == [
        "vLLM would load 14 of 14 modules",
        "SGLang would load 14 of 14 modules",
    ]


def test_a_larger_rank_needs_an_option_of_vllm(tmp_path: Path) -> None:
    (line,) = check_servers(adapter(tmp_path, rank=20), ["vllm"], offline=True)
    assert line.endswith("started with --max-lora-rank 32")


@pytest.mark.parametrize(
    ("changes", "server", "said"),
    [
        ({"use_rslora": True}, "sglang", "divides alpha by the rank"),
        ({"alpha_pattern": {"q_proj": 16}}, "vllm", "scale 2 of 14 modules wrongly"),
        ({"alpha_pattern": {"q_proj": 16}}, "sglang", "refuses .* which 2 of 14 modules have"),
    ],
)
def test_another_scale_is_refused(changes: dict[str, Any], server: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{SERVERS[server].title} .*{said}"):
        check_servers(adapter(tmp_path, **changes), [server], offline=True)


@pytest.mark.parametrize(
    "targets", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"), ("gate_proj",), ("o_proj",)]
)
def test_linears_that_sglang_fuses_may_be_these(targets: tuple[str, ...], tmp_path: Path) -> None:
    assert check_servers(adapter(tmp_path, targets=targets), ["sglang"], offline=True)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_proj", "k_proj"), "`q_proj` without `v_proj`: 2 of 4"),
        (("k_proj",), "`k_proj` without `q_proj`: 2 of 2"),
        (("v_proj", "up_proj"), "`v_proj` without `q_proj`: 2 of 4"),
        (("v_proj", "up_proj"), "`up_proj` without `gate_proj`: 2 of 4"),
    ],
)
def test_a_part_that_sglang_does_not_load_alone(targets: tuple[str, ...], said: str, tmp_path: Path) -> None:
    path = adapter(tmp_path, targets=targets)
    with pytest.raises(RunError, match=f"SGLang does not load {said}"):
        check_servers(path, ["sglang"], offline=True)
    assert check_servers(path, ["vllm"], offline=True)


def test_rslora_is_scaled_by_vllm(tmp_path: Path) -> None:
    assert check_servers(adapter(tmp_path, rslora=True), ["vllm"], offline=True)


def test_a_rank_above_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="takes ranks up to 512"):
        check_servers(adapter(tmp_path, rank=600), ["vllm"], offline=True)


def test_names_that_a_server_does_not_look_for_are_counted(tmp_path: Path) -> None:
    """PEFT saves `default` into the names where a whole model is saved; both servers would match nothing."""
    path = renamed(adapter(tmp_path), ".lora_A.weight", ".lora_A.default.weight")
    with pytest.raises(RunError, match="would load 0 of 14 modules"):
        check_servers(path, ["vllm"], offline=True)


def test_the_option_is_for_adapters(tmp_path: Path, cli: Cli) -> None:
    path, out = adapter(tmp_path), tmp_path / "out"
    done = cli("export", path, "adapter", "--output", out, "--check-for", "vllm", "--no-verify", "--offline")
    assert done.code == 0
    assert "vLLM would load 14 of 14 modules\n" in done.err
    done = cli("export", path, "merged", "--output", tmp_path / "2", "--check-for", "sglang")
    assert done.code == 2
    assert "is for adapters" in done.err
    done = cli("export", path, "adapter", "--output", tmp_path / "2", "--check-for", "tgi")
    assert done.code == 2
    assert "one of vllm, sglang" in done.err

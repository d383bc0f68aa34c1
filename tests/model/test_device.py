"""Device names: read in one way by all commands, with one message where there is no such device."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config.fields import device_name
from lorafit.config.load import load_config
from lorafit.errors import ConfigError
from lorafit.model.device import deterministic_kernels, pick_device


@pytest.fixture(params=[(0, False), (2, False), (0, True)], ids=["cpu only", "two cuda", "mps"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool]:
    num_cuda, has_mps = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    return num_cuda, has_mps


def test_names_find_their_device_or_the_error_lists_those_that_exist(machine: tuple[int, bool]) -> None:
    num_cuda, has_mps = machine
    best = "cuda" if num_cuda else "mps" if has_mps else "cpu"
    found = {"auto": best, "cpu": "cpu", " CPU ": "cpu", "Auto": best}
    found["gpu"] = best if best != "cpu" else ""
    found |= {"cuda": "cuda" if num_cuda else "", "cuda:1": "cuda:1" if num_cuda else "", "cuda:2": ""}
    found |= {"cuda:999": "", "mps": "mps" if has_mps else "", "MPS": "mps" if has_mps else ""}
    here = ["cpu", *(f"cuda:{number}" for number in range(num_cuda)), *(["mps"] if has_mps else [])]
    for name, device in found.items():
        if device:
            assert pick_device(name) == torch.device(device), name
            continue
        with pytest.raises(ConfigError, match=f"device `{name.lower()}` is not available here") as caught:
            pick_device(name)
        assert f"use auto or one of {', '.join(here)}" in caught.value.problems[0].hint


def test_a_rank_has_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the current one too: FSDP's mesh and compiled kernels ask torch for that."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("auto", "cuda", "gpu"):
        assert pick_device(name, 1) == torch.device("cuda:1")
        assert current.pop() == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="cuda:2"):
        pick_device("auto", 2)


def test_products_on_cuda_are_summed_in_float32(machine: tuple[int, bool]) -> None:
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, True)
        pick_device("auto")
        assert [getattr(matmul, name) for name in names] == [machine[0] == 0] * 2
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def test_a_torch_for_cuda_that_sees_no_gpu_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError) as caught:
        pick_device("cuda")
    assert "CUDA 13.0" in caught.value.problems[0].hint
    assert "driver" in caught.value.problems[0].hint


@pytest.mark.parametrize("has_cuda", [False, True])
def test_deterministic_kernels_are_used_in_the_block_only(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled() == has_cuda
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == has_cuda
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()


@given(
    st.sampled_from(["xpu", "meta", "cuda:x", "cuda:", "cuda:-1", "cuda:٣", "cuda:1000", "hip", "", "cpu\0"])
    | st.text(max_size=9)
)
def test_any_other_name_is_an_error_of_the_user_here_and_in_a_config(name: str) -> None:
    try:
        device_name(name)
    except ValueError:
        with pytest.raises(
            ConfigError, match="is not a device: a device is auto, cpu, gpu, cuda, cuda:N or mps"
        ):
            pick_device(name)
        with pytest.raises(ConfigError, match=r"`model\.device`"):
            load_config(None, flags={}, overrides=["model.name=m", "data.path=d", f"model.device={name!r}"])

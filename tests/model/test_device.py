"""Device names: read in one way by all commands, with one message where there is no such device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config.load import load_config
from lorafit.config.schema import device_name
from lorafit.errors import ConfigError
from lorafit.model.device import pick_device


@pytest.fixture(params=[(0, False), (2, False), (0, True)], ids=["cpu only", "two cuda", "mps"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bool]:
    num_cuda, has_mps = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda", "gpu"):
        assert pick_device(name, 1) == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="cuda:2"):
        pick_device("auto", 2)


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

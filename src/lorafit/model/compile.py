"""Compiles chains of elementwise operations into one GPU kernel each (torch.compile), if the run is long enough."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

LEAST_STEPS = 200  # compilation takes some seconds per process; a shorter run does not save as much
P = ParamSpec("P")
R = TypeVar("R")
_state = {"enabled": False}


def enable_compile(device: torch.device, num_steps: int) -> bool:
    """Decide for the rest of the process whether `compilable` functions are compiled; returns the decision."""
    has_compiler = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    _state["enabled"] = has_compiler and num_steps >= LEAST_STEPS
    return _state["enabled"]


def compilable(definition: Callable[P, R]) -> Callable[P, R]:
    """`definition`, compiled for any number of rows once `enable_compile` allows it; its first argument is a tensor."""

    @functools.cache
    def compiled() -> Any:
        return torch.compile(definition, dynamic=True, fullgraph=True)

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = (compiled() if _state["enabled"] else definition)(*args, **kwargs)
        return result

    return call

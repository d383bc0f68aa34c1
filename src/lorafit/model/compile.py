"""On a GPU a chain of elementwise operations becomes one kernel (torch.compile), where the run is long enough."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

LEAST_STEPS = 200  # compiling takes some seconds, once a process; a shorter run does not win them back
P = ParamSpec("P")
R = TypeVar("R")
_state = {"wanted": False}


def enable_compile(device: torch.device, num_steps: int) -> bool:
    """Decide for the rest of the process whether `compilable` functions are compiled; returns the decision."""
    has_compiler = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    _state["wanted"] = has_compiler and num_steps >= LEAST_STEPS
    return _state["wanted"]


def compilable(definition: Callable[P, R]) -> Callable[P, R]:
    """`definition`, compiled for any number of rows once `enable_compile` allows it; its first argument is a tensor."""

    @functools.cache
    def compiled() -> Any:
        return torch.compile(definition, dynamic=True, fullgraph=True)

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        found: R = (compiled() if _state["wanted"] else definition)(*args, **kwargs)
        return found

    return call

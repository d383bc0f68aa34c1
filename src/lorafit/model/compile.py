"""Compiles chains of elementwise operations into one GPU kernel each (torch.compile), if the run is long enough."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lorafit.redact import one_line

LEAST_STEPS = 200  # compilation takes some seconds per process; a shorter run does not save as much
# Widths, types and numbers of rows (one, several) that a process compiles a definition for; beyond it torch raises
MOST_VARIANTS = 64
P = ParamSpec("P")
R = TypeVar("R")
_state = {"enabled": False}


def enable_compile(device: torch.device, num_steps: int) -> str:
    """Decide for the rest of the process whether `compilable` functions are compiled.

    They are in a run of LEAST_STEPS on CUDA where the package triton is installed. Returns why they are not although
    this holds, else "": Triton needs a C compiler and Python's headers, which shows at the first kernel only.
    """
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    _state["enabled"] = False
    if not has_triton or num_steps < LEAST_STEPS:
        return ""
    try:
        _compiled(_twice)(torch.zeros(16, 16, device=device))
    except Exception as error:  # whatever a compiler raises, the definitions themselves compute the same
        return one_line(f"{type(error).__name__}: {error}")
    _state["enabled"] = True
    return ""


def compilable(definition: Callable[P, R]) -> Callable[P, R]:
    """`definition`, compiled once `enable_compile` allows it.

    Its first argument is a tensor with the rows first. The number of rows may vary; widths are compiled in: Triton
    then knows that rows begin at multiples of 16 bytes and reads as many at a time.
    """

    @functools.cache
    def compiled() -> Callable[P, R]:
        return _compiled(definition)

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _state["enabled"]:
            return definition(*args, **kwargs)
        for tensor in _with_rows(args):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled()(*args, **kwargs)

    return call


def _compiled(definition: Callable[P, R]) -> Callable[P, R]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    result: Callable[P, R] = torch.compile(definition, fullgraph=True)
    return result


def _with_rows(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among `args` whose first axis is that of the first one: no weights, which are (width,)."""
    rows = args[0].shape[0]
    tensors = [
        x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(x, Tensor)
    ]
    return [x for x in tensors if x.shape[0] == rows and (x.dim() > 1 or x.dtype == torch.float32)]


def _twice(x: Tensor) -> Tensor:
    return x + x

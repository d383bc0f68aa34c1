"""Compiles chains of elementwise operations into one GPU kernel each (torch.compile), if the run is long enough."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lorafit.model.memory import is_out_of_memory
from lorafit.redact import logger_of, one_line

logger = logger_of(__name__)

LEAST_STEPS = 200  # compilation takes some seconds per process; a shorter run does not save as much
# Widths, types and numbers of rows (one, several) that a process compiles a definition for; a further one is not
MOST_VARIANTS = 64
BLOCK = (
    2**23
)  # numbers of a tensor that a definition works on at a time on a GPU: its copies in float32 are bounded
_PER_COLUMN = ("weight", "factor")  # names of arguments that have no rows
P = ParamSpec("P")
R = TypeVar("R")
_state = {"enabled": False}
_failed: set[str] = set()  # names of definitions that are not compiled here


def enable_compile(device: torch.device, num_steps: int) -> str:
    """Decide for the rest of the process whether `compilable` functions are compiled.

    They are in a run of LEAST_STEPS on CUDA where the package triton is installed. Returns why they are not although
    this holds, else "": Triton needs a C compiler and Python's headers, which shows at the first kernel only.
    """
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    _state["enabled"] = False
    _failed.clear()
    if not has_triton or num_steps < LEAST_STEPS:
        return ""
    try:
        _compiled(_twice)(torch.zeros(16, 16, device=device))
    except Exception as error:  # whatever a compiler raises, the definitions themselves compute the same
        return one_line(f"{type(error).__name__}: {error}")
    _state["enabled"] = True
    return ""


def num_blocks(numel: int) -> int:
    """In how many blocks of rows of nearly equal size a tensor of `numel` numbers is computed without compilation."""
    return max(1, -(-numel // BLOCK))


def compilable(definition: Callable[P, R]) -> Callable[P, R]:
    """`definition`, compiled once `enable_compile` allows it; else computed by blocks of rows on a GPU.

    Its first argument is a tensor with the rows first, and so is what it returns. The number of rows may vary; widths
    are compiled in: Triton then knows that rows begin at multiples of 16 bytes and reads as many at a time. Where
    compilation fails, that is said once, and the definition is computed.
    """
    names = tuple(inspect.signature(definition).parameters)

    @functools.cache
    def compiled() -> Callable[P, R]:
        return _compiled(definition)

    @functools.wraps(definition)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _state["enabled"] and definition.__name__ not in _failed:
            try:
                return compiled()(*args, **kwargs)
            except Exception as error:  # whatever a compiler raises
                if is_out_of_memory(error):
                    raise
                _failed.add(definition.__name__)
                why = one_line(f"{type(error).__name__}: {error}")
                logger.warning("%s is not compiled here, torch computes it: %s", definition.__name__, why)
        x: Any = args[0]
        count = num_blocks(x.numel()) if x.is_cuda else 1
        if count == 1:
            return definition(*args, **kwargs)
        rows = -(-len(x) // count)
        whole: list[Tensor] = []
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            own: Any = [
                arg if name in _PER_COLUMN else _part(arg, part)
                for name, arg in zip(names, args, strict=False)
            ]
            result: Any = definition(*own, **kwargs)
            outs = (result,) if isinstance(result, Tensor) else result
            whole = whole or [out.new_empty(len(x), *out.shape[1:]) for out in outs]
            for into, out in zip(whole, outs, strict=True):
                into[part] = out
        return whole[0] if isinstance(result, Tensor) else tuple(whole)  # type: ignore[return-value]

    return call


def _compiled(definition: Callable[P, R]) -> Callable[P, R]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    compiled: Callable[P, R] = torch.compile(definition, fullgraph=True)
    names = tuple(inspect.signature(definition).parameters)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with_rows = (arg for name, arg in zip(names, args, strict=False) if name not in _PER_COLUMN)
        for tensor in _tensors(with_rows):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*args, **kwargs)

    return call


def _part(value: Any, rows: slice) -> Any:
    """These rows of a tensor, or of each tensor of a tuple; another value as it is."""
    if isinstance(value, tuple):
        return tuple(_part(each, rows) for each in value)
    return value[rows] if isinstance(value, Tensor) else value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from (x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor))


def _twice(x: Tensor) -> Tensor:
    return x + x

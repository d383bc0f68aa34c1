"""Selects the device and the number type of a run, and describes the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.config.fields import device_name
from lorafit.errors import ConfigError
from lorafit.model.dtypes import DTYPES
from lorafit.observe.units import count
from lorafit.redact import logger_of

logger = logger_of(__name__)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA, then Apple MPS, then the CPU; `gpu` is CUDA, then MPS. A named device must exist.

    `cuda` without a number is the device of `local_rank`, if there are several processes on the host. A numbered CUDA
    device becomes the current one. Raises ConfigError, which names the devices of this machine.
    """
    try:
        wanted = device_name(name)
    except ValueError as error:
        raise ConfigError(f"`{name}` is not a device: {error}") from None
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if wanted in ("auto", "gpu"):
        wanted = "cuda" if num_cuda else "mps" if has_mps else "cpu" if wanted == "auto" else "gpu"
    if wanted == "cuda" and local_rank is not None:
        wanted = f"cuda:{local_rank}"
    kind, _, index = wanted.partition(":")
    if not {"cpu": True, "cuda": int(index or 0) < num_cuda, "mps": has_mps}.get(kind, False):
        here = ["cpu", *(f"cuda:{number}" for number in range(num_cuda)), *(["mps"] if has_mps else [])]
        hint = "" if num_cuda or has_mps else f"; {_without_gpu()}"
        raise ConfigError(
            f"device `{wanted}` is not available here",
            hint=f"use auto or one of {', '.join(here)}{hint}",
        )
    device = torch.device(wanted)
    if device.type == "cuda":
        _use_cuda(device)
    return device


def _without_gpu() -> str:
    """What to do where torch sees no GPU."""
    if torch.version.cuda is not None:
        return (
            f"this torch is for CUDA {torch.version.cuda} and sees no GPU: `nvidia-smi` shows the driver and the CUDA "
            "version that it supports, which must not be lower; install a newer driver or a torch for an older CUDA"
        )
    return "for a GPU, install a torch build for it (`lorafit doctor`)"


def _use_cuda(device: torch.device) -> None:
    """Make `device` the one of the process, and let products of 16-bit numbers be summed in float32."""
    if device.index is not None:  # FSDP's mesh and compiled kernels use the current device
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside the block, if `wanted`, CUDA computes the same bits in every run, at some cost. The CPU does in any case.

    Torch looks for the setting of cuBLAS at the first product of the process: call this before it.
    """
    if not wanted or not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # nothing here reads new memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def pick_dtype(name: str, device: torch.device, fits_float16: bool = True) -> torch.dtype:
    """`auto` is bfloat16 if the hardware multiplies it, float16 on older CUDA chips, else float32.

    A network whose activations do not fit into float16 has float32 in its place. Raises ConfigError.
    """
    if name != "auto":
        if DTYPES[name] == torch.float16 and not fits_float16:
            message = "activations of this model exceed the largest number of float16"
            raise ConfigError(message, place="model.dtype", hint="use bfloat16 or float32")
        if device.type == "mps" and name == "float64":
            raise ConfigError("MPS has no float64", place="model.dtype", hint="use float32")
        return DTYPES[name]
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16
        if not fits_float16:
            logger.warning("note: activations of this model exceed float16, so it is computed in float32")
            return torch.float32
        return torch.float16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")  # Arm reports "bf16"
        return torch.bfloat16 if any(capabilities.get(name) for name in native) else torch.float32
    return torch.float32


def uploaded(values: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of an array on a device. CUDA copies it from pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(values).to(dtype)
    is_cuda = device.type == "cuda"
    return (tensor.pin_memory() if is_cuda else tensor).to(device, non_blocking=is_cuda)


def describe(device: torch.device) -> str:
    """A device in words: its name, and its memory if it has its own."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name")
        return f"CPU, {count(torch.get_num_threads(), 'thread')}" + (f", {name}" if name else "")
    return device.type.upper()


def device_memory_bytes(device: torch.device) -> int | None:
    """Peak memory that this process allocated on the device; None for a device without its own memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

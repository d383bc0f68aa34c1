"""Selects the device and the number type of a run, and describes the device."""

from __future__ import annotations

import torch

from lorafit.config.schema import device_name
from lorafit.errors import ConfigError
from lorafit.model.dtypes import DTYPES
from lorafit.observe.units import count
from lorafit.redact import logger_of

logger = logger_of(__name__)


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA, then Apple MPS, then the CPU; `gpu` is CUDA, then MPS. A named device must exist.

    `cuda` without a number is the device of `local_rank`, if there are several processes on the host. Raises
    ConfigError, which names the devices of this machine.
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
        hint = "" if num_cuda or has_mps else "; for a GPU, install a torch build for it (`lorafit doctor`)"
        raise ConfigError(
            f"device `{wanted}` is not available here",
            hint=f"use auto or one of {', '.join(here)}{hint}",
        )
    return torch.device(wanted)


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

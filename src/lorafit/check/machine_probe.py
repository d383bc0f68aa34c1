"""What torch finds on this machine, as one line of JSON: `python -m lorafit.check.machine_probe`, for the doctor.

A process of its own: a broken torch or driver can end or stop it, and the doctor still reports.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from lorafit.model import native
from lorafit.model.device import describe, pick_device, pick_dtype
from lorafit.model.dtypes import dtype_name
from lorafit.model.memory import available_bytes


def probe() -> dict[str, Any]:
    """Device, number type, memory and kernels. The kernels are not compiled, only a small program."""
    device = pick_device("auto")
    is_cached = native.is_cached()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device.type,
        "name": describe(device),
        "dtype": dtype_name(pick_dtype("auto", device)),
        "device_bytes": available_bytes(device),
        "memory_bytes": available_bytes(torch.device("cpu")),
        "kernels_cached": is_cached,
        "kernels_missing": "" if is_cached else native.trial(),
    }


if __name__ == "__main__":
    print(json.dumps(probe()))

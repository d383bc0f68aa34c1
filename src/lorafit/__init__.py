"""lorafit: fine-tune Llama-family models with LoRA on instruction data.

The import of the package is fast: the first call that needs torch imports it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from lorafit.version import __version__ as __version__

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "LorafitError",
    "ModelError",
    "RunError",
    "TrainingError",
    "generate",
    "load",
    "train",
]

# Before torch loads libgomp, which reads it. Its threads wait for each other in a loop of this many turns, 300,000 by
# default, and then sleep. A loop takes time from the thread that it waits for, if another program runs too.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

if TYPE_CHECKING:
    from lorafit.api import generate, load, train
    from lorafit.config.schema import Config
    from lorafit.errors import ConfigError, DataError, LorafitError, ModelError, RunError, TrainingError

_HOME = {"Config": "lorafit.config.schema", **dict.fromkeys(("generate", "load", "train"), "lorafit.api")}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorafit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "lorafit.errors")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

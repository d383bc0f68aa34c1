"""The table of models: what is supported, and what a training of 1,000 rows needs on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lorafit.config.schema import Config
from lorafit.distributed.env import ProcessEnv
from lorafit.model.attention import way_on_device
from lorafit.model.device import pick_device, pick_dtype
from lorafit.model.linear import matmul
from lorafit.observe.units import duration, memory_size
from lorafit.plan.calibrate import PRODUCT_ROWS, USUAL_EFFICIENCY, best_seconds
from lorafit.plan.cost_model import Shape
from lorafit.plan.known_models import KNOWN, KnownModel
from lorafit.plan.machine import Machine
from lorafit.plan.predict import predict_memory
from lorafit.plan.workload import Workload

ROWS, TOKENS = 1000, 200
HEADERS = ["model", "model type", "size", "train", "int8", "GGUF"]
_WIDTH = 2048  # of the matrix whose product is measured


def table_rows(models: Sequence[KnownModel] = KNOWN) -> list[list[str]]:
    """The columns of HEADERS for each model; the same on every machine."""
    return [
        [
            f"{model.owner}/{model.name}",
            model.model_type,
            f"{model.billions:.3g}B",
            *("yes" if has else "no" for has in (model.is_supported, model.is_supported, model.has_gguf)),
        ]
        for model in models
    ]


def here(models: Sequence[KnownModel]) -> list[list[str]]:
    """For each model: whether it fits this machine, its memory, and the time of 1,000 rows of 200 tokens, once each."""
    machine = Machine.read(pick_device("auto"), ProcessEnv.read())
    seconds = {dtype: _seconds_per_weight(machine.device, dtype) for dtype in _dtypes(machine.device)}
    return [_here(model, machine, seconds) if model.is_supported else ["no", "", ""] for model in models]


def _dtypes(device: torch.device) -> set[torch.dtype]:
    return {pick_dtype("auto", device, fits) for fits in (True, False)}


def _here(model: KnownModel, machine: Machine, seconds: dict[torch.dtype, float]) -> list[str]:
    config = Config.model_validate({"model": {"name": model.name}, "data": {"path": "rows"}})
    arch = model.architecture()
    dtype = pick_dtype("auto", machine.device, arch.family.fits_float16)
    needed = {}
    for quantize in ("none", "int8"):
        shape = Shape(
            arch=arch,
            width=dtype.itemsize,
            quantize=quantize,
            adapted=tuple(frozenset(dict(arch.linears(layer))) for layer in range(arch.num_hidden_layers)),
            rank=config.lora.rank,
            dropout=config.lora.dropout > 0,
            recompute=True,
            attention="kernel"
            if machine.device.type == "cpu"
            else way_on_device(machine.device, dtype, arch.head_dim),
        )
        memory = predict_memory(shape, _workload(), machine.device, machine.resident_bytes)
        needed[quantize] = memory.total
    available = machine.available_bytes
    fitting = [name for name, size in needed.items() if available is None or size <= available]
    word = "no" if not fitting else "yes" if fitting[0] == "none" else "in int8"
    weights = (
        arch.num_linear_weights + arch.hidden_size * arch.vocab_size // 2
    )  # the head: of the answers only
    total = ROWS * TOKENS * weights * 3 * seconds[dtype] / USUAL_EFFICIENCY
    return [word, memory_size(needed[fitting[0] if fitting else "int8"]), f"about {duration(total)}"]


def _workload() -> Workload:
    """Passes of ten rows, half of whose tokens are supervised."""
    tokens = 10 * TOKENS
    return Workload(
        steps=1,
        tokens_per_epoch=ROWS * TOKENS,
        supervised_per_epoch=ROWS * TOKENS // 2,
        tokens=ROWS * TOKENS,
        supervised=ROWS * TOKENS // 2,
        passes=np.array([[tokens, tokens // 2, 0, 0]], np.float64),
        pack_of=[()],
        weight=1.0,
        most_in_a_step=1,
        longest_row=TOKENS,
        shared=0.0,
    )


def _seconds_per_weight(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds per weight and token of one product."""
    x = torch.ones(PRODUCT_ROWS, _WIDTH, dtype=dtype, device=device)
    weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype, device=device)
    return best_seconds(lambda: matmul(x, weight), device) / (PRODUCT_ROWS * _WIDTH * _WIDTH)


def markdown() -> str:
    """docs/models.md."""
    lines = [" | ".join(HEADERS), " | ".join(["---"] * len(HEADERS)), *map(" | ".join, table_rows())]
    table = "\n".join(f"| {line} |" for line in lines)
    return _PAGE.format(table=table)


_PAGE = """# Models

lorafit trains every model of these types, also those that the table does not name. Type a name as it is on
the Hugging Face hub. `lorafit models` adds what a model needs on your machine, and `lorafit models
SmolLM3-3B` explains one. A model type that lorafit does not train is refused, with the nearest supported
model of its size.

{table}

Of Gemma 3 4B, Ministral 3 and Qwen3.5 the text model is trained. The tensors of the towers for images, and of
the layers that predict several tokens (`mtp`), are left out and counted, and a merged model has them as the
base has them. The adapter has the names of the whole network (`model.language_model.layers...`), which PEFT
and vLLM load for its class. [Hybrids](hybrids.md) explains LFM2 and Qwen3.5.

The time in `lorafit models` is for 1,000 rows of 200 tokens, once each. It comes from one product that is
measured on the machine, and is an estimate: `lorafit plan` measures the real model on your rows.

<!-- written by `lorafit models --markdown` -->
"""

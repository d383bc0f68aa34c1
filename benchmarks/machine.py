"""The machine's rate of matrix products on a model's weight shapes: the upper limit of any training program.

    python benchmarks/machine.py MODEL_FOLDER [--tokens 2048] [--threads 2]

Prints one JSON object: for each type the rate in GFLOP/s of the forward product, of the input gradient, and of both
together. A rate is the FLOPs of all linear layers of one decoder layer, divided by the sum of their median times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PASSES = {"bfloat16": 5, "int8": 5, "float32": 2}  # no target uses float32, and its passes are slow


def linear_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(out_features, in_features) of the seven linear layers of one decoder layer, from a Hugging Face config.json."""
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q_width, kv_width = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    attention = [(q_width, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, q_width)]
    return [*attention, (ffn, hidden), (ffn, hidden), (hidden, ffn)]


def measure(config: Mapping[str, Any], num_tokens: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by type and direction: `forward`, `input_gradient` and `both`."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, dtype=dtype)
        return torch.randn(shape).to(dtype)

    def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch._int_mm(x, weight.T)

    rates = {}
    for name, passes in PASSES.items():
        dtype: torch.dtype = getattr(torch, name)
        is_int8 = dtype == torch.int8
        seconds = {"forward": 0.0, "input_gradient": 0.0}
        flops = 0
        for out_features, in_features in linear_shapes(config):
            weight = tensor(out_features, in_features, dtype=dtype)
            x = tensor(num_tokens, in_features, dtype=dtype)
            grad_output = tensor(num_tokens, out_features, dtype=dtype)
            linear = int8_linear if is_int8 else F.linear
            product = torch._int_mm if is_int8 else torch.mm
            linear(x[:64], weight), product(grad_output[:64], weight)  # warm-up
            seconds["forward"] += median_seconds(linear, x, weight, passes)
            seconds["input_gradient"] += median_seconds(product, grad_output, weight, passes)
            flops += 2 * num_tokens * out_features * in_features
        rates[name] = {way: flops / duration / 1e9 for way, duration in seconds.items()}
        rates[name]["both"] = 2 * flops / sum(seconds.values()) / 1e9
    return rates


def median_seconds(product: Callable[[Any, Any], Any], left: Any, right: Any, passes: int) -> float:
    """Median wall time of `product(left, right)`."""
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        product(left, right)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with a config.json")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    config = json.loads((arguments.model / "config.json").read_text())
    print(json.dumps(measure(config, arguments.tokens)))


if __name__ == "__main__":
    main()

"""Times of the compiled CPU kernels and of torch's operators, at TinyLlama's shapes.

    python -m benchmarks.kernels [--threads 2] [--json FILE]

The two of each pair run alternately in one process. The times are medians of the processor time of all threads,
divided by the number of threads, so that other work on the machine has little effect. Attention is one layer, forward
and backward, over 2,048 packed tokens in ten documents. Products are those of a layer's weights with 2,048 tokens,
with scaling and rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.model.attention import PackedDocuments, causal_attention, rotate
from lorafit.model.native import kernels, missing
from lorafit.model.ops import rms_norm, swiglu, swiglu_backward
from lorafit.model.quant import Int8Linear

LENGTHS = [234, 180, 300, 120, 77, 410, 205, 190, 33, 299]
HEADS, KV_HEADS, SIZE = 32, 4, 64
WEIGHTS = [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)]  # (out_features, in_features)


def attention(compiled: bool) -> Callable[[], object]:
    """Attention of one layer, forward and backward: compiled, or torch's operator per document."""
    generator = torch.Generator().manual_seed(0)
    documents = PackedDocuments(LENGTHS)
    angles = documents.positions[:, None] * torch.rand(SIZE // 2, generator=generator)
    rotary = (angles.cos(), angles.sin())
    q, k, v, grad_output = (
        torch.randn(sum(LENGTHS), heads, SIZE, generator=generator).bfloat16()
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def by_torch() -> Tensor:
        parts = (x.split(LENGTHS) for x in (rotate(q, rotary), rotate(k, rotary), v))
        return torch.cat([causal_attention(*document, None) for document in zip(*parts, strict=True)])

    def run() -> None:
        out = documents(0, q, k, v, rotary, None) if compiled else by_torch()
        torch.autograd.grad(out, (q, k, v), grad_output)

    return run


def products(quantized: bool) -> Callable[[], object]:
    """The products of all weights of a layer, forward and input gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).bfloat16() * 0.02 for shape in WEIGHTS]
    xs = [torch.randn(2048, shape[1], generator=generator).bfloat16() for shape in WEIGHTS]
    grad_outputs = [torch.randn(2048, shape[0], generator=generator).bfloat16() for shape in WEIGHTS]
    linears = [Int8Linear(weight) for weight in weights]

    def run() -> None:
        for weight, linear, x, grad_output in zip(weights, linears, xs, grad_outputs, strict=True):
            if quantized:
                linear.product(x)
                linear.input_gradient(grad_output)
            else:
                F.linear(x, weight)
                grad_output @ weight

    return run


def rows(compiled: bool) -> Callable[[], object]:
    """RMS norm, SwiGLU and the gradient of SwiGLU."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2048, 2048, generator=generator).bfloat16(), torch.ones(2048).bfloat16()
    gate, up, grad_output = (torch.randn(2048, 5632, generator=generator).bfloat16() for _ in range(3))

    def by_torch() -> None:
        wide = x.float()
        (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight).bfloat16()
        gated = torch.sigmoid(gate.float())
        (F.silu(gate.float()) * up).bfloat16()
        (grad_output.float() * up * gated * (1 + gate.float() * (1 - gated))).bfloat16()
        (grad_output.float() * gate.float() * gated).bfloat16()

    def run() -> None:
        if compiled:
            rms_norm(x, weight, 1e-5)
            swiglu(gate, up)
            swiglu_backward(grad_output.clone(), gate, up)
        else:
            by_torch()

    return run


PAIRS = {
    "attention: compiled, torch per document": attention,
    "products of a layer: int8, bfloat16": products,
    "norm and SwiGLU: compiled, torch": rows,
}


def measure(make: Callable[[bool], Callable[[], object]], runs: int) -> tuple[float, float]:
    """Median milliseconds of the two of a pair, which run alternately after a warm-up."""
    both = (make(True), make(False))
    milliseconds: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for run, times in zip(both, milliseconds, strict=True):
            started = time.process_time()
            run()
            if number:
                times.append(1000 * (time.process_time() - started) / torch.get_num_threads())
    return statistics.median(milliseconds[0]), statistics.median(milliseconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compiled = kernels()
    if compiled is None:
        raise SystemExit(f"error: the compiled kernels are not available: {missing()}")
    tiles = "with" if compiled.has_tiles else "without"
    print(
        f"{arguments.threads} threads, {tiles} matrix tiles; medians of {arguments.runs} runs, milliseconds"
    )
    medians = {}
    for name, make in PAIRS.items():
        first, second = medians[name] = measure(make, arguments.runs)
        print(f"{name:<60}{first:>8.1f}{second:>8.1f}{second / first:>7.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

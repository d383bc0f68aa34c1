"""Predicts the seconds of a training step on a GPU without one: every operation of a fake step through a small model.

    python -m benchmarks.gpu_model [--chip H100|H200|T4] [--tokens 2048] [--quantize none|int8|fp8] [--plain]

The figures are predicted, not measured; take them as +-20 %. The step is of TinyLlama's shape, r=16 on all linears,
rows of 150 tokens. Assumptions: a product is the best of a few tile shapes in waves over the multiprocessors, at a
share of their peak; all else is its bytes at a share of the bandwidth; attention is 2.5 times its bytes; no kernel is
shorter than a floor; the host issues one operation in 6 microseconds, a compiled one in 22, one of Triton in 15. Each
Triton kernel reads or writes each of its tensors once. A step of one layer and one
of two are computed, and the difference stands for each further layer. It needs Linux and a C++ compiler.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report import table

PRODUCTS = ("mm", "addmm", "addmm_", "_int_mm", "_scaled_mm")
EIGHT_BITS = ("_int_mm", "_scaled_mm")
TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (64, 64))
LAYERS = 22
HOST_SECONDS = 6e-6
HOST_SECONDS_OF = {"compiled": 22e-6, "triton": 15e-6}  # by the first word of an operation's name


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak FLOP/s in 16 and 8 bits and the share that a large product reaches; bytes/s and their share."""

    capability: tuple[int, int]
    dtype: str
    peak: float
    peak_of_8_bits: float
    reached: float
    processors: int
    bandwidth: float
    bandwidth_reached: float
    floor: float  # seconds of the shortest kernel

    def bytes_seconds(self, num_bytes: float) -> float:
        """Seconds that moving bytes takes."""
        return num_bytes / (self.bandwidth * self.bandwidth_reached)


CHIPS = {
    "H100": Chip((9, 0), "bfloat16", 989e12, 1979e12, 0.72, 132, 3.35e12, 0.85, 2.2e-6),
    "H200": Chip((9, 0), "bfloat16", 989e12, 1979e12, 0.78, 132, 4.8e12, 0.88, 2.2e-6),
    "T4": Chip((7, 5), "float16", 65e12, 130e12, 0.42, 40, 320e9, 0.78, 3e-6),
}


def product_seconds(chip: Chip, rows: int, columns: int, depth: int, num_bytes: int, *, bits8: bool) -> float:
    """Seconds of a product (rows, depth) x (depth, columns)."""
    peak = chip.peak_of_8_bits if bits8 else chip.peak
    of_processor = peak * chip.reached / chip.processors
    best = math.inf
    for (high, wide), split in itertools.product(TILES, (1, 2, 4, 8)):
        if split > 1 and depth // split < 64:
            continue
        waves = -(-(-(-rows // high) * -(-columns // wide) * split) // chip.processors)
        weak = 1.0 if high * wide >= 128 * 128 else 0.75 if high * wide >= 64 * 128 else 0.5
        seconds = waves * 2 * high * wide * -(-depth // split) / (of_processor * weak)
        seconds += chip.bytes_seconds(2 * rows * columns * 4 * split) if split > 1 else 0.0
        best = min(best, seconds)
    return max(best, chip.bytes_seconds(num_bytes)) + 1e-6


def record_seconds(chip: Chip, record: Any) -> float:
    """Seconds of one operation of a fake step (tests/gpu/fake.py)."""
    if not record.launches:
        return 0.0
    if record.flops and record.name in PRODUCTS:
        shapes = [shape for shape in record.shapes if len(shape) == 2]
        one, other = shapes[-2:] if record.name.startswith("addmm") else shapes[:2]
        rows, depth = one
        columns = other[1] if other[0] == depth else other[0]
        return product_seconds(chip, rows, columns, depth, record.num_bytes, bits8=record.name in EIGHT_BITS)
    if "attention" in record.name:
        return chip.bytes_seconds(record.num_bytes) * 2.5 + record.launches * chip.floor
    return max(chip.bytes_seconds(record.num_bytes), record.launches * chip.floor)


def group(record: Any) -> str:
    """What an operation belongs to, in the table."""
    if record.name in PRODUCTS:
        sides = [side for shape in record.shapes if len(shape) == 2 for side in shape]
        return "frozen products" if min(sides) > 64 else "low-rank products"
    if record.name.startswith(tuple(HOST_SECONDS_OF)):
        return f"{record.name.partition(' ')[0]} kernels"
    if "attention" in record.name:
        return "attention"
    if record.name.startswith("_foreach") or record.name == "linalg_vector_norm":
        return "optimizer"
    if record.wait:
        return "copies to and from the device"
    return "other operations"


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step: seconds of the device by group, of the host, launches, bytes and FLOPs."""

    parts: Counter[str]
    host: float
    launches: int
    num_bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        """The slower of the two."""
        return max(sum(self.parts.values()), self.host)


def predict(chip: Chip, tokens: int, quantize: str = "none", *, triton: bool = True) -> Prediction:
    """A step of `tokens` tokens in one pass, with the package triton or without it."""
    import torch
    from tests.gpu.fake import compiled_as_one, fake_cuda
    from tests.gpu.kernels import counted
    from tests.gpu.networks import TINYLLAMA, empty_network, rows_of, train_step, trainable

    from lorafit.data.packing import Packer
    from lorafit.model.adamw import AdamW
    from lorafit.model.fused_layer import fuse_layers

    found = []
    for layers in (1, 2):
        with ExitStack() as stack:
            gpu = stack.enter_context(fake_cuda(chip.capability))
            stack.enter_context(compiled_as_one(gpu, triton))
            config = {**TINYLLAMA, "num_hidden_layers": layers}
            network = empty_network(config, getattr(torch, chip.dtype), quantize)  # type: ignore[arg-type]
            if triton:
                stack.enter_context(counted(gpu))
                fuse_layers(network)
            optimizer = AdamW(trainable(network), 0.0)
            packs = Packer(tokens).packs(rows_of(tokens))
            train_step(network, optimizer, packs)
            gpu.records.clear()
            train_step(network, optimizer, packs)
            found.append(_sum(chip, gpu.records))
    one, two = found
    # one more layer is the difference of the two; the last one computes supervised rows only
    more = LAYERS - 1
    parts = Counter(
        {name: one.parts[name] + more * (two.parts[name] - one.parts[name]) for name in two.parts}
    )
    numbers = {
        name: getattr(one, name) + more * (getattr(two, name) - getattr(one, name))
        for name in ("host", "launches", "num_bytes", "flops")
    }
    return replace(one, parts=parts, **numbers)


def _sum(chip: Chip, records: Any) -> Prediction:
    parts: Counter[str] = Counter()
    host = 0.0
    norms = [record for record in records if record.name == "linalg_vector_norm"]
    for number, record in enumerate(
        norms
    ):  # torch takes those of real tensors 36 per launch, of fake ones singly
        record.launches = int(number % 36 == 0)
    for record in records:
        parts[group(record)] += record_seconds(chip, record)
        host += HOST_SECONDS_OF.get(record.name.partition(" ")[0], HOST_SECONDS) if record.launches else 0.0
    sums = (sum(getattr(record, name) for record in records) for name in ("launches", "num_bytes", "flops"))
    return Prediction(parts, host, *sums)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS, default="H100")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--quantize", choices=("none", "int8", "fp8"), default="none")
    parser.add_argument("--plain", action="store_true", help="without the package triton")
    given = parser.parse_args()
    importlib.import_module("tests.gpu.guard")  # before torch
    found = predict(CHIPS[given.chip], given.tokens, given.quantize, triton=not given.plain)
    rows = [[name, f"{seconds * 1e3:.1f}"] for name, seconds in found.parts.most_common()]
    print(table(["predicted, ms per step", given.chip], [*rows, ["host", f"{found.host * 1e3:.1f}"]]))
    peak = found.flops / found.seconds / CHIPS[given.chip].peak
    print(
        f"predicted: {given.tokens / found.seconds:,.0f} tokens/s, {peak:.0%} of peak; {found.launches:,} launches, "
        f"{found.num_bytes / 1e9:.0f} GB"
    )


if __name__ == "__main__":
    main()

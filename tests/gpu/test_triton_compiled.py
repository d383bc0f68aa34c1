"""The Triton kernels compiled for chips that are not here, as a step of TinyLlama's shape starts them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.model import gpu_ops

triton = pytest.importorskip("triton", reason="needs the package triton")
pytestmark = pytest.mark.slow
CHIPS = {75: torch.float16, 80: torch.bfloat16, 89: torch.bfloat16, 90: torch.bfloat16}
KINDS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
}
# loads of one number per program: tables, factors of a row, the logit of a target
NARROW = {"rms_norm_backward": 1, "rotate_apart": 1, "rotate_together": 3, "spread": 2, "cross_entropy": 2}


def launches(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What the operations start for 64 tokens of TinyLlama's shape."""
    found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def record(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found.append((name, arguments, constants))

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_ops, "launch", record)
        x, weight, rstd, room = empty(64, 2048), empty(2048), empty(64, of=torch.float32), empty(64, 2096)
        gpu_ops.rms_norm(x, weight, 1e-5, 0.0, room[:, :2048])
        gpu_ops.rms_norm_backward(x, x, weight, rstd, 0.0, x, room[:, :2048], x)
        gates, wide = empty(64, 11264), empty(64, 11296)
        gate, up = gates[:, :5632], gates[:, 5632:]
        gpu_ops.swiglu(gate, up)
        slope = empty(64, 5632)
        gpu_ops.swiglu_backward(slope, gate, up, wide[:, :5632], wide[:, 5632:11264], slope)
        index = empty(64, of=torch.int64)
        angles = empty(64, 32, of=torch.float32), empty(64, 32, of=torch.float32)
        norms = gpu_ops.HeadNorms((empty(64), empty(64)), 1e-6, 0.0)
        for own, repeats in ((None, 1), (norms, 1), (None, 8)):
            heads = empty(64, 32, 64), empty(64, 4 * repeats, 64), empty(64, 4 * repeats, 64)
            gpu_ops.rotate_apart(empty(64, 2560), angles, 32, 4, index, own, repeats)
            gpu_ops.rotate_together(
                heads, angles, (index, index), room, own, own and empty(64, 2560), repeats
            )
        gpu_ops.spread(x, index, index)
        gpu_ops.dropout(room[:, :2048], 0.1, 2**61, x)
        sources = [empty(16, 2048, of=torch.float32), empty(5632, 16, of=torch.float32)]
        buffer = empty(5648, 2064)
        gpu_ops.fill(sources, [buffer[5632:, :2048], buffer[:5632, 2048:]])
        gpu_ops.cross_entropy(empty(64, 32000), index, True, None)
    yield from found


def compiled(capability: int, name: str, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """One kernel for a chip, specialised as at a launch: multiples of 16 are known as such."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorafit.model import triton_kernels

    kernel = getattr(triton_kernels, name)
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    options = {"enable_fp_fusion": True} | {
        key: constants.pop(key) for key in ("num_warps",) if key in constants
    }
    if "wide" in constants:
        constants["wide"] = triton.language.float32

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(each, (*path, number)) for number, each in enumerate(value))
        if value is None:
            fixed[path] = None
            return "constexpr"
        if isinstance(value, int) and (value % 16 or value > 2**31):
            return "i32" if value < 2**31 else "i64"
        aligned[path] = [["tt.divisibility", 16]]
        return "i32" if isinstance(value, int) else f"*{KINDS[value.dtype]}"

    names = list(kernel.arg_names)
    for number, argument in enumerate(arguments):
        signature[names[number]] = type_of(argument, (number,))
    for key, value in constants.items():
        signature[key] = "constexpr"
        fixed[(names.index(key),)] = value
    source = ASTSource(kernel, {key: signature[key] for key in names}, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    "capability",
    [
        75,
        80,
        pytest.param(
            89,
            marks=pytest.mark.skipif(
                not os.environ.get("LORAFIT_LONG"), reason="near to 80; `make gpu-fake` compiles for it"
            ),
        ),
        90,
    ],
)
def test_kernels_compile_without_spills_and_read_16_bytes_at_a_time(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.nvidia.compiler import get_ptxas

    program = get_ptxas(capability).path
    for name, arguments, constants in launches(CHIPS[capability]):
        ptx = compiled(capability, name, arguments, constants).asm["ptx"]
        file = tmp_path / f"{name}.ptx"
        file.write_text(ptx)
        (chip,) = re.findall(r"\.target (sm_\w+)", ptx)
        assert chip.startswith(f"sm_{capability}")
        command = [program, "-v", f"--gpu-name={chip}", file, "-o", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stderr
        assert done.returncode == 0, said
        assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], name
        loads = re.findall(r"ld\.global\S*", ptx)
        narrow = [load for load in loads if ".v4.b32" not in load]
        assert len(narrow) == NARROW.get(name, 0) < len(loads), (name, loads)

"""The compiled kernels against their definition in torch, and the definition against autograd."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tests.waiting import HANGS
from torch import Tensor

from lorafit.model import attention, native, ops
from lorafit.model import compile as compile_module
from lorafit.model.attention import PackedDocuments, Rotary
from lorafit.model.llama import rotary_table
from lorafit.model.rope import Rope

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
needs_compiler = pytest.mark.skipif(native.kernels() is None, reason=native.missing())


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs a function with the torch definitions, whatever the machine has."""

    def run(function: Callable[..., object], *arguments: object) -> object:
        with monkeypatch.context() as patch:
            for module in (ops, attention):
                patch.setattr(module, "fits", lambda *tensors: False)
            return function(*arguments)

    return run


def close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of `dtype`, once."""
    eps = 2e-6 if dtype == torch.float32 else 2.0**-8
    scale = exact.double().abs().max().item() or 1.0
    torch.testing.assert_close(got.double(), exact.double(), rtol=eps, atol=eps * scale / 50)


def rows(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@needs_compiler
@DTYPES
@torch.inference_mode()
def test_a_scaled_sum_is_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = rows(dtype, 5, 70), rows(dtype, 5, 70, scale=3)
    assert torch.equal(ops.add_scaled(x, y, 1), x + y)
    close(ops.add_scaled(x, y, 0.22), x.double() + 0.22 * y.double(), dtype)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("shape", [(1, 9), (3, 7), (5, 64), (37, 200)])
def test_row_kernels_equal_their_definition(
    dtype: torch.dtype, shape: tuple[int, int], by_torch: Callable[..., object]
) -> None:
    torch.manual_seed(0)
    x, y, z, weight = (
        rows(dtype, *shape, scale=3),
        rows(dtype, *shape),
        rows(dtype, *shape),
        rows(dtype, shape[1]),
    )

    def everything() -> list[Tensor]:
        normed, rstd = ops.rms_norm(x, weight, 1e-5)
        return [
            normed,
            rstd,
            ops.rms_norm_backward(y, x, weight, rstd),
            ops.swiglu(x, y),
            *ops.swiglu_backward(z.clone(), x, y),
            ops.column_peaks(x),
            ops.column_peaks(x, weight.float().abs()),
        ]

    wide = [t.double() for t in (x, y, z, weight)]
    compiled = everything()
    x, y, z, weight = wide
    for got, exact in zip(compiled, by_torch(everything), strict=True):  # type: ignore[call-overload]
        close(got, exact, dtype)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("grad_output", [True, False])
def test_cross_entropy_equals_its_definition(
    dtype: torch.dtype, grad_output: bool, by_torch: Callable[..., object]
) -> None:
    torch.manual_seed(0)
    logits, targets = rows(dtype, 9, 301, scale=8), torch.randint(0, 301, (9,))
    logits[0, 5] = 200.0  # where a careless exponential overflows
    exact = logits.double()
    losses = ops.cross_entropy(logits, targets, grad_output)
    reference = by_torch(ops.cross_entropy, exact, targets, grad_output)
    assert isinstance(reference, Tensor)
    torch.testing.assert_close(losses.double(), reference, rtol=2e-6, atol=2e-6)
    if grad_output:
        close(logits, exact, dtype)


@needs_compiler
@DTYPES
def test_int8_kernels_equal_their_definition(dtype: torch.dtype, by_torch: Callable[..., object]) -> None:
    torch.manual_seed(0)
    x, factor = rows(dtype, 33, 70, scale=5), torch.rand(70) + 0.5
    x[4] = 0  # a row of zeros has no scale
    q, scale = ops.quantize_rows(x, factor)
    q_torch, scale_torch = by_torch(ops.quantize_rows, x, factor)  # type: ignore[misc]
    torch.testing.assert_close(scale, scale_torch)
    assert (q.int() - q_torch.int()).abs().max() <= 1  # ties may fall either way
    assert q.abs().max() == 127
    sums, columns, addend = (
        torch.randint(-(10**6), 10**6, (33, 41), dtype=torch.int32),
        torch.rand(41),
        rows(dtype, 33, 41),
    )
    for added in (None, addend):
        got, exact = torch.empty_like(addend), torch.empty_like(addend, dtype=torch.float64)
        ops.dequantize(sums, scale, columns, got, added)
        by_torch(ops.dequantize, sums, scale, columns, exact, added)
        close(got, exact, dtype)


@needs_compiler
def test_what_is_dropped_from_a_token_goes_by_its_key_and_the_kernel_and_torch_agree(
    by_torch: Callable[..., object],
) -> None:
    x, keys = torch.ones(40, 300), torch.randperm(40, generator=torch.Generator().manual_seed(0)) * 2**24 + 5
    whole = ops.dropout(x, 0.3, 2**61 + 7, keys)
    assert torch.equal(whole, by_torch(ops.dropout, x, 0.3, 2**61 + 7, keys))
    assert torch.equal(ops.dropout(x[10:20], 0.3, 2**61 + 7, keys[10:20]), whole[10:20])
    assert not torch.equal(ops.dropout(x[10:20], 0.3, 2**61 + 7), whole[10:20])


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@DTYPES
def test_dropout_is_a_function_of_its_seed(
    dtype: torch.dtype, compiled: bool, by_torch: Callable[..., object]
) -> None:
    x = torch.ones(300, 1000, dtype=dtype)

    def drop(seed: int) -> Tensor:
        out = ops.dropout(x, 0.2, seed) if compiled else by_torch(ops.dropout, x, 0.2, seed)
        assert isinstance(out, Tensor)
        return out

    one = drop(1)
    assert torch.equal(one, drop(1))
    assert not torch.equal(one, drop(2))
    assert set(one.unique().tolist()) == {0.0, float(torch.tensor(1.25).to(dtype))}
    kept = (one != 0).double()
    assert abs(kept.mean() - 0.8) < 0.004
    for axis in (0, 1):  # neither rows nor columns go together
        spread = kept.mean(axis).std() / (0.16 / kept.shape[axis]) ** 0.5
        assert 0.8 < spread < 1.2
        neighbours = torch.corrcoef(
            torch.stack(
                [
                    kept.narrow(axis, 0, kept.shape[axis] - 1).flatten(),
                    kept.narrow(axis, 1, kept.shape[axis] - 1).flatten(),
                ]
            )
        )[0, 1]
        assert abs(neighbours) < 0.01


def gradients_by_autograd(function: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    function(x).backward(grad_output)
    assert x.grad is not None
    return x.grad


def test_definitions_have_the_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    x, y, grad_output, weight = (torch.randn(6, 10, dtype=torch.float64) for _ in range(4))
    weight = weight[0]

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    normed, rstd = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(normed, norm(x))
    torch.testing.assert_close(
        ops.rms_norm_backward(grad_output, x, weight, rstd), gradients_by_autograd(norm, x, grad_output)
    )
    d_gate, d_up = ops.swiglu_backward(grad_output.clone(), x, y)
    silu = torch.nn.functional.silu
    torch.testing.assert_close(d_gate, gradients_by_autograd(lambda g: silu(g) * y, x, grad_output))
    torch.testing.assert_close(d_up, gradients_by_autograd(lambda u: silu(x) * u, y, grad_output))
    torch.testing.assert_close(ops.norm(x, weight, 1e-5), normed)
    torch.testing.assert_close(
        gradients_by_autograd(lambda x: ops.norm(x, weight, 1e-5), x, grad_output),
        gradients_by_autograd(norm, x, grad_output),
    )


def attended(
    lengths: list[int], window: int | None, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> list[Tensor]:
    """Output and gradients of q, k and v for random packed documents."""
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    q, k, v, grad_output = (
        torch.randn(total, count, size, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads, heads)
    )
    attend = PackedDocuments(lengths)
    rotary = rotary_table(attend.positions, Rope(theta=10000.0), size)
    out = attend(0, q, k, v, rotary, window)
    out.backward(grad_output.detach())
    return [out.detach(), *(t.grad for t in (q, k, v) if t.grad is not None)]


@needs_compiler
@DTYPES
@pytest.mark.parametrize("window", [None, 1, 40, 100])
@pytest.mark.parametrize("shape", [(4, 4, 16), (8, 2, 64), (3, 1, 128), (2, 1, 80)])
def test_compiled_attention_equals_torch(
    shape: tuple[int, int, int], window: int | None, dtype: torch.dtype, by_torch: Callable[..., object]
) -> None:
    lengths = [1, 130, 64, 7, 65]
    exact = by_torch(attended, lengths, window, torch.float64, *shape)
    theirs = by_torch(attended, lengths, window, dtype, *shape)
    ours = attended(lengths, window, dtype, *shape)
    assert isinstance(exact, list)
    assert isinstance(theirs, list)
    for got, of_torch, reference in zip(ours, theirs, exact, strict=True):
        size = reference.norm().clamp(min=1)
        bound = 2e-6 if dtype == torch.float32 else (of_torch.double() - reference).norm() / size
        assert (got.double() - reference).norm() / size <= bound


@needs_compiler
@DTYPES
def test_compiled_attention_of_a_document_does_not_depend_on_its_pack(dtype: torch.dtype) -> None:
    lengths = [50, 129, 3]
    together = attended(lengths, None, dtype, 4, 2, 32)
    starts = [0, *accumulate(lengths)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = attended(lengths, None, dtype, 4, 2, 32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, other, strict=True))
    assert starts[-1] == len(together[0])


def test_without_a_compiler_torch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_NATIVE", "0")
    native._build.cache_clear()
    try:
        assert native.kernels() is None
        assert native.missing() == "LORAFIT_NATIVE=0"
        out = attended([5, 9], 3, torch.float32, 2, 1, 16)
    finally:
        monkeypatch.undo()
        native._build.cache_clear()
    for a, b in zip(out, attended([5, 9], 3, torch.float32, 2, 1, 16), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiler_that_fails_is_told_and_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    native._build.cache_clear()
    try:
        assert native.kernels() is None
        assert "`false` failed" in native.missing()
    finally:
        monkeypatch.undo()
        native._build.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ and Linux")
def test_of_processes_that_start_together_one_compiles(tmp_path: Path) -> None:
    """As ranks do; the second finds what the first made."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\nexec g++ -O0 "$@"\n')
    compiler.chmod(0o700)
    environment = {**os.environ, "LORAFIT_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    source = "from lorafit.model import native; assert native.blocks() is not None"
    started = [subprocess.Popen([sys.executable, "-c", source], env=environment) for _ in range(2)]
    assert [process.wait(timeout=HANGS) for process in started] == [0, 0]
    assert (tmp_path / "calls").read_text().count("x") == 2  # a source and the library of it


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's own import
def test_fused_definitions_equal_the_plain_ones(
    by_torch: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain, compiled = [], []
    for count in (5, 33):  # one compilation for any number of rows
        x, y, z = (torch.randn(count, 48, dtype=torch.bfloat16) for _ in range(3))
        weight = torch.rand(48).to(torch.bfloat16)
        rotary = rotary_table(torch.arange(count), Rope(), 16)

        def everything(
            x: Tensor = x, y: Tensor = y, z: Tensor = z, weight: Tensor = weight, rotary: Rotary = rotary
        ) -> list[Tensor]:
            normed, rstd = ops.rms_norm(x, weight, 1e-5)
            grad_output = ops.rms_norm_backward(y, x, weight, rstd)
            quantized = ops.quantize_rows(x, weight.float())
            rotated = attention.rotate(x.view(-1, 3, 16), rotary)
            gates = ops.swiglu_backward(y.clone(), x, z)
            return [normed, rstd, grad_output, ops.swiglu(x, y), *gates, quantized[1], rotated]

        plain += by_torch(everything)
        monkeypatch.setitem(compile_module._state, "enabled", True)
        compiled += by_torch(everything)
        monkeypatch.setitem(compile_module._state, "enabled", False)
    for got, exact in zip(compiled, plain, strict=True):
        close(got, exact, got.dtype)


@pytest.mark.parametrize("has_triton", [False, True])
def test_short_runs_and_cpus_compile_nothing(monkeypatch: pytest.MonkeyPatch, has_triton: bool) -> None:
    monkeypatch.setattr(compile_module.importlib.util, "find_spec", lambda name: has_triton or None)
    monkeypatch.setattr(torch, "compile", None)  # it would raise
    assert compile_module.enable_compile(torch.device("cpu"), 10**6) == ""
    assert compile_module.enable_compile(torch.device("cuda"), compile_module.LEAST_STEPS - 1) == ""
    assert not compile_module._state["enabled"]


def test_a_compiler_that_fails_leaves_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton needs a C compiler, which images without development tools do not have."""
    importlib.import_module("torch._dynamo")  # it looks for packages itself

    def fails(definition: object, **options: object) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

        return call

    monkeypatch.setattr(compile_module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.ones(shape))
    monkeypatch.setattr(torch, "compile", fails)
    reason = compile_module.enable_compile(torch.device("cuda"), compile_module.LEAST_STEPS)
    assert "Failed to find C compiler" in reason
    assert "\n" not in reason
    assert not compile_module._state["enabled"]


def test_a_definition_that_does_not_compile_is_computed_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others stay compiled. Memory that runs out is another matter: the step is repeated."""
    raised: list[Exception] = [
        RuntimeError("ptxas failed\nin line 3"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ]

    def compile_as(definition: Callable[..., Tensor], **words: object) -> Callable[..., Tensor]:
        def call(x: Tensor) -> Tensor:
            if definition.__name__ == "fails":
                raise raised[0]
            return definition(x) + 1

        return call

    monkeypatch.setattr(torch, "compile", compile_as)
    monkeypatch.setattr(compile_module, "_failed", set())
    monkeypatch.setitem(compile_module._state, "enabled", True)

    @compile_module.compilable
    def fails(x: Tensor) -> Tensor:
        return x * 2

    @compile_module.compilable
    def runs(x: Tensor) -> Tensor:
        return x * 2

    x = torch.ones(2, 2)
    for _ in range(2):
        assert torch.equal(fails(x), x * 2)
        assert torch.equal(runs(x), x * 2 + 1)
    (record,) = caplog.records
    assert (
        record.getMessage()
        == "fails is not compiled here, torch computes it: RuntimeError: ptxas failed in line 3"
    )
    compile_module._failed.clear()
    del raised[0]
    with pytest.raises(torch.OutOfMemoryError):
        fails(x)


def test_rows_vary_widths_do_not_and_many_variants_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda x, axis: marked.append(tuple(x.shape)))
    options: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda definition, **words: options.update(words) or definition)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setitem(compile_module._state, "enabled", True)

    @compile_module.compilable
    def function(x: Tensor, weight: Tensor, rotary: Rotary) -> Tensor:
        return x

    function(torch.ones(5, 48), torch.ones(48), (torch.ones(5, 8), torch.ones(5, 8)))
    assert marked == [(5, 48), (5, 8), (5, 8)]
    assert options == {"fullgraph": True}
    assert torch._dynamo.config.recompile_limit == compile_module.MOST_VARIANTS

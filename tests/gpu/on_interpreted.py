"""The Triton kernels in numbers: each beside its definition, and whole steps beside the CPU's. See test_devices.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from tests.gpu.device import H100, T4
from tests.gpu.interpreted import interpreted
from tests.gpu.kernels import fused
from tests.gpu.networks import difference, few_tokens, measure, network_on, trainable
from tests.gpu.simulated import chosen, simulated_cuda
from torch import Tensor

from lorafit.forward import pack_loss
from lorafit.model import attention, definitions, gpu_ops, lora_linear, ops, places
from lorafit.model.adamw import AdamW
from lorafit.model.attention import PackedDocuments, rotate
from lorafit.model.fused_layer import fuse_layers, start_kernels
from lorafit.model.llama import rotary_table
from lorafit.model.lora import disable_adapter
from lorafit.model.rope import Rope

SHARED, APART = few_tokens(2), few_tokens(0)
FEW = few_tokens(0, (4, 2))
SMALL = {"num_hidden_layers": 1}
CLOSE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["kernel", "definition"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By the kernels, and by torch where none of them compiles."""
    monkeypatch.setattr(gpu_ops, "_failed", {})
    if request.param == "definition":
        monkeypatch.setattr(gpu_ops, "launch", raising(RuntimeError("PassManager::run failed")))
    yield
    assert bool(gpu_ops._failed) == (request.param == "definition")


@pytest.fixture(
    params=[
        torch.float64,
        torch.bfloat16,
        pytest.param(torch.float32, marks=pytest.mark.slow),
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def dtype(request: pytest.FixtureRequest, way: None) -> torch.dtype:
    kind: torch.dtype = request.param
    torch.manual_seed(0)
    return kind


def near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    off = float((found.double() - exact).norm() / exact.norm())
    assert off <= CLOSE[dtype], off


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (5, 96)])
def test_norm_and_its_gradient(dtype: torch.dtype, rows: int, width: int) -> None:
    x, slope, stream = (torch.randn(rows, width).to(dtype) for _ in range(3))
    weight, room = torch.rand(width).to(dtype), torch.zeros(rows, width + 8, dtype=dtype)
    exact = [part.double() for part in (x, weight)]
    y, rstd = definitions.rms_norm(*exact, 1e-5, 1.0)
    found = gpu_ops.rms_norm(x, weight, 1e-5, 1.0, room[:, :width])
    near(found[0], y, dtype)
    near(found[1], rstd, torch.float32 if dtype.itemsize < 8 else dtype)
    into, again = torch.zeros_like(room)[:, :width], torch.empty_like(x)
    gpu_ops.rms_norm_backward(slope, x, weight, found[1], 1.0, stream, into, again)
    gradient = definitions.rms_norm_backward(slope.double(), *exact, rstd, 1.0)
    near(into, gradient + stream.double(), dtype)
    near(again, y, dtype)
    assert not room[:, width:].any()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 96), (2, 1040)])
def test_gates_and_their_gradients(dtype: torch.dtype, rows: int, width: int) -> None:
    both, slope = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    gate, up = both.chunk(2, dim=1)
    y = definitions.swiglu(gate.double(), up.double())
    near(gpu_ops.swiglu(gate, up), y, dtype)
    of_gate, of_up = definitions.swiglu_backward(slope.double(), gate.double(), up.double())
    found = gpu_ops.swiglu_backward(slope, gate, up, y=slope)
    near(found[0], of_gate, dtype)
    near(found[1], of_up, dtype)
    near(slope, y, dtype)


@pytest.mark.parametrize(
    ("shared", "normed", "repeats"), [(True, True, 1), (False, False, 2), (True, False, 3)]
)
def test_rotation_of_shared_tokens_and_its_gradient(
    dtype: torch.dtype, shared: bool, normed: bool, repeats: int
) -> None:
    index = torch.tensor([*range(5), *range(3), 5, *range(2)]) if shared else None
    packed = PackedDocuments([5, 4, 2], index=index)
    tokens, queries, keys, half = len(packed.positions), 6, 2, 8
    qkv = torch.randn(tokens, (queries + 2 * keys) * 2 * half).to(dtype)
    angles = rotary_table(packed.positions, Rope(), 2 * half)
    table = packed.shared
    weights = torch.rand(2 * half).to(dtype), torch.rand(2 * half).to(dtype)
    norms = gpu_ops.HeadNorms(weights, 1e-5, 0.5) if normed else None
    index = None if table is None else table.index
    found = gpu_ops.rotate_apart(qkv, angles, queries, keys, index, norms, repeats)
    exact = qkv.to(torch.float64, copy=True).requires_grad_()
    heads = list(exact.unflatten(1, (-1, 2 * half)).split((queries, keys, keys), 1))
    if normed:
        pairs = zip(heads, weights, strict=False)
        heads[:2] = [ops.norm(part, weight.double(), 1e-5, 0.5) for part, weight in pairs]
    q, k = (rotate(part, angles) for part in heads[:2])
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, heads[2]))
    apart = [packed.apart(part) for part in (q, k, v)]
    near(found, torch.cat(apart, 1).flatten(1).detach(), dtype)
    slopes = [torch.randn(part.shape).to(dtype) for part in apart]
    torch.autograd.backward(apart, [slope.double() for slope in slopes])
    into = torch.empty_like(qkv)
    order = None if table is None else (table.in_order, table.begins)
    gpu_ops.rotate_together(slopes, angles, order, into, norms, qkv, repeats)
    assert exact.grad is not None
    near(into, exact.grad, dtype)
    if table is not None:
        slope = torch.randn(tokens, 5).to(dtype)
        wanted = slope.new_zeros(11, 5).index_copy_(0, table.first, slope)
        assert torch.equal(gpu_ops.spread(slope, table.index, table.first), wanted)


@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, weighted: bool) -> None:
    logits, targets = (3 * torch.randn(4, 4200)).to(dtype), torch.tensor([0, 4199, 4096, 17])
    logits[0, 5] = 80.0  # a probability of one
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0]) if weighted else None
    exact = logits.to(torch.float64, copy=True)
    plain = gpu_ops.cross_entropy(logits.clone(), targets, False, weights)
    found = gpu_ops.cross_entropy(logits, targets, True, weights)
    wanted = ops.cross_entropy(exact, targets, True, weights)
    near(found, wanted, torch.float32 if dtype.itemsize < 8 else dtype)
    assert torch.equal(plain, found)
    near(logits, exact, dtype)


def test_copies_of_trained_matrices_go_where_they_belong(way: None) -> None:
    sources = [torch.randn(4, 300), torch.randn(290, 4), torch.randn(3, 5), torch.randn(1, 1)]
    whole = torch.full((300, 700), 7.0, dtype=torch.float64)
    places = [whole[:4, :300], whole[10:300, 300:304], whole[0:3, 400:405], whole[299:, 699:]]
    gpu_ops.fill(sources, places)
    for source, place in zip(sources, places, strict=True):
        assert torch.equal(source.double(), place)
    assert int((whole != 7).sum()) == sum(source.numel() for source in sources)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little padding of documents and of rows: else the interpreter needs minutes."""
    monkeypatch.setattr(places, "GROUP", 4)
    monkeypatch.setattr(gpu_ops, "_BLOCK", 64)


@pytest.mark.parametrize(
    ("family", "capability"),
    [
        ("llama-biases", T4),
        ("qwen3", H100),
        pytest.param("llama-biases", H100, marks=pytest.mark.slow),
        pytest.param("qwen3", T4, marks=pytest.mark.slow),
        pytest.param("mistral-window", T4, marks=pytest.mark.slow),
        pytest.param("mistral-window", H100, marks=pytest.mark.slow),
        pytest.param("smollm3", T4, marks=pytest.mark.slow),
        pytest.param("smollm3", H100, marks=pytest.mark.slow),
    ],
)
def test_loss_and_every_gradient_are_the_cpus(
    family: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_flash", lambda q: q.is_cuda and capability == H100)
    packs = SHARED if (capability == H100) == (family != "qwen3") else APART
    exact = measure(network_on("cpu", family, torch.float64), packs)
    with interpreted(capability) as names:
        found = measure(fused(network_on("cuda", family, torch.float64)), packs)
        assert "math" not in chosen
    assert max(difference(found, exact)) <= 1e-12
    assert {"fill", "rotate_apart", "rotate_together", "swiglu_backward", "cross_entropy"} <= set(names)


def test_sixteen_bits_are_the_cpus_within_rounding() -> None:
    exact = measure(network_on("cpu", "llama", torch.float64, **SMALL), SHARED)
    with interpreted(H100):
        found = measure(fused(network_on("cuda", "llama", torch.bfloat16, **SMALL)), SHARED)
    assert max(difference(found, exact)) <= 5e-2


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), pytest.param(("down_proj",), marks=pytest.mark.slow)]
)
def test_layers_of_which_some_linears_are_adapted(targets: tuple[str, ...]) -> None:
    exact = measure(network_on("cpu", "llama", torch.float64, targets=targets, **SMALL), FEW)
    with interpreted(H100):
        assert (
            max(
                difference(
                    measure(fused(network_on("cuda", "llama", torch.float64, targets=targets, **SMALL)), FEW),
                    exact,
                )
            )
            <= 1e-12
        )


def test_recomputing_layers_changes_nothing_and_a_changed_adapter_counts() -> None:
    with interpreted(H100):
        network = fused(network_on("cuda", "llama", torch.float64, **SMALL))
        whole = measure(network, FEW)
        network.recompute = True
        assert max(difference(measure(network, FEW), whole)) == 0
        network.recompute = False
        other = network_on("cpu", "llama", torch.float64, **SMALL)
        measure(other, FEW)
        for one in (network, other):  # torch's operations on lists change the adapter
            AdamW(trainable(one), 0.0).step(0.01)
        assert max(difference(measure(network, FEW), measure(other, FEW))) <= 1e-9


def test_what_fused_layers_do_not_compute_goes_by_their_modules() -> None:
    """The base alone, without the adapter."""
    with interpreted(H100) as names, torch.no_grad():
        plain = network_on("cuda", "llama", torch.float64, **SMALL)
        network = fused(network_on("cuda", "llama", torch.float64, **SMALL))
        with disable_adapter(plain), disable_adapter(network):
            one, other = (float(pack_loss(net, FEW[0])) for net in (plain, network))
        assert one == pytest.approx(other, rel=1e-12)
        assert "fill" not in names
        pack_loss(network, FEW[0])
        assert "fill" in names


def test_dropout_has_the_mask_of_the_layers_modules() -> None:
    with interpreted(H100) as names:
        plain = measure(network_on("cuda", "llama", torch.float64, dropout=0.3, **SMALL), FEW)
        assert "rotate_together" not in names
        network = fused(network_on("cuda", "llama", torch.float64, dropout=0.3, **SMALL))
        network.recompute = True
        assert max(difference(measure(network, FEW), plain)) <= 1e-12
        assert "rotate_together" in names


def test_dropout_is_a_function_of_the_seed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ops, "_BLOCK", 256)
    x, into = torch.ones(5, 500, dtype=dtype), torch.full((5, 500), 2.0, dtype=dtype)
    found = gpu_ops.dropout(x[:, :400], 0.25, 2**61 + 5)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.75], rel=CLOSE[dtype])
    assert abs(float((found == 0).double().mean()) - 0.25) < 0.04
    assert torch.equal(gpu_ops.dropout(x[:, :400], 0.25, 2**61 + 5), found)
    assert not torch.equal(gpu_ops.dropout(x[:, :400], 0.25, 5), found)
    added = gpu_ops.dropout(x[:, :400], 0.25, 5, into[:, :400].contiguous())
    assert torch.equal(added != 2, gpu_ops.dropout(x[:, :400], 0.25, 5) != 0)
    # one mask by either way: a kernel may fail for the backward pass alone
    assert torch.equal(found != 0, definitions.dropout(x[:, :400], 0.25, 2**61 + 5) != 0)


@pytest.mark.parametrize(
    "failing",
    [
        ("rms_norm", "swiglu_backward"),
        pytest.param(("rotate_apart", "fill", "rms_norm_backward", "cross_entropy"), marks=pytest.mark.slow),
        pytest.param(("swiglu", "rotate_together"), marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_a_kernel_that_does_not_compile_is_replaced_and_that_is_said_once(
    failing: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """In the forward pass and in the backward pass; the other kernels run on."""
    exact = measure(network_on("cpu", "llama", torch.float64, **SMALL), FEW)
    with interpreted(T4, failing) as names, caplog.at_level(logging.WARNING):
        network = fused(network_on("cuda", "llama", torch.float64, **SMALL))
        for _ in range(2):
            network.zero_grad()
            assert max(difference(measure(network, FEW), exact)) <= 1e-12
    kernels = {"rms_norm", "rotate_apart", "swiglu", "fill", "cross_entropy", "spread"}
    kernels |= {"rms_norm_backward", "swiglu_backward", "rotate_together"}
    assert set(names) == kernels - set(failing)
    assert len(caplog.records) == len(failing)
    for record, name in zip(
        sorted(record.getMessage() for record in caplog.records), sorted(failing), strict=True
    ):
        assert record.startswith(f"Triton's kernel {name} does not run here")
        assert "PassManager::run failed" in record


def test_a_step_goes_on_where_no_kernel_but_that_of_the_trial_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that share tokens, norms of heads, dropout: all definitions write where the kernels would."""
    monkeypatch.setattr(attention, "has_flash", lambda q: q.is_cuda)
    packs = [*SHARED, *APART]
    with simulated_cuda(H100):
        plain = network_on("cuda", "qwen3", torch.float64, dropout=0.3, **SMALL)
        with mock.patch.object(lora_linear, "dropout", definitions.dropout):
            wanted = measure(plain, packs)
    everything = {"fill", "rms_norm", "rotate_apart", "swiglu", "dropout", "cross_entropy", "spread"}
    everything |= {"rms_norm_backward", "swiglu_backward", "rotate_together"}
    with interpreted(H100, everything) as names:
        network = fused(network_on("cuda", "qwen3", torch.float64, dropout=0.3, **SMALL))
        assert max(difference(measure(network, packs), wanted)) <= 1e-12
    assert names == []


def test_a_kernel_without_memory_to_be_loaded_is_no_kernel_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then the step is repeated with smaller passes."""
    error = RuntimeError("Triton Error [CUDA]: out of memory")
    monkeypatch.setattr(gpu_ops, "launch", raising(error))
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_ops.swiglu(torch.ones(2, 4), torch.ones(2, 4))
    assert gpu_ops._failed == {}


@pytest.mark.parametrize("family", ["gemma2", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_other_layers_take_the_kernels_alone(family: str) -> None:
    exact = measure(network_on("cpu", family, torch.float64), FEW)
    with interpreted(T4) as names:
        network = network_on("cuda", family, torch.float64)
        assert fuse_layers(network) == 0
        assert max(difference(measure(network, FEW), exact)) <= 1e-12
    assert {"rms_norm", "rms_norm_backward", "cross_entropy"} <= set(names)


def test_the_log_says_once_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_kernels(network_on("cpu", "llama", torch.float32), torch.device("cpu"), sharded=False) == ""
    with interpreted(H100):
        network, device = network_on("cuda", "llama", torch.float64), torch.device("cuda")
        assert "0 of 2 layers" in start_kernels(network, device, sharded=True)
        assert "2 of 2 layers" in start_kernels(network, device, sharded=False)
        monkeypatch.setattr(
            gpu_ops, "launch", raising(RuntimeError("Failed to find C compiler.\nPlease specify it."))
        )
        said = start_kernels(network, device, sharded=False)
        assert "Failed to find C compiler" in said
        assert "\n" not in said
        assert not gpu_ops.enabled()
        monkeypatch.setattr(gpu_ops.importlib.util, "find_spec", lambda name: None)
        assert "the package triton is not installed" in start_kernels(network, device, sharded=False)
        assert not gpu_ops.enabled()


def raising(error: Exception) -> Callable[..., None]:
    def function(*arguments: object, **constants: object) -> None:
        raise error

    return function

"""Is it right on this GPU: operations, attention, quantised products and whole steps beside the CPU's in float64."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.gpu_results import Results
from tests.gpu.networks import difference, few_tokens, measure, network_on, numbers, small_packs
from tests.tiny_models import FAMILIES, PUBLISHED
from torch import Tensor

from lorafit.data.packing import Pack
from lorafit.forward import pack_loss
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.infer.sampling import Sampling
from lorafit.model import compile as compiling
from lorafit.model import gpu_ops, ops
from lorafit.model.attention import PackedDocuments, causal_attention, has_flash, rotate
from lorafit.model.definitions import wide
from lorafit.model.fused_layer import fuse_layers
from lorafit.model.loss import loss_sum
from lorafit.model.quant import QUANTIZERS, Quantize

EXACT, SINGLE = torch.float64, torch.float32
SIXTEEN = (torch.bfloat16, torch.float16)
# Largest relative norm of an error, in operations of one kernel
ONE_KERNEL = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, SINGLE: 3e-6}
ATTENTION = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
# The same of (product, loss of a step, gradient of a step) of each quantisation beside its own weights in float64
QUANTISED: dict[Quantize, tuple[float, float, float]] = {
    "int8": (2.5e-2, 1e-2, 0.1),
    "fp8": (6e-2, 2e-2, 0.25),
    "nf4": (1e-2, 1e-2, 0.1),
}


def off(found: Tensor, exact: Tensor) -> float:
    """The relative norm of an error."""
    found, exact = numbers(found).double(), numbers(exact).double()
    return float((found - exact).norm() / exact.norm().clamp(min=1e-300))


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operations(results: Results, simulated: bool) -> None:
    """Each row-wise operation, plain and compiled, of one, few and many rows."""
    state = compiling._state
    has_triton = importlib.util.find_spec("triton") is not None and not simulated
    try:
        for state["enabled"] in (False, True) if has_triton else (False,):
            for dtype, most in ONE_KERNEL.items():
                worst = max(_worst_operation(dtype, rows) for rows in (1, 17, 1040))
                way = "compiled" if state["enabled"] else "plain"
                results.at_most(f"operations {way}, {short_name(dtype)}", worst, most)
    finally:
        state["enabled"] = False
    if not has_triton:
        results.skip("operations compiled", "a simulated device" if simulated else "triton is not installed")


def _worst_operation(dtype: torch.dtype, rows: int) -> float:
    generator = torch.Generator().manual_seed(rows)
    x, y, z = (torch.randn(rows, 256, generator=generator).to(dtype) for _ in range(3))
    weight, angles = torch.rand(256, generator=generator).to(dtype), torch.rand(rows, 16, generator=generator)
    exact = [t.double() for t in (x, y, z, weight)]
    here = [t.to("cuda") for t in (x, y, z, weight)]
    pairs: list[tuple[Any, Any]] = []
    for given in (exact, here):
        a, b, c, w = given
        normed, rstd = ops.rms_norm(a, w, 1e-5)
        rotary = tuple(t.to(a.device, wide(a.dtype)) for t in (angles.cos(), angles.sin()))
        backward = ops.rms_norm_backward(b, a, w, rstd)
        gates = (ops.swiglu(a, b), ops.geglu(a, b))
        slopes = (*ops.swiglu_backward(c.clone(), a, b), *ops.geglu_backward(c.clone(), a, b))
        pairs.append((normed, backward, *gates, *slopes, rotate(a.view(rows, 8, 32), rotary)))
    return max(off(found, wanted) for wanted, found in zip(*pairs, strict=True))


def attention(results: Results, simulated: bool) -> None:
    """Flash attention and batches of documents, outputs and gradients."""
    for dtype, most in ATTENTION.items():
        for heads, kv_heads, size, window in (
            (4, 2, 32, None),
            (4, 4, 64, None),
            (8, 1, 128, None),
            (4, 2, 64, 20),
        ):
            lengths = [70, 3, 64, 1, 65, 200, 3, *([] if simulated else [1031, 2048])]
            generator = torch.Generator().manual_seed(0)
            shapes = [(heads, size), (kv_heads, size), (kv_heads, size)]
            parts = [torch.randn(sum(lengths), *each, generator=generator).to(dtype) for each in shapes]
            gradient = torch.randn(sum(lengths), heads, size, generator=generator).to(dtype)
            exact = [part.double().requires_grad_() for part in parts]
            documents = zip(*(part.split(lengths) for part in exact), strict=True)
            wanted = torch.cat([causal_attention(*each, window) for each in documents])
            slopes = torch.autograd.grad(wanted, exact, gradient.double())
            for way in ("_flash", "_batched"):
                q, k, v = (part.to("cuda").requires_grad_() for part in parts)
                if way == "_flash" and not has_flash(q):
                    continue
                out = getattr(PackedDocuments(lengths, "cuda"), way)(q, k, v, window)
                found = torch.autograd.grad(out, (q, k, v), gradient.to("cuda"))
                layout = (
                    f"{way[1:]}, {short_name(dtype)}, {heads}/{kv_heads} heads of {size}, window {window}"
                )
                results.at_most(layout, off(out, wanted), most)
                worst = max(off(one, other) for one, other in zip(found, slopes, strict=True))
                results.at_most(f"{layout}, gradients", worst, 2 * most)
    if not simulated:
        results.holds("no attention keeps its scores in float32", not _scores_in_float32())


def _scores_in_float32() -> bool:
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(512, 32, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    k = torch.randn(512, 4, 64, device="cuda", dtype=torch.float16)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        PackedDocuments([512], "cuda")._batched(q, k, k, None)
    return "aten::_scaled_dot_product_attention_math" in {event.key for event in seen.key_averages()}


def families(results: Results, short: bool) -> None:
    """Loss and every gradient of each family beside the CPU's."""
    for family in ("llama", "qwen3", "gemma2") if short else (*FAMILIES, *PUBLISHED):
        exact = measure(network_on("cpu", family, EXACT))
        cases = [(EXACT, 1.0, 1e-11, 1e-9), (SINGLE, 1.0, 1e-5, 1e-4)]
        if family in ("llama", "qwen3"):
            cases += [(torch.bfloat16, 1.0, 5e-3, 8e-2), (torch.float16, 65536.0, 1e-3, 2e-2)]
        for dtype, scale, most, most_of_gradients in cases:
            found = difference(measure(network_on("cuda", family, dtype), scale=scale), exact)
            name = f"{family}, {short_name(dtype)}" + (
                f" with a loss scale of {scale:.0f}" if scale > 1 else ""
            )
            results.at_most(f"{name}: loss", found[0], most)
            results.at_most(f"{name}: largest difference of a gradient", found[1], most_of_gradients)


def kernels(results: Results, simulated: bool) -> None:
    """Steps with Triton's kernels and merged products, with and without flash attention, beside the CPU's."""
    if simulated and importlib.util.find_spec("triton") is None:
        results.skip("Triton's kernels", "triton is not installed")
    elif simulated:  # the interpreter is slow: few tokens
        from tests.gpu.interpreted import kernels_interpreted

        with kernels_interpreted():
            _steps_with_kernels(results, few_tokens(2))
    elif why := gpu_ops.enable(torch.device("cuda")):
        results.skip("Triton's kernels", why)
    else:
        try:
            _steps_with_kernels(results, small_packs())
            results.holds("every kernel compiles", not gpu_ops.failed(), "; ".join(gpu_ops.failed().values()))
        finally:
            gpu_ops.enable(torch.device("cpu"))


def _steps_with_kernels(results: Results, packs: Sequence[Pack]) -> None:
    for family in ("llama", "qwen3"):
        exact = measure(network_on("cpu", family, EXACT), packs)
        for dtype, most in ((EXACT, 1e-9), (SINGLE, 1e-4), (torch.bfloat16, 8e-2), (torch.float16, 2e-2)):
            network = network_on("cuda", family, dtype)
            fuse_layers(network)
            scale = 65536.0 if dtype == torch.float16 else 1.0
            found = difference(measure(network, packs, scale), exact)
            results.at_most(f"{family} with Triton's kernels, {short_name(dtype)}", max(found), most)


def passes(results: Results, short: bool) -> None:
    """What must not change a step: recomputing layers, layers on the host, and other passes."""
    for dtype in SIXTEEN[: 1 if short else 2]:
        network = network_on("cuda", "llama", dtype, dropout=0.3)
        whole = measure(network)
        network.recompute = True
        found = difference(measure(network), whole)
        results.at_most(f"recomputed layers with dropout, {short_name(dtype)}", max(found), 1e-6)
        several = {"num_hidden_layers": 5, "hidden_size": 64 if short else 1024}
        resident, offloaded = (
            network_on("cuda", "llama", dtype, offload=offload, **several) for offload in (False, True)
        )
        found = difference(measure(offloaded), measure(resident))
        results.at_most(f"layers on the host, {short_name(dtype)}", max(found), 1e-6)
        network = network_on("cuda", "llama", dtype)
        found = difference(measure(network), measure(network, small_packs(45)))
        results.at_most(f"four passes or two, {short_name(dtype)}", max(found), 3e-2)


def quantised(results: Results, simulated: bool) -> None:
    """Products, input gradients and steps of each quantisation beside the weights that they stand for."""
    for kind, (most, most_of_loss, most_of_gradients) in QUANTISED.items():
        if kind == "nf4" and (simulated or importlib.util.find_spec("bitsandbytes") is None):
            results.skip(kind, "a simulated device" if simulated else "bitsandbytes is not installed")
            continue
        if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            results.skip(kind, "the chip has no fp8")
            continue
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16)

        linear = QUANTIZERS[kind]((noise(256, 512) / 20).to("cuda"))
        weight, q = numbers(linear.dequantize()).double(), noise(256, 16)
        worst = worst_gradient = 0.0
        for rows in (1, 16, 17, 45):
            x, p, gradient = noise(rows, 512), noise(rows, 16), noise(rows, 256)
            found = linear.product(x.to("cuda"), None, (p.to("cuda"), q.to("cuda")))
            worst = max(worst, off(found, x.double() @ weight.t() + p.double() @ q.double().t()))
            into = linear.input_gradient(gradient.to("cuda"))
            worst_gradient = max(worst_gradient, off(into, gradient.double() @ weight))
        results.at_most(f"{kind}: products of 1 to 45 rows", worst, most)
        results.at_most(f"{kind}: their input gradients", worst_gradient, most)
        x[:, 7] *= 60
        results.at_most(
            f"{kind}: with an outlier column",
            off(linear.product(x.to("cuda")), x.double() @ weight.t()),
            most,
        )
        step = measure(network_on("cuda", "llama", torch.bfloat16, kind))
        exact = measure(network_on("cpu", "llama", EXACT, kind, dequantized=True))
        found_loss, found_gradients = difference(step, exact)
        results.at_most(f"{kind}: loss of a step", found_loss, most_of_loss)
        results.at_most(f"{kind}: largest difference of a gradient", found_gradients, most_of_gradients)


def loss(results: Results) -> None:
    """The loss with its gradient, with loss scales, and the length of the gradient alone."""
    for dtype, most in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        worst = worst_length = 0.0
        for supervised, scale in ((1, 65536.0), (997, 1.0), (1600, 65536.0)):
            generator = torch.Generator().manual_seed(supervised)
            hidden = torch.randn(64, 128, generator=generator).to(dtype)
            head = (torch.randn(512, 128, generator=generator) / 8).to(dtype)
            targets = torch.randint(512, (64,), generator=generator)
            exact = hidden.double().requires_grad_()
            total = F.cross_entropy(exact @ head.double().t(), targets, reduction="sum")
            (total * (scale / supervised)).backward()
            here = hidden.to("cuda").requires_grad_()
            found = loss_sum(here, head.to("cuda"), targets.to("cuda"))
            (found * (scale / supervised)).backward()
            assert here.grad is not None
            assert exact.grad is not None
            worst = max(worst, off(found, total), off(here.grad, exact.grad))
            length = float(numbers(here.grad).double().norm() / exact.grad.norm())
            worst_length = max(worst_length, abs(length - 1))
        results.at_most(f"loss and gradient, {short_name(dtype)}", worst, most)
        results.at_most(f"length of the gradient, {short_name(dtype)}", worst_length, most / 6)


def dropout(results: Results) -> None:
    """The same seed drops the same elements, and the right share."""
    x = torch.ones(300, 256, device="cuda")
    one, two, other = (numbers(ops.dropout(x, 0.25, seed)) for seed in (7, 7, 8))
    results.holds("one seed is one mask", bool((one == two).all()) and not bool((one == other).all()))
    results.at_most("share of what is dropped", abs(float((one == 0).double().mean()) - 0.25), 0.01)


def waits(results: Results, simulated: bool) -> None:
    """A pass and its backward pass never wait for the device."""
    network, packs = network_on("cuda", "llama", torch.bfloat16), small_packs()
    if simulated:
        from tests.gpu import simulated as device

        device.waits.clear()
        for pack in packs:
            pack_loss(network, pack).backward()
        results.at_most("reads from the device in two passes", device.waits["read"], 0)
        return
    for pack in packs:
        pack_loss(network, pack).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for pack in packs:
                pack_loss(network, pack).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(each.message) for each in seen if "synchroniz" in str(each.message)]
    results.at_most("waits for the device in two passes", len(found), 0)


def answers(results: Results) -> None:
    """Greedy answers in float32 are the CPU's, and sampled ones repeat with their seed."""
    prompts = [list(range(5, 5 + length)) for length in (3, 9, 17, 40)]

    def said(device: str, sampling: Sampling) -> list[list[int]]:
        network = network_on(device, "llama", SINGLE).eval()
        requests = [
            Request(prompt, frozenset({2}), 12, sampling, number) for number, prompt in enumerate(prompts)
        ]
        rows: list[list[int]] = [[] for _ in prompts]
        for row, token in generate_tokens(network, requests):
            rows[row].append(token.id)
        return rows

    wanted, found = said("cpu", Sampling()), said("cuda", Sampling())
    same = sum(a == b for one, two in zip(wanted, found, strict=True) for a, b in zip(one, two, strict=False))
    most = sum(map(len, wanted))
    results.holds("greedy answers are the CPU's", same >= 0.95 * most, f"{same} of {most} tokens")
    warm = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=3)
    results.holds("sampled answers repeat with their seed", said("cuda", warm) == said("cuda", warm))

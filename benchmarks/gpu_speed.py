"""How fast on this GPU: products, runs of TinyLlama's shape, transformers and peft beside them, generation."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmarks.gpu_results import Results, Speed
from benchmarks.gpu_runs import BARE, train
from tests.gpu.networks import LINEARS, TINYLLAMA, empty_network, rows_of

from lorafit.data.packing import Packer
from lorafit.forward import pack_loss
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.infer.sampling import Sampling
from lorafit.model import compile as compiling
from lorafit.observe.metrics_file import read_metrics

# Tokens per second on an H100, from the roofline of shared figures: predicted until measured (docs/gpu.md)
GOALS = {
    ("bfloat16", "none", 2048): 100_000.0,
    ("bfloat16", "none", 16384): 110_000.0,
    ("bfloat16", "fp8", 16384): 150_000.0,
}
STEPS, MEASURED = 24, 12
_LAYERS = TINYLLAMA["num_hidden_layers"]
_LAYER_WEIGHTS = 2048 * (2 * 2048 + 2 * 256) + 3 * 2048 * 5632
_HEAD_WEIGHTS = 32000 * 2048


def rates(results: Results) -> None:
    """What the chip reaches: copies, products of 16 and of 8 bits."""
    one = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    results.note(f"copies {2 * 2**30 / seconds_of(lambda: other.copy_(one)) / 1e12:.2f} TB/s")
    is_new = torch.cuda.get_device_capability() >= (8, 0)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16 if is_new else torch.float16)
    products: dict[str, Callable[[], Any]] = {"16 bits": lambda: x @ x}
    small = torch.ones(8192, 8192, dtype=torch.int8, device="cuda")
    products["int8"] = lambda: torch._int_mm(small, small.t())
    for name, work in products.items():
        results.note(f"products of {name}: {2 * 8192**3 / seconds_of(work) / 1e12:.0f} TFLOP/s")


def seconds_of(work: Callable[[], Any], times: int = 10) -> float:
    """The median seconds of some work on the device."""
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def training(
    results: Results, work: Path, dtype: str, tokens: int, quantize: str = "none", *more: str
) -> None:
    """A run of the loop: tokens per second of its last steps."""
    name = " ".join([dtype, *([quantize] if quantize != "none" else []), f"{tokens:,} tokens", *more])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    settings = [f"model.name={work / 'model'}", f"data.path={work / 'rows.jsonl'}", "model.device=cuda"]
    settings += [f"model.dtype={dtype}", f"model.quantize={quantize}", "data.template=classic", *BARE]
    settings += [f"train.batch_size={tokens // 150}", f"train.micro_batch_tokens={tokens + 2048}"]
    settings += ["lora.rank=16", f"train.max_steps={STEPS}", "train.save_every=1000", *more]
    run = work / f"speed-{len(results.speeds)}"
    with mock.patch.object(compiling, "LEAST_STEPS", 0):  # as in a long run
        train(settings, run)
    steps = [event for event in read_metrics(run / "metrics.jsonl") if event["event"] == "step"][-MEASURED:]
    rate = statistics.median(step["tokens"] / step["seconds"] for step in steps)
    flops = statistics.median(
        4
        * (_LAYERS * _LAYER_WEIGHTS * step["tokens"] + _HEAD_WEIGHTS * step["supervised_tokens"])
        / step["seconds"]
        for step in steps
    )
    goal = None if more else GOALS.get((dtype, quantize, tokens))
    peak = torch.cuda.max_memory_allocated() / 1e9
    results.speed(Speed(f"lorafit, {name}", rate, peak, flops / 1e12, goal))


def compared(results: Results, work: Path, tokens: int, *, with_liger: bool = False) -> None:
    """The same by transformers and peft: packed rows of 2,048 tokens, sdpa, fused AdamW, as trl trains."""
    name = f"transformers + peft{' + Liger' if with_liger else ''}, {tokens:,} tokens"
    try:
        import peft
        import transformers

        liger = importlib.import_module("liger_kernel.transformers") if with_liger else None
    except ImportError as error:
        results.skip(name, f"{error.name} is not installed")
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work / "model", dtype=torch.bfloat16, attn_implementation="sdpa", use_safetensors=True
    ).to("cuda")
    if liger is not None:
        liger.apply_liger_kernel_to_llama(model=model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEARS)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 2e-4, fused=True)
    seconds = []
    for _ in range(MEASURED):
        ids = torch.randint(3, 260, (max(1, tokens // 2048), 2048), device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9
    results.speed(Speed(name, tokens / statistics.median(seconds[4:]), peak))
    del model, optimizer, parameters
    gc.collect()


def generation(results: Results, rows: int, tokens: int = 64) -> None:
    """New tokens per second of several greedy answers together."""
    torch.cuda.reset_peak_memory_stats()
    network = empty_network(TINYLLAMA, torch.bfloat16).eval()
    requests = [Request(list(range(5, 105)), frozenset(), tokens, Sampling()) for _ in range(rows)]
    list(generate_tokens(network, requests[:1]))
    started = time.perf_counter()
    count = sum(1 for _ in generate_tokens(network, requests))
    torch.cuda.synchronize()
    rate = count / (time.perf_counter() - started)
    results.speed(
        Speed(f"generation, {rows} answers at a time", rate, torch.cuda.max_memory_allocated() / 1e9)
    )


def profile(results: Results, tokens: int) -> None:
    """Launches of one pass, how long the device computes, and the kernels that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    network = empty_network(TINYLLAMA, torch.bfloat16)
    (pack,) = Packer(2 * tokens).packs(rows_of(tokens))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(compiling._state, {"enabled": True}))
        for _ in range(3):
            pack_loss(network, pack).backward()
        torch.cuda.synchronize()
        seen = stack.enter_context(profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]))
        started = time.perf_counter()
        pack_loss(network, pack).backward()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    kernels = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(each.self_device_time_total for each in kernels) / 1e6
    results.note(
        f"a pass of {tokens:,} tokens: {sum(each.count for each in kernels):,} kernels, "
        f"the device computes {busy * 1e3:.1f} of {wall * 1e3:.1f} ms"
    )
    for each in sorted(kernels, key=lambda each: -each.self_device_time_total)[:12]:
        results.note(f"{each.self_device_time_total / 1e3:8.2f} ms  {each.count:5} x {each.key[:90]}")

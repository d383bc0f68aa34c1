"""Whole runs on this GPU: they learn, are proven, resume to the same bytes, run out of memory, answer and serve."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import torch
from benchmarks.gpu_results import Results
from safetensors.torch import save_file
from tests.gpu.networks import (
    TINYLLAMA,
    empty_network,
    planned_bytes,
    rows_of,
    shape_of,
    train_step,
    trainable,
)
from tests.tiny_models import write_model, write_prompting, write_rows

from lorafit.config.load import load_config
from lorafit.data.packing import Packer
from lorafit.infer.model import load
from lorafit.model.adamw import AdamW
from lorafit.model.architecture import parse_architecture
from lorafit.model.llama import Llama
from lorafit.observe.metrics_file import read_metrics
from lorafit.storage.atomic import sha256_file
from lorafit.training import loop
from lorafit.training.run import Result, resume_run, start_run

ROOT = Path(__file__).resolve().parents[1]
BARE = ("run.check=none", "run.verify=false", "run.samples=0", "data.holdout=0")


def train(settings: list[str], output: Path, *more: str) -> Result:
    """A run in this process."""
    words = [*settings, f"run.output={output}", *more]
    return start_run(load_config(None, words), quiet=True)


def losses_of(run: Path) -> list[float]:
    """The losses of a run's steps."""
    return [event["loss"] for event in read_metrics(run / "metrics.jsonl") if event["event"] == "step"]


def digest(run: Path) -> str:
    """SHA-256 of a run's adapter."""
    return sha256_file(run / "adapter" / "adapter_model.safetensors")


def whole_runs(results: Results, work: Path, simulated: bool) -> None:
    """The demo: it learns, is proven in a fresh process, and one that is interrupted ends with the same bytes."""
    steps, dtypes = (6, ["float32"]) if simulated else (60, ["bfloat16", "float16"])
    settings = [f"train.max_steps={steps}", f"train.eval_every={steps // 2}", f"train.save_every={steps}"]
    if simulated:
        model = write_model(work / "model", hidden_size=64, intermediate_size=128, head_dim=16)
        settings += [f"model.name={model}", f"data.path={write_rows(work / 'rows.json')}", *BARE[:3]]
        settings += ["train.learning_rate=0.02", "train.batch_size=6", "data.holdout=4"]
    else:
        settings += [f"model.name={ROOT / 'demo' / 'model'}", f"data.path={ROOT / 'demo' / 'rows.json'}"]
        settings += ["train.learning_rate=3e-3", "train.batch_size=16", "data.holdout=32"]
    settings += ["model.device=cuda", "train.deterministic=true"]
    for dtype in dtypes:
        settings_here, whole = [*settings, f"model.dtype={dtype}"], work / dtype
        train(settings_here, whole)
        losses = losses_of(whole)
        share = (0.95, "learns") if simulated else (0.6, "learns in 60 steps")
        results.at_most(f"{dtype}: {share[1]}: last loss by first", losses[-1] / losses[0], share[0])
        if not simulated:
            proof = json.loads((whole / "proof.json").read_text())
            seen = "; ".join(f"{each['name']} {each['verdict']}" for each in proof["checks"])
            results.holds(f"{dtype}: proven in a fresh process", proof["verdict"] != "fail", seen)
        stopped = work / f"{dtype}-stopped"
        with interrupted(after=steps // 2):
            train(settings_here, stopped)
        resume_run(stopped, quiet=True)
        results.holds(f"{dtype}: resumes to the same bytes", digest(whole) == digest(stopped))
        if not simulated:
            train([*settings_here, "train.deterministic=false"], work / f"{dtype}-free", *BARE[:3])
            same = digest(whole) == digest(work / f"{dtype}-free")
            results.note(f"{dtype}: the same bytes without train.deterministic: {same}")


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """A SIGINT arrives in step number `after` of the run in this block."""
    gradients = loop._gradients

    def interrupting(job: Any, state: Any, *rest: Any) -> Any:
        if state.step + 1 == after:
            os.kill(os.getpid(), signal.SIGINT)
        return gradients(job, state, *rest)

    with mock.patch.object(loop, "_gradients", interrupting):
        yield


def write_large(folder: Path, layers: int = 22) -> Path:
    """A model folder of TinyLlama's shape in bfloat16, with random weights."""
    folder.mkdir(parents=True)
    config = {**TINYLLAMA, "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        network = Llama(parse_architecture(config, "TinyLlama"))
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda") * 0.02
        tensors[name] = (noise + (parameter.dim() == 1)).bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return write_prompting(folder, chat=False)


def write_texts(path: Path, count: int, mean: int) -> Path:
    """Rows of about `mean` tokens, 60 % of them the answer, that begin alike as those of instructions do."""
    random = np.random.default_rng(0)
    with path.open("w") as out:
        for _ in range(count):
            length = max(40, int(random.normal(mean, mean / 3)))
            text = random.integers(97, 123, length, dtype=np.uint8).tobytes().decode()
            cut = int(length * 0.4)
            out.write(json.dumps({"instruction": text[:cut], "input": "", "output": text[cut:]}) + "\n")
    return path


def out_of_memory(results: Results, work: Path) -> None:
    """A step without memory is repeated with smaller passes; the losses stay."""
    settings = [f"model.name={write_large(work / 'model', layers=4)}", "model.device=cuda", *BARE]
    settings += [f"data.path={write_texts(work / 'rows.jsonl', 64, 400)}", "data.template=classic"]
    settings += ["train.max_steps=4", "train.batch_size=16", "train.micro_batch_tokens=8192"]
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()  # what an earlier run left is no part of the peak
    torch.cuda.reset_peak_memory_stats()
    train(settings, work / "enough")
    rest = 2 * parse_architecture({**TINYLLAMA, "num_hidden_layers": 4}, "TinyLlama").num_parameters
    short = rest + 0.6 * (torch.cuda.max_memory_allocated() - rest)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(short / total)
    try:
        # the plan measures no pass in so short a run
        train(settings, work / "short", "run.too_large=auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    events = read_metrics(work / "short" / "metrics.jsonl")
    notes = [event["text"] for event in events if event["event"] == "note"]
    results.holds("passes were made smaller", any("passes" in note for note in notes), "; ".join(notes)[:200])
    pairs = zip(losses_of(work / "enough"), losses_of(work / "short"), strict=True)
    results.at_most("difference of the losses", max(abs(a - b) / a for a, b in pairs), 2e-3)


def memory(results: Results) -> None:
    """The peak of a step beside the plan's formula, for each way to attend and to keep."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    for name, dtype, tokens, mean, prefix, recompute in (
        ("flash", bfloat16, 8192, 150, 1, False),
        ("flash, one document", bfloat16, 2048, 2048, 0, False),
        ("shared prefixes", bfloat16, 8192, 150, 60, False),
        ("recompute", bfloat16, 8192, 150, 1, True),
        ("batches of documents", float32, 4096, 150, 1, False),
    ):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        network = empty_network({**TINYLLAMA, "num_hidden_layers": 8}, dtype)
        network.recompute = recompute
        optimizer = AdamW(trainable(network), 0.0)
        packs = Packer(tokens).packs(rows_of(tokens, mean, prefix))
        train_step(network, optimizer, packs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        train_step(network, optimizer, packs)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        planned = planned_bytes(shape_of(network.arch, dtype, recompute=recompute), packs[0])
        results.note(f"{name}: peak {peak / 1e9:.3f} GB, plan {planned / 1e9:.3f} GB")
        results.at_most(f"{name}: plan beside peak", abs(peak / planned - 1), 0.05)
        del network, optimizer


def serving(results: Results, work: Path) -> None:
    """A run answers by HTTP what it answers in this process, while others ask."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        results.skip("lorafit serve", "fastapi and uvicorn are not installed (extra serve)")
        return
    run = work / "bfloat16"
    model = load(run, device="cuda", offline=True)
    questions = ["What is two plus two?", "Who are you?", "Name a colour."]
    wanted = [model.generate(question, max_tokens=8)[0].text for question in questions]
    token = "t" * 32
    command = [sys.executable, "-m", "lorafit", "serve", str(run), "--port", "0", "--device", "cuda"]
    environment = {**os.environ, "LORAFIT_SERVE_TOKEN": token}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
            body = {"model": "bfloat16", "max_tokens": 8, "temperature": 0}
            found = []
            for question in questions:
                message = [{"role": "user", "content": question}]
                reply = client.post("/chat/completions", json={**body, "messages": message})
                reply.raise_for_status()
                found.append(reply.json()["choices"][0]["message"]["content"])
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    same = sum(one.strip() == other.strip() for one, other in zip(wanted, found, strict=True))
    results.holds(
        "answers by HTTP are those of the library", same == len(questions), f"{same} of {len(questions)}"
    )
    results.holds("the server stops with code 0", server.returncode == 0, f"code {server.returncode}")

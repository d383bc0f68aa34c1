"""The cost of fewer bits: gradients against float32, also with outlier activations, and loss curves of whole runs.

    python benchmarks/quality.py MODEL ROWS [--steps 300] [--json FILE]

MODEL is a small pretrained model (shared/models/tinystories-656k), ROWS is an instruction file. The gradients are
those of all adapter tensors on one pack, from a new adapter with a non-zero B. For `outliers`, the network computes
the same function, but some columns of its activations are 50 times larger: the norm weights are multiplied by 50, and
the columns of the linear layers are divided by 50. For the loss curves, the default recipe is trained once per type
on the same rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorafit
from lorafit.config.load import load_config
from lorafit.config.schema import Config
from lorafit.data.build import build_data
from lorafit.data.packing import Pack, Packer
from lorafit.forward import pack_loss
from lorafit.hub.client import model_folder
from lorafit.model import quant
from lorafit.model.architecture import read_architecture
from lorafit.model.linear import Frozen, Linear
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.weights import load_network

SHORT = ("data.max_length=512", "data.too_long=drop")
OUTLIERS = (3, 17, 61)
FACTOR = 50.0
CURVES = {
    "float32": ["model.dtype=float32"],
    "bfloat16": ["model.dtype=bfloat16"],
    "int8 (rest float32)": ["model.dtype=float32", "model.quantize=int8"],
    "int8 (rest bfloat16)": ["model.dtype=bfloat16", "model.quantize=int8"],
    "nf4 (rest bfloat16)": ["model.dtype=bfloat16", "model.quantize=nf4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_config(None, [f"model.name={arguments.model}", f"data.path={arguments.rows}", *SHORT])
    gradients = measure_gradients(config)
    print(
        "| activations | type | cosine of the gradient | length relative to float32 |\n| --- | --- | ---: | ---: |"
    )
    for row in gradients:
        print(f"| {row['activations']} | {row['type']} | {row['cosine']:.5f} | {row['length']:.4f} |")
    print(
        "\n| type | final held-out loss | relative to float32 | seconds per step |\n| --- | ---: | ---: | ---: |"
    )
    curves: list[dict[str, Any]] = []
    for name, overrides in CURVES.items():
        curves.append({"type": name, **train(arguments, overrides)})
        ratio = curves[-1]["heldout"][-1] / curves[0]["heldout"][-1]
        last = curves[-1]["heldout"][-1]
        print(f"| {name} | {last:.4f} | {ratio - 1:+.3%} | {curves[-1]['seconds_a_step']:.3f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"gradients": gradients, "curves": curves}, indent=1) + "\n")


def measure_gradients(config: Config) -> list[dict[str, Any]]:
    """Cosine and length of the adapter's gradient in each type against float32, with and without outliers."""
    folder = Path(config.model.name)
    exact = load_network(folder, read_architecture(folder), torch.float32, torch.device("cpu"))
    material = build_data(config, model_folder(config.model.name), read_architecture(folder), quiet=True)
    pack = Packer(2048).packs([material.training.row(index) for index in range(10)])[0]
    rows = []
    for activations in ("unchanged", f"outliers ({FACTOR:.0f}x)"):
        if activations != "unchanged":
            add_outliers(exact)
        reference = gradient(exact, pack)
        for name, network in (
            ("bfloat16", copy.deepcopy(exact).bfloat16()),
            ("int8, rest float32", in_int8(exact)),
            ("int8, rest bfloat16", in_int8(copy.deepcopy(exact).bfloat16())),
        ):
            rows.append(compare(activations, name, reference, gradient(network, pack)))
        threshold, quant._OUTLIER = quant._OUTLIER, float("inf")
        rows.append(
            compare(
                activations,
                "int8, without separate outlier columns",
                reference,
                gradient(in_int8(exact), pack),
            )
        )
        quant._OUTLIER = threshold
    return rows


def add_outliers(network: Llama) -> None:
    """Make some columns of every norm's output FACTOR times larger; the network computes the same function."""
    columns = list(OUTLIERS)
    for layer in network.model.layers:
        for before, linears in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            before.weight[columns] *= FACTOR
            for linear in linears:
                linear.weight[:, columns] /= FACTOR


def in_int8(network: Llama) -> Llama:
    """A copy with all frozen linear layers in int8."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                linear: Frozen = quant.Int8Linear(child.weight.data)
                linear.bias = child.bias
                setattr(parent, name, linear)
    return network


def gradient(network: Llama, pack: Pack) -> Tensor:
    """All adapter gradients of one pack as one float32 vector. The network does not change."""
    network = copy.deepcopy(network)
    attach(network, LoraSpec(16, 32.0, 0.0, ("all-linear",), False), seed=0)
    generator = torch.Generator().manual_seed(1)
    adapter_parameters = [
        (name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad
    ]
    with torch.no_grad():
        for name, parameter in adapter_parameters:
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    pack_loss(network, pack).backward()
    return torch.cat(
        [parameter.grad.flatten() for _, parameter in adapter_parameters if parameter.grad is not None]
    )


def compare(activations: str, name: str, reference: Tensor, other: Tensor) -> dict[str, Any]:
    """A row of the first table: cosine and relative length of `other`."""
    cosine = torch.nn.functional.cosine_similarity(reference, other, dim=0)
    return {
        "activations": activations,
        "type": name,
        "cosine": float(cosine),
        "length": float(other.norm() / reference.norm()),
    }


def train(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """The held-out and training losses of a run, and its median seconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            None,
            [
                f"model.name={arguments.model}",
                f"data.path={arguments.rows}",
                f"run.output={folder}/run",
                f"train.max_steps={arguments.steps}",
                "train.batch_size=16",
                "train.eval_every=50",
                "train.learning_rate=1e-3",
                "train.micro_batch_tokens=4096",
                *SHORT,
                "run.samples=0",
                *overrides,
            ],
        )
        run = lorafit.train(config, quiet=True)
        events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(event["seconds"] for event in events if event["event"] == "step")
    return {
        "overrides": overrides,
        "heldout": [event["loss"] for event in events if event["event"] == "heldout"],
        "training": [event["loss"] for event in events if event["event"] == "step"],
        "seconds_a_step": seconds[len(seconds) // 2],
    }


if __name__ == "__main__":
    main()

"""Layers of Qwen3.5-0.8B's shape in training: beside transformers + peft, and beside a Qwen3 of the same size.

    python -m benchmarks.hybrid_layer [--tokens 2048] [--dtype bfloat16]

Layers have the width 1,024, LoRA of rank 16 on every linear, and random weights; one text is read on one thread, and
seconds are the processor's. The first figure is a layer with a gated delta rule, forward and backward: transformers
runs on the CPU in its own torch code. The second is the rule alone, without the products around it, which are the same
on both sides. The third is a step of four layers, three with the rule and one with attention,
beside four layers of Qwen3 whose MLP is as wide as the same number of parameters needs. The fourth are the bytes that
both keep per token for the backward pass. It prints a table in Markdown and takes two or three minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.delta_rule import delta_rule
from lorafit.model.dtypes import DTYPES
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.memory import use_caching_allocator
from lorafit.model.mixer_shapes import DeltaHeads
from lorafit.model.weights import load_network

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "pad_token_id": 0,
}
DELTA, ATTENTION = "linear_attention", "full_attention"


def model_of(kind: str, **changes: Any) -> Any:
    """A random model of transformers."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def hybrid(layers: list[str]) -> Any:
    """Layers of Qwen3.5-0.8B's shape."""
    shape = {"num_hidden_layers": len(layers), "layer_types": layers, "linear_num_value_heads": 16}
    return model_of("qwen3_5_text", **shape)


def dense(parameters: int, layers: int) -> Any:
    """A Qwen3 with as many layers, whose MLP makes its parameters about as many."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}  # those of Qwen3-0.6B
    least = model_of("qwen3", num_hidden_layers=layers, intermediate_size=32, **heads)
    width = (parameters - least.num_parameters()) // (3 * SHAPE["hidden_size"] * layers) + 32
    return model_of("qwen3", num_hidden_layers=layers, intermediate_size=width // 32 * 32, **heads)


def adapted(model: Any, dtype: torch.dtype) -> Llama:
    """The same network in lorafit, with LoRA."""
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        folder = Path(name)
        network = load_network(folder, read_architecture(folder), dtype, torch.device("cpu"))
    attach(network, LoraSpec(16, 32.0, 0.0, ("all-linear",), False), seed=0)
    return network


def step(network: Llama, ids: Tensor) -> Tensor:
    """A forward and backward pass; the output."""
    out = network.normed(network.hidden(ids, PackedDocuments([len(ids)])))
    out.float().square().mean().backward()
    return out.detach()


def seconds(work: Callable[[], object], times: int) -> float:
    """The least processor seconds of `times`."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def rules(tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], Callable[[], None]]:
    """The rule alone, forward and backward, with the heads of that layer: lorafit's and transformers'."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    heads = DeltaHeads(16, 16, 128, 128)
    qkv = torch.randn(tokens, heads.channels, dtype=dtype, requires_grad=True)
    g, beta = (-torch.rand(tokens, 16)).requires_grad_(), torch.rand(tokens, 16).to(dtype).requires_grad_()

    def ours() -> None:
        delta_rule(qkv, g, beta, heads, [tokens])[0].float().square().mean().backward()

    def theirs() -> None:
        parts = (part.unflatten(-1, (16, 128))[None] for part in qkv.split(16 * 128, -1))
        out = torch_chunk_gated_delta_rule(*parts, g[None], beta[None], use_qk_l2norm_in_kernel=True)[0]
        out.float().square().mean().backward()

    return ours, theirs


def kept_bytes(network: Llama, ids: Tensor) -> int:
    """The bytes of all tensors that a forward pass keeps for the backward pass, beside the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = network.hidden(ids, PackedDocuments([len(ids)]))
    del out
    return sum(kept.values())


def main() -> None:
    """Print the table."""
    import peft

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, ids = DTYPES[wanted.dtype], torch.randint(0, 64, (wanted.tokens,))
    model = hybrid([DELTA])
    network = adapted(model, dtype)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model.to(dtype), lora).base_model.model.model

    def peers() -> Tensor:
        out = theirs(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        out.float().square().mean().backward()
        return out.detach()

    outs: list[Tensor] = []
    slow = seconds(lambda: outs.append(peers()), 1)
    use_caching_allocator()
    fast = seconds(lambda: outs.append(step(network, ids)), 3)
    difference = float((outs[0] - outs[-1]).abs().max())
    rule, their_rule = rules(wanted.tokens, dtype)
    slow_rule, fast_rule = seconds(their_rule, 1), seconds(rule, 3)
    both = hybrid([DELTA, DELTA, DELTA, ATTENTION])
    networks = {"hybrid": adapted(both, dtype), "Qwen3": adapted(dense(both.num_parameters(), 4), dtype)}
    times = {name: seconds(lambda one=one: step(one, ids), 3) for name, one in networks.items()}  # type: ignore[misc]
    sizes = {name: kept_bytes(one, ids) / wanted.tokens for name, one in networks.items()}
    print(f"{wanted.tokens:,} tokens, {wanted.dtype}, one thread; largest difference {difference:.2g}\n")
    print("| | hybrid | compared with | ratio |\n| --- | --- | --- | --- |")
    print(
        f"| a layer, forward and backward | {fast:.2f} s | transformers {slow:.2f} s | "
        f"{slow / fast:.1f} times as fast |"
    )
    print(
        f"| the rule alone | {fast_rule:.2f} s | transformers {slow_rule:.2f} s | "
        f"{slow_rule / fast_rule:.1f} times as fast |"
    )
    print(
        f"| a step of four layers | {times['hybrid']:.2f} s | Qwen3 {times['Qwen3']:.2f} s | "
        f"{times['hybrid'] / times['Qwen3']:.2f} times as long |"
    )
    print(
        f"| kept per token | {sizes['hybrid'] / 1000:.0f} kB | Qwen3 {sizes['Qwen3'] / 1000:.0f} kB | "
        f"{sizes['hybrid'] / sizes['Qwen3']:.2f} times as much |"
    )


if __name__ == "__main__":
    main()

"""A training step of layers with a gated delta rule, beside transformers + peft: processor seconds per layer.

    python -m benchmarks.hybrid_layer [--tokens 2048] [--dtype bfloat16] [--times 3]

The layers have the shape of Qwen3.5-0.8B's (width 1,024, 16 heads of 128), LoRA of rank 16 on every linear, and random
weights. One text is read; forward and backward pass are timed together, in seconds of the processor. transformers
runs on the CPU in its own torch code. Both compute the same numbers: the largest difference of the outputs is printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.dtypes import DTYPES
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.memory import use_caching_allocator
from lorafit.model.weights import load_network

LAYERS = 2
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 16,
    "layer_types": ["linear_attention"] * LAYERS,
    "pad_token_id": 0,
}


def seconds(work: Callable[[], object], times: int) -> float:
    """The least processor seconds per layer of `times`."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found) / LAYERS


def main() -> None:
    """Print the seconds of both."""
    import peft
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--times", type=int, default=3)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    dtype = DTYPES[wanted.dtype]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3_5_text", **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 64, (wanted.tokens,))
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        folder = Path(name)
        network = load_network(folder, read_architecture(folder), dtype, torch.device("cpu"))
        attach(network, LoraSpec(16, 32.0, 0.0, ("all-linear",), False), seed=0)
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(model.to(dtype), lora).base_model.model.model
        documents = PackedDocuments([wanted.tokens])

        def ours() -> torch.Tensor:
            out = network.normed(network.hidden(ids, documents))
            out.float().square().mean().backward()
            return out.detach()

        def peers() -> torch.Tensor:
            out = theirs(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            out.float().square().mean().backward()
            return out.detach()

        difference = float((ours() - peers()).abs().max())
        slow = seconds(peers, wanted.times)
        use_caching_allocator()
        fast = seconds(ours, wanted.times + 1)
    print(f"{wanted.tokens:,} tokens, {wanted.dtype}, one thread; largest difference {difference:.2g}")
    print(
        f"transformers + peft {slow:.3f} s per layer, lorafit {fast:.3f} s: {slow / fast:.1f} times as fast"
    )


if __name__ == "__main__":
    main()

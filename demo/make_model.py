"""Creates demo/model: a byte-level tokenizer and a small Llama, both trained on texts about the demo's world."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from texts import document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from lorafit.model.architecture import parse_architecture
from lorafit.model.llama import Llama

BLOCK = 256  # tokens of one training sequence
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def model_config(vocab_size: int) -> dict[str, object]:
    """config.json of the demo model, with Hugging Face's names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 160,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. It encodes every UTF-8 text, with <s> before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def blocks(tokenizer: Tokenizer, rng: random.Random) -> Iterator[list[int]]:
    """An endless iterator of BLOCK ids: concatenated documents, each from <s> to </s>, split into blocks."""
    stream: list[int] = []
    while True:
        for encoding in tokenizer.encode_batch([document(rng) for _ in range(256)]):
            stream += [*encoding.ids, 1]
        while len(stream) >= BLOCK:
            yield stream[:BLOCK]
            del stream[:BLOCK]


class EqualBlocks:
    """Attention of sequences of equal length in one call; lorafit's packed documents need a loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.positions = torch.arange(BLOCK).repeat(count)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q, k, v = (x.unflatten(0, (self.count, BLOCK)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


def initialise(network: Llama) -> None:
    """Normal weights with std 0.02, smaller for the projections into the residual stream; norm weights are one."""
    residual_scale = 1 / math.sqrt(2 * network.arch.num_hidden_layers)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 * (residual_scale if into_residual else 1))


def pretrain(network: Llama, source: Iterator[list[int]], steps: int, count: int, peak: float) -> None:
    """Train every parameter in float32: AdamW with warm-up and cosine schedule, `count` blocks per step."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    norms = [p for p in network.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    attend, started = EqualBlocks(count), time.monotonic()
    for step in range(steps):
        warmup, progress = min(1.0, (step + 1) / 50), step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        ids = torch.tensor([next(source) for _ in range(count)])  # (count, BLOCK)
        hidden = network.hidden(ids.flatten(), attend).unflatten(0, (count, BLOCK))
        logits = network.logits(hidden[:, :-1].flatten(0, 1))
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(
                f"step {step:5d}/{steps}  loss {loss.item():.3f}  {seconds:5.0f} s",
                file=sys.stderr,
                flush=True,
            )


def save(folder: Path, network: Llama, tokenizer: Tokenizer) -> None:
    """Write the model folder in Hugging Face's layout, with weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in network.named_parameters()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file gives access to the owner only
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    files: dict[str, dict[str, object]] = {
        "config.json": model_config(tokenizer.get_vocab_size()),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "max_new_tokens": 64},
        "special_tokens_map.json": {**names},
        "tokenizer_config.json": {
            **names,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model", help="model folder")
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps")
    parser.add_argument("--blocks", type=int, default=8, help=f"sequences of {BLOCK} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the vocabulary")
    parser.add_argument("--seed", type=int, default=1, help="seed of texts and weights")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; the number changes the last bits"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer([document(rng) for _ in range(3000)], args.vocab_size)
    network = Llama(parse_architecture(model_config(tokenizer.get_vocab_size()), "make_model.py"))
    initialise(network)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters", file=sys.stderr)
    pretrain(network, blocks(tokenizer, rng), args.steps, args.blocks, args.learning_rate)
    save(args.output, network, tokenizer)


if __name__ == "__main__":
    main()

"""How much the neighbours in a pack change a document: transformers' packing by position_ids, and ours.

    python -m benchmarks.leak

The networks are small and random, of the types that mix attention with other layers. A document of 64 tokens stands
behind another one in a pack. Its log-probabilities are compared with those that it has alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.weights import load_network

LENGTHS = (64, 64)
_SHAPE = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0}
TYPES = {
    "qwen3": {"intermediate_size": 128},
    "lfm2": {"block_ff_dim": 128, "block_multiple_of": 16, "full_attn_idxs": [2]},
    "qwen3_5_text": {
        "intermediate_size": 128,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


def differences(model_type: str, folder: Path) -> tuple[float, float, float]:
    """The largest difference of a log-probability: transformers at the first token, after it, and ours at any."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **_SHAPE, **TYPES[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if parameter.dim() == 3 else 0.12)
            elif name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(folder)
    network = load_network(folder, read_architecture(folder), torch.float32, torch.device("cpu"))
    ids = torch.randint(0, 512, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        packed = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        alone = model(input_ids=ids[None, LENGTHS[0] :], use_cache=False).logits[0]
        own_packed = network.logits(network.hidden(ids, PackedDocuments(LENGTHS)))
        own_alone = network.logits(network.hidden(ids[LENGTHS[0] :], PackedDocuments(LENGTHS[1:])))
    theirs, ours = (_difference(*pair) for pair in ((packed, alone), (own_packed, own_alone)))
    return float(theirs[0].max()), float(theirs[1:].max()), float(ours.max())


def _difference(packed: Tensor, alone: Tensor) -> Tensor:
    return (packed[LENGTHS[0] :].log_softmax(-1) - alone.log_softmax(-1)).abs()


def main() -> None:
    """Print a table in Markdown."""
    print(
        "| type | transformers, first token | transformers, later tokens | lorafit |\n| --- | --- | --- | --- |"
    )
    for model_type in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            first, later, ours = differences(model_type, Path(folder))
        print(f"| `{model_type}` | {first:.2g} | {later:.2g} | {ours:.2g} |")


if __name__ == "__main__":
    main()

"""Counts how often the first greedy token is the float32 model's: the engine in 16 and 8 bits, and transformers.

    python -m benchmarks.first_tokens MODEL ROWS [--prompts 200]

ROWS is a JSON list with `instruction`. The prompts are rendered by the model's chat template. A tie is a prompt whose
two best logits are equal: then the order of the vocabulary chooses the token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from benchmarks.report import table
from torch import Tensor

from lorafit.infer.model import load
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama

Logits = Callable[[Sequence[int]], Tensor]  # of the last position, (vocab_size,)


def ours(network: Llama) -> Logits:
    """Logits of the engine."""

    def logits(ids: Sequence[int]) -> Tensor:
        last = torch.tensor([len(ids) - 1])
        return network.logits(network.hidden(torch.tensor(ids), PackedDocuments([len(ids)]), last))[0]

    return logits


def theirs(model: Path, dtype: torch.dtype) -> Logits:
    """Logits of transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    return lambda ids: network(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1]


@torch.inference_mode()
def compare(expected: Sequence[int], prompts: Sequence[Sequence[int]], logits_of: Logits) -> tuple[int, int]:
    """(prompts with the expected token, prompts with a tie)."""
    equal = ties = 0
    for token, ids in zip(expected, prompts, strict=True):
        best = logits_of(ids).topk(2)
        equal += int(best.indices[0]) == token
        ties += bool(best.values[0] == best.values[1])
    return equal, ties


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    exact = load(arguments.model, device="cpu", dtype="float32")
    rows = json.loads(arguments.rows.read_text(encoding="utf-8"))[: arguments.prompts]
    prompts = [exact.prompt_ids(row["instruction"]) for row in rows]
    reference = ours(exact.network)
    with torch.inference_mode():
        expected = [int(reference(ids).argmax()) for ids in prompts]
    lines = []
    for name, make in {
        "lorafit bfloat16": lambda: ours(load(arguments.model, device="cpu", dtype="bfloat16").network),
        "lorafit int8": lambda: ours(load(arguments.model, device="cpu", quantize="int8").network),
        "transformers bfloat16": lambda: theirs(arguments.model, torch.bfloat16),
    }.items():
        equal, ties = compare(expected, prompts, make())
        lines.append([name, f"{equal} of {len(prompts)}", str(ties)])
    print(table(["engine", "first token as in float32", "ties"], lines))


if __name__ == "__main__":
    main()

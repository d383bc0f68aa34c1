"""The rows for all programs of speed.py, in an order that gives lorafit full packs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

LONGEST = 512  # the classic recipe truncates a row to this number of tokens


def classic_lengths(rows: Sequence[dict[str, str]], tokenizer_file: Path) -> list[int]:
    """Tokens of each row in the classic text, truncated as in the classic recipe."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts = []
    for row in rows:
        input_part = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        texts.append(f"### Instruction:\n{row['instruction']}\n\n{input_part}### Response:\n{row['output']}")
    return [min(LONGEST, len(encoding.ids)) for encoding in tokenizer.encode_batch(texts)]


def in_full_packs(lengths: Sequence[int], num_packs: int, pack_rows: int, pack_tokens: int) -> list[int]:
    """An order of the indices of `lengths` that begins with `num_packs` groups of `pack_rows` rows, each a full pack.

    Each group is drawn at random (seeded) until its sum is 98 % to 100 % of `pack_tokens`. For these rows this is also
    the mean size of a group. The other indices follow in their old order.
    """
    generator = random.Random(0)
    remaining = list(range(len(lengths)))
    chosen: list[int] = []
    for _ in range(num_packs):
        for _attempt in range(100_000):
            group = generator.sample(remaining, pack_rows)
            if 0.98 * pack_tokens <= sum(lengths[index] for index in group) <= pack_tokens:
                break
        else:
            raise SystemExit(f"error: no {pack_rows} rows of the data fill a pack of {pack_tokens} tokens")
        chosen += group
        remaining = [index for index in remaining if index not in group]
    return chosen + remaining


def write_rows(
    source: Path, tokenizer_file: Path, out: Path, num_packs: int, pack_rows: int, tokens: int
) -> float:
    """Write the rows of `source` to `out` in full packs. Returns the mean number of tokens of all rows."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    lengths = classic_lengths(rows, tokenizer_file)
    order = in_full_packs(lengths, num_packs, pack_rows, tokens)
    out.write_text(json.dumps([rows[index] for index in order]), encoding="utf-8")
    return sum(lengths) / len(lengths)

"""The rows that every program of speed.py reads, in an order that gives lorafit full packs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

LONGEST = 512  # where the classic recipe cuts a row


def classic_lengths(rows: Sequence[dict[str, str]], tokenizer_file: Path) -> list[int]:
    """Tokens of each row in the classic text, cut as the classic recipe cuts."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts = []
    for row in rows:
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        texts.append(f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}")
    return [min(LONGEST, len(encoding.ids)) for encoding in tokenizer.encode_batch(texts)]


def in_full_packs(lengths: Sequence[int], num_packs: int, pack_rows: int, pack_tokens: int) -> list[int]:
    """All indices of `lengths`; of the first `num_packs * pack_rows` each `pack_rows` sum to nearly `pack_tokens`.

    Each such group is drawn at random (seeded) until it fits: 98 % to 100 % full, which for these rows is also
    what an average group comes to. The rest follows in its old order.
    """
    generator = random.Random(0)
    left = list(range(len(lengths)))
    chosen: list[int] = []
    for _ in range(num_packs):
        for _attempt in range(100_000):
            group = generator.sample(left, pack_rows)
            if 0.98 * pack_tokens <= sum(lengths[index] for index in group) <= pack_tokens:
                break
        else:
            raise SystemExit(f"error: no {pack_rows} rows of the data fill a pack of {pack_tokens} tokens")
        chosen += group
        left = [index for index in left if index not in group]
    return chosen + left


def write_rows(
    source: Path, tokenizer_file: Path, out: Path, num_packs: int, pack_rows: int, tokens: int
) -> float:
    """Write the rows of `source` to `out` in full packs; returns the mean tokens of all rows."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    lengths = classic_lengths(rows, tokenizer_file)
    order = in_full_packs(lengths, num_packs, pack_rows, tokens)
    out.write_text(json.dumps([rows[index] for index in order]), encoding="utf-8")
    return sum(lengths) / len(lengths)

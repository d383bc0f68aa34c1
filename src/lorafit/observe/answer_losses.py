"""The losses of the answers of a run with their questions and without them, by the base model: one file in the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lorafit.storage.atomic import write_lines
from lorafit.storage.safe_read import MB, read_bytes

MOST_BYTES = 1024 * MB
Losses = NDArray[np.float64]


class AnswerLosses(NamedTuple):
    """Of each row with number `rows` (from 0, over all sources): mean losses of the tokens of its answers but the last,
    with and without the question, and the loss of the last token, which ends the answer. All are (rows,); `alone` is
    not a number where a row has no question.
    """

    rows: NDArray[np.int64]
    asked: Losses
    alone: Losses
    end: Losses


def write_answer_losses(path: Path, losses: AnswerLosses, data: str) -> None:
    """Replace the file at `path`; `data` is the digest of the rows. Raises RunError."""
    content = save(losses._asdict(), {"data": data})
    write_lines(path, [content], len(content))


def read_answer_losses(path: Path, data: str) -> AnswerLosses | None:
    """The losses, or None where there are none of the rows with the digest `data`."""
    try:
        content = read_bytes(path, MOST_BYTES)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if header["__metadata__"]["data"] != data:
            return None
        tensors = load(content)
        losses = AnswerLosses(
            *(
                tensors[name].astype(kind)
                for name, kind in zip(AnswerLosses._fields, ("i8", *["f8"] * 3), strict=True)
            )
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecursionError):
        return None
    shapes = {values.shape for values in losses}
    return losses if len(shapes) == 1 and losses.rows.ndim == 1 else None

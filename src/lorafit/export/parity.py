"""Compares an export with the live adapter: a fresh process reads it back with the program that people will use.

Compared on fixed prompts: the rendered text, the token ids, the tokens that end an answer, greedy answers, and the
logits. The bound of the logits is three times what rounding to the export's type does to these logits in our own
engine, so it fits every network. If the program rounds weights only, its logits must also equal those that our engine
computes from the rounded weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorafit.errors import Problem, RunError
from lorafit.export.kinds import Export
from lorafit.export.readback import READERS
from lorafit.export.reference import MAX_TOKENS, Prompt, Reference, log_probabilities
from lorafit.export.run_source import RunSource
from lorafit.verify.logits import Difference, largest
from lorafit.verify.reload import run_module

FILE = "parity.json"
TIMES_NOISE = 3.0
FLOAT_NOISE = 1e-4  # of the spread of the logits: sums in another order
_PASSED_ON = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def verify(
    source: RunSource, reference: Reference, export: Export, folder: Path, base: Path | None = None
) -> dict[str, Any]:
    """The content of `parity.json` for the export in `folder`; `base` is the file that an adapter is put on.

    Raises RunError naming every difference from the live adapter.
    """
    reader = READERS[export.reader]
    if missing := reader.missing():
        line = f"pip install 'lorafit[{reader.extra}]'"
        return unverified(f"{' and '.join(missing)} not installed ({line})")
    request = {
        "reader": export.reader,
        "folder": str(folder),
        "is_adapter": export.is_adapter,
        "base": str(base or source.base.path),
        "arithmetic": reference.arithmetic,
        "threads": min(8, os.cpu_count() or 1),
        "max_tokens": MAX_TOKENS,
        "stop_ids": list(source.contract.stop_ids),
        "bos": source.contract.bos or "",
        "bos_id": source.contract.bos_id,
        "prompts": [asdict(prompt) for prompt in reference.prompts],
    }
    place = f"the {export.title}, read back by {export.reader}"
    result, logits = _read_back(request, place)
    faults, distance = compare(source, reference, result, logits)
    if faults:
        raise RunError.of(Problem(fault, place) for fault in faults)
    answers = zip(result["prompts"], reference.prompts, strict=True)
    return {
        "verified": True,
        "program": result["program"],
        "prompts": len(reference.prompts),
        "positions": len(reference.logits),
        "arithmetic": reference.arithmetic,
        "largest_logit_difference": round(distance.size, 6),
        "bound": round(distance.bound, 6),
        "logit_spread": round(reference.spread, 3),
        "same_greedy_answers": sum(answer["greedy"] == prompt.answer for answer, prompt in answers),
    }


def unverified(why: str) -> dict[str, Any]:
    """The content of `parity.json` for an export that was not compared."""
    return {"verified": False, "why": why}


def compare(
    source: RunSource, reference: Reference, result: Mapping[str, Any], logits: Tensor
) -> tuple[list[str], Difference]:
    """(every difference of a program's `result` from the live adapter, the difference of the logits)."""
    decode, expected = source.renderer.tokenizer.decode, reference.logits
    faults = [
        f"the stop token {decode([int(token)])!r} ({token}) does not end an answer"
        for token, ends in result["stops"].items()
        if not ends
    ]
    float_noise = FLOAT_NOISE * reference.spread
    if logits.shape != expected.shape:
        faults.append(f"logits have shape {tuple(logits.shape)}, the adapter's {tuple(expected.shape)}")
        logits = torch.full_like(expected, torch.nan)
    theirs = log_probabilities(logits)
    size = largest(theirs - log_probabilities(expected))
    live = Difference(size, TIMES_NOISE * reference.noise + float_noise)
    rest = Difference(largest(theirs - log_probabilities(reference.rounded)), float_noise)
    if not live.is_accepted:
        faults.append(
            f"logits differ by up to {live.size:.4g}, the bound is {live.bound:.4g}: three times the effect of "
            f"rounding to this type (the adapter's logits span {reference.spread:.4g})"
        )
    elif reference.is_exact and not rest.is_accepted:
        faults.append(
            f"logits differ by up to {rest.size:.4g} from those of the rounded weights; sums in another order explain "
            f"{rest.bound:.4g}"
        )
    starts = accumulate((len(prompt.answer) + 1 for prompt in reference.prompts), initial=0)
    pairs = zip(reference.prompts, result["prompts"], starts, strict=False)
    for number, (prompt, answer, start) in enumerate(pairs, 1):
        where = f"prompt {number} ({prompt.messages[-1].content[:30]!r})"
        if answer["text"] != prompt.text:
            faults.append(f"{where} is rendered otherwise: {_excerpts(answer['text'], prompt.text)}")
        elif answer["ids"] != prompt.ids:
            faults.append(f"{where} becomes other tokens: {_excerpts(answer['ids'], prompt.ids)}")
        rows = reference.logits[start : start + len(prompt.answer)]
        if fault := _other_answer(prompt, answer["greedy"], rows, live.bound):
            faults.append(f"{where} is answered otherwise: {fault}")
    return faults, live


def _other_answer(prompt: Prompt, greedy: Sequence[int], rows: Tensor, bound: float) -> str | None:
    """The first difference of a greedy answer from the live one that rounding does not explain; None if none."""
    for index, (live, token) in enumerate(zip_longest(prompt.answer, greedy)):
        if live != token:
            if live is None:
                return f"it continues after token {index}, where the adapter ends"
            if token is not None and float(rows[index, live] - rows[index, token]) <= 2 * bound:
                return None
            return f"token {index + 1} is {token}, the adapter's {live}"
    return None


def _excerpts(text: Sequence[Any], expected: Sequence[Any]) -> str:
    """Both sequences around the first difference."""
    shorter = min(len(text), len(expected))
    start = next((index for index in range(shorter) if text[index] != expected[index]), shorter)
    around = slice(max(0, start - 8), start + 24)
    return f"{text[around]!r} instead of {expected[around]!r}"


def _read_back(request: Mapping[str, Any], place: str) -> tuple[dict[str, Any], Tensor]:
    """(result, logits) of a fresh process without access tokens and without a connection."""
    with tempfile.TemporaryDirectory(prefix="lorafit-") as name:
        files = [Path(name) / part for part in ("request.json", "result.json", "logits.safetensors")]
        files[0].write_text(json.dumps(request), encoding="utf-8")
        environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": name}
        if reason := run_module("lorafit.export.readback", files, environment):
            raise RunError(
                f"the export cannot be read back: {reason}",
                place=place,
                hint="nothing was left behind; `--no-verify` writes it, marked as not verified",
            )
        return json.loads(files[1].read_text(encoding="utf-8")), load_file(files[2])["logits"]

"""Whether an export answers like the adapter: read back in a fresh process, by the program that people will use.

Compared on fixed prompts: the rendered text, the token ids, the tokens that end an answer, greedy answers, and the
logits. The bound of the logits is not a constant: it is three times what rounding to the export's type does to these
very logits in our own engine, so a network that is deep or sensitive is not blamed, and a fault is not excused. Where
the program rounds weights only, it must also arrive at what our engine makes of the rounded weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.errors import Problem, RunError
from lorafit.export.reference import MAX_TOKENS, Prompt, Reference, log_probabilities
from lorafit.export.run_source import RunSource

FILE = "parity.json"
TIMES_NOISE = 3.0
FLOAT_NOISE = 1e-4  # of the spread of the logits: sums in another order
_INSTALL = {"transformers": "verify", "peft": "verify", "llama.cpp": "gguf"}
_PASSED_ON = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def verify(
    source: RunSource,
    reference: Reference,
    kind: str,
    folder: Path,
    *,
    file: str = "",
    base: Path | None = None,
) -> dict[str, Any]:
    """What `parity.json` will say of the export in `folder`; `file` is a GGUF file there, `base` below an adapter.

    Raises RunError naming every way in which the export answers otherwise than the live adapter.
    """
    request = {
        "kind": kind,
        "folder": str(folder),
        "file": file,
        "base": str(base or source.base.path),
        "arithmetic": reference.arithmetic,
        "threads": min(8, os.cpu_count() or 1),
        "max_tokens": MAX_TOKENS,
        "stop_ids": list(source.contract.stop_ids),
        "bos": source.contract.bos or "",
        "bos_id": source.contract.bos_id,
        "prompts": [asdict(prompt) for prompt in reference.prompts],
    }
    result, logits = _read_back(request)
    if missing := result.get("missing"):
        extras = sorted({_INSTALL[name] for name in missing})
        line = f"pip install 'lorafit[{','.join(extras)}]'"
        return unverified(f"{' and '.join(missing)} not installed ({line})")
    bound = TIMES_NOISE * reference.noise + FLOAT_NOISE * reference.spread
    faults, largest = compare(source, reference, result, logits, bound)
    if faults:
        raise RunError.of(Problem(fault, _KINDS[kind]) for fault in faults)
    return {
        "verified": True,
        "program": result["program"],
        "prompts": len(reference.prompts),
        "positions": len(reference.logits),
        "arithmetic": reference.arithmetic,
        "largest_logit_difference": round(largest, 6),
        "bound": round(bound, 6),
        "logit_spread": round(reference.spread, 3),
        "same_greedy_answers": sum(
            made["greedy"] == prompt.answer
            for made, prompt in zip(result["prompts"], reference.prompts, strict=True)
        ),
    }


_KINDS = {
    "merged": "the merged model, read back by transformers",
    "adapter": "the adapter, read back by peft",
    "gguf": "the GGUF file, read back by llama.cpp",
    "gguf-lora": "the GGUF adapter, read back by llama.cpp",
}


def unverified(why: str) -> dict[str, Any]:
    """What `parity.json` says of an export that was not compared."""
    return {"verified": False, "why": why}


def compare(
    source: RunSource,
    reference: Reference,
    result: Mapping[str, Any],
    logits: NDArray[np.float32],
    bound: float,
) -> tuple[list[str], float]:
    """(every way in which a program's `result` differs from the live adapter, the largest difference of logits)."""
    faults: list[str] = []
    tokenizer = source.renderer.tokenizer
    for token, ends in result["stops"].items():
        if not ends:
            faults.append(
                f"the stop token {tokenizer.decode([int(token)])!r} ({token}) does not end an answer"
            )
    if logits.shape != reference.logits.shape:
        faults.append(f"logits have shape {logits.shape}, the adapter's {reference.logits.shape}")
        return faults, float("inf")
    difference = np.abs(log_probabilities(logits) - log_probabilities(reference.logits))
    largest = float(np.nan_to_num(difference, nan=np.inf).max())
    if not largest <= bound:
        faults.append(
            f"logits differ by up to {largest:.4g}, the bound is {bound:.4g}: three times what rounding to this type "
            f"does (the adapter's logits span {reference.spread:.4g})"
        )
    apart = np.abs(log_probabilities(logits) - log_probabilities(reference.rounded))
    rest = float(np.nan_to_num(apart, nan=np.inf).max())
    if reference.is_exact and largest <= bound and not rest <= FLOAT_NOISE * reference.spread:
        faults.append(
            f"logits differ by up to {rest:.4g} from those of the rounded weights, where sums in another order explain "
            f"{FLOAT_NOISE * reference.spread:.4g}"
        )
    starts = accumulate((len(prompt.answer) + 1 for prompt in reference.prompts), initial=0)
    pairs = zip(reference.prompts, result["prompts"], starts, strict=False)
    for number, (prompt, made, start) in enumerate(pairs, 1):
        where = f"prompt {number} ({prompt.messages[-1].content[:30]!r})"
        if made["text"] != prompt.text:
            faults.append(f"{where} is rendered otherwise: {_apart(made['text'], prompt.text)}")
        elif made["ids"] != prompt.ids:
            faults.append(f"{where} becomes other tokens: {_apart(made['ids'], prompt.ids)}")
        rows = reference.logits[start : start + len(prompt.answer)]
        if fault := _other_answer(prompt, made["greedy"], rows, bound):
            faults.append(f"{where} is answered otherwise: {fault}")
    return faults, largest


def _other_answer(
    prompt: Prompt, greedy: Sequence[int], rows: NDArray[np.float32], bound: float
) -> str | None:
    """Where a greedy answer leaves the live one for a token that was not as good as equal; None if nowhere."""
    for place, (live, made) in enumerate(zip_longest(prompt.answer, greedy)):
        if live != made:
            if live is None:
                return f"it goes on after token {place}, where the adapter ends"
            if made is not None and float(rows[place, live] - rows[place, made]) <= 2 * bound:
                return None
            return f"token {place + 1} is {made}, the adapter's {live}"
    return None


def _apart(made: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Both sequences around the first place where they differ."""
    at = next(
        (i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted))
    )
    around = slice(max(0, at - 8), at + 24)
    return f"{made[around]!r} instead of {wanted[around]!r}"


def _read_back(request: Mapping[str, Any]) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """(result, logits) of a fresh process that has no token, no connection and nothing of this one's memory."""
    with tempfile.TemporaryDirectory(prefix="lorafit-") as name:
        request_file, result_file, logits_file = (
            Path(name) / part for part in ("in.json", "out.json", "out.npy")
        )
        request_file.write_text(json.dumps(request), encoding="utf-8")
        environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": name}
        words = [sys.executable, "-m", "lorafit.export.readback", str(request_file)]
        words += [str(result_file), str(logits_file)]
        done = subprocess.run(  # noqa: S603 (this program itself)
            words, capture_output=True, text=True, check=False, env=environment
        )
        result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.is_file() else {}
        if done.returncode or not result or "error" in result:
            said = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            ended = f"the process ended with {done.returncode}"
            raise RunError(
                f"the export cannot be read back: {result.get('error') or ': '.join([ended, *said])}",
                place=_KINDS[str(request["kind"])],
                hint="nothing was left behind; `--no-verify` writes it all the same, marked as not verified",
            )
        logits = np.load(logits_file) if logits_file.is_file() else np.empty((0, 0), np.float32)
        return result, logits

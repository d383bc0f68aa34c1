"""Compares an export with the live adapter: a fresh process reads it back with the program that people will use.

Compared are, on fixed prompts: the rendered text, the token ids, the tokens that end an answer, and the greedy answers;
on rows of the run: the loss. What an export may cost is in the record of its type (export/number_types.py). A type
without blocks must also give the same log-probabilities: the bound is three times what rounding to the type does to
them in our own engine. If the program rounds weights only, they must equal those that our engine computes from the
rounded weights.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorafit.errors import Problem, RunError
from lorafit.export.gguf_base import own_template
from lorafit.export.kinds import Export
from lorafit.export.number_types import NumberType
from lorafit.export.readback import READERS
from lorafit.export.reference import Advance, Reference, Scores
from lorafit.export.run_source import RunSource
from lorafit.verify.logits import Difference
from lorafit.verify.reload import run_module

FILE = "parity.json"
TIMES_NOISE = 3.0
FLOAT_NOISE = 1e-4  # of the spread of the logits: sums in another order
LEAST_LOSS = 0.25  # nats: a share of the loss is a share of at least this
_PASSED_ON = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclass(frozen=True, slots=True)
class Cost:
    """What an export loses against the live adapter.

    `equal` of the greedy answers are equal to the token, `tied` more differ first where two tokens are about equally
    probable. `agreement` is the share of the scored tokens at which the most probable token is the adapter's. `loss`
    and `adapter_loss` are in nats per token, and `error` is the standard error of their difference.
    """

    equal: int
    tied: int
    agreement: float
    loss: float
    adapter_loss: float
    error: float

    @property
    def rise(self) -> float:
        """The rise of the loss as a share of it; negative if the export's loss is lower."""
        return (self.loss - self.adapter_loss) / self._scale

    @property
    def certain_rise(self) -> float:
        """The least rise that the tokens show: two standard errors less."""
        return self.rise - 2 * self.error / self._scale

    @property
    def _scale(self) -> float:
        return max(self.adapter_loss, LEAST_LOSS)


def read_back(
    source: RunSource,
    reference: Reference,
    export: Export,
    folder: Path,
    base: Path | None = None,
    advance: Advance = lambda done, total: None,
    ask: tuple[Sequence[Sequence[int]], int] = ((), 0),
) -> tuple[dict[str, Any], Scores]:
    """(result, scores) of the program that reads the export in `folder`; `base` is what an adapter is put on.

    llama.cpp also generates answers to `ask`, prompts as ids and the most tokens of an answer; the result then has
    them. Raises RunError if the program cannot read the export.
    """
    request = {
        "reader": export.reader,
        "folder": str(folder),
        "name": source.name,
        "is_adapter": export.is_adapter,
        "base": str(base or source.base.path),
        "template": own_template(source) if export.base_of is not None else None,
        "arithmetic": reference.arithmetic,
        "threads": min(8, torch.get_num_threads()),
        "stop_ids": list(source.contract.stop_ids),
        "bos": source.contract.bos or "",
        "bos_id": source.contract.bos_id,
        "prompts": [asdict(prompt) for prompt in reference.prompts],
        "ask": ask,
        "texts": [(text.ids, list(text.positions)) for text in reference.texts],
    }
    result, tensors = _in_process(request, place_of(export), advance)
    return result, Scores(**tensors)


def place_of(export: Export) -> str:
    """The place of a fault of an export, for messages."""
    return f"the {export.title}, read back by {export.reader}"


def missing(export: Export) -> str:
    """Why an export cannot be read back here: the packages that are not installed; "" if none."""
    reader = READERS[export.reader]
    names = reader.missing()
    return f"{' and '.join(names)} not installed (pip install 'lorafit[{reader.extra}]')" if names else ""


def outcome(
    source: RunSource,
    reference: Reference,
    export: Export,
    record: NumberType,
    result: Mapping[str, Any],
    scores: Scores,
) -> dict[str, Any]:
    """The content of `parity.json`. Raises RunError naming every difference from the live adapter that is too large."""
    faults, cost, distance = compare(source, reference, record, result, scores)
    if faults:
        raise RunError.of(Problem(fault, place_of(export), _hint(export, record)) for fault in faults)
    rows = reference.rows
    content = {
        "verified": True,
        "program": result["program"],
        "prompts": len(reference.prompts),
        "same_greedy_answers": cost.equal,
        "same_up_to_a_tie": cost.tied,
        "loss_on": rows.name if rows.texts else "the adapter's own answers",
        "loss_rows": len(rows.texts),
        "loss_tokens": rows.num_scored or reference.num_answered,
        "adapter_loss": round(cost.adapter_loss, 6),
        "loss": round(cost.loss, 6),
        "loss_rise": round(cost.rise, 6),
        "loss_rise_error": round(cost.rise - cost.certain_rise, 6) / 2,
        "most_loss_rise": record.bounds.loss,
        "tokens": len(scores.scored),
        "agreement": round(cost.agreement, 6),
        "least_agreement": record.bounds.agreement,
        "arithmetic": reference.arithmetic,
    }
    if not rows.texts:
        content["no_rows"] = rows.name
    if distance is not None:
        content["largest_difference"] = round(distance.size, 6)
        content["most_difference"] = round(distance.bound, 6)
    return content


def unverified(why: str) -> dict[str, Any]:
    """The content of `parity.json` for an export that was not compared."""
    return {"verified": False, "why": why}


def sentence(outcome: Mapping[str, Any]) -> str:
    """What a verified export costs, in one line for people."""
    answers = f"{outcome['same_greedy_answers']} of {outcome['prompts']} greedy answers equal"
    if tied := outcome["same_up_to_a_tie"]:
        answers += f" ({tied} more up to two tokens about equally probable)"
    rise = rise_text(outcome["loss_rise"], outcome["adapter_loss"])
    loss = f"loss {outcome['adapter_loss']:.4f} -> {outcome['loss']:.4f} ({rise})"
    where = f"{outcome['loss_tokens']} tokens of "
    where += f"{outcome['loss_rows']} {outcome['loss_on']}" if outcome["loss_rows"] else outcome["loss_on"]
    return f"{answers}; {loss} on {where}; same most probable token at {outcome['agreement']:.1%}"


def rise_text(rise: float, adapter_loss: float) -> str:
    """A rise for people: as a share of the loss, or in nats where the loss is so low that a share says nothing."""
    return f"{rise:+.2%}" if adapter_loss >= LEAST_LOSS else f"{rise * LEAST_LOSS:+.4f}"


def cost_of(reference: Reference, record: NumberType, scores: Scores) -> tuple[Cost, Difference | None]:
    """(what the export loses, the difference of the log-probabilities for a type without blocks)."""
    live, distance = reference.live, None
    if not record.has_blocks:
        noise = 0.0 if reference.rounded is None else live.difference(reference.rounded)
        bound = TIMES_NOISE * noise + FLOAT_NOISE * reference.spread
        distance = Difference(scores.difference(live), bound)
    near = 0.0 if distance is None else 2 * distance.bound
    margins = (scores.best_scored - scores.scored).tolist()
    equal = tied = 0
    starts = accumulate((len(prompt.answer) for prompt in reference.prompts), initial=0)
    for start, prompt in zip(starts, reference.prompts, strict=False):
        theirs = scores.best[start : start + len(prompt.answer)].tolist()
        other = [at for at, pair in enumerate(zip(prompt.answer, theirs, strict=True)) if len(set(pair)) > 1]
        equal += not other
        tied += bool(other) and margins[start + other[0]] <= near
    agreement = float((scores.best == live.best).double().mean())
    part = slice(reference.num_answered if reference.rows.texts else 0, None)
    loss, live_loss = -scores.scored[part].double(), -live.scored[part].double()
    error = float((loss - live_loss).std(correction=0)) / len(loss) ** 0.5
    return Cost(equal, tied, agreement, float(loss.mean()), float(live_loss.mean()), error), distance


def compare(
    source: RunSource,
    reference: Reference,
    record: NumberType,
    result: Mapping[str, Any],
    scores: Scores,
) -> tuple[list[str], Cost, Difference | None]:
    """(every difference of a program's results from the live adapter that is too large, and as `cost_of`)."""
    decode = source.renderer.tokenizer.decode
    faults = [
        f"the stop token {decode([int(token)])!r} ({token}) does not end an answer"
        for token, ends in result["stops"].items()
        if not ends
    ]
    if scores.first.shape != reference.live.first.shape:
        shapes = f"{len(scores.first)} logits, the adapter {len(reference.live.first)}"
        raise RunError.of([Problem(f"the program gives {shapes}")])
    cost, distance = cost_of(reference, record, scores)
    if distance is not None and not distance.is_accepted:
        faults.append(
            f"log-probabilities differ by up to {distance.size:.4g}, the bound is {distance.bound:.4g}: three times "
            "the effect of rounding to this type"
        )
    elif reference.is_exact and reference.rounded is not None:
        rest = Difference(scores.difference(reference.rounded), FLOAT_NOISE * reference.spread)
        if not rest.is_accepted:
            faults.append(
                f"log-probabilities differ by up to {rest.size:.4g} from those of the rounded weights; sums in another "
                f"order explain {rest.bound:.4g}"
            )
    number = len(reference.prompts)
    if not record.has_blocks and cost.equal + cost.tied < number:
        faults.append(f"only {cost.equal + cost.tied} of {number} greedy answers are equal")
    if not cost.certain_rise <= record.bounds.loss:
        faults.append(
            f"the loss rises from {cost.adapter_loss:.4f} to {cost.loss:.4f} "
            f"({rise_text(cost.rise, cost.adapter_loss)}); a {record.name} export may cost {record.bounds.loss:.1%}"
            + (f" of {LEAST_LOSS} nats" if cost.adapter_loss < LEAST_LOSS else "")
        )
    if cost.agreement < record.bounds.agreement:
        faults.append(
            f"the most probable token is the adapter's at {cost.agreement:.1%} of {len(scores.scored)} tokens, and a "
            f"{record.name} export needs {record.bounds.agreement:.0%}; {cost.equal} of {number} greedy answers are "
            "equal"
        )
    for at, (prompt, answer) in enumerate(zip(reference.prompts, result["prompts"], strict=True), 1):
        where = f"prompt {at} ({prompt.messages[-1].content[:30]!r})"
        if answer["text"] != prompt.text:
            faults.append(f"{where} is rendered otherwise: {_excerpts(answer['text'], prompt.text)}")
        elif answer["ids"] != prompt.ids:
            faults.append(f"{where} becomes other tokens: {_excerpts(answer['ids'], prompt.ids)}")
    return faults, cost, distance


def _hint(export: Export, record: NumberType) -> str:
    """What to do about an export that costs too much: nothing to add for types without blocks."""
    if not record.has_blocks:
        return ""
    better = "`--type q8_0`" if record.name != "q8_0" else "`--type bf16`"
    return f"{better}, or `--fit`, which finds the smallest type that keeps the answers"


def _excerpts(text: Sequence[Any], expected: Sequence[Any]) -> str:
    """Both sequences around the first difference."""
    shorter = min(len(text), len(expected))
    start = next((index for index in range(shorter) if text[index] != expected[index]), shorter)
    around = slice(max(0, start - 8), start + 24)
    return f"{text[around]!r} instead of {expected[around]!r}"


def _in_process(
    request: Mapping[str, Any], place: str, advance: Advance
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(result, scores) of a fresh process without access tokens and without a connection."""
    with tempfile.TemporaryDirectory(prefix="lorafit-") as name:
        files = [Path(name) / part for part in ("request.json", "result.json", "scores.safetensors")]
        files[0].write_text(json.dumps(request), encoding="utf-8")
        environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HOME": name}
        # Threads that wait sleep: those of llama.cpp would otherwise spin, which on a busy machine takes minutes.
        environment["OMP_WAIT_POLICY"] = "passive"
        if reason := run_module("lorafit.export.readback", files, environment, advance=advance):
            raise RunError(
                f"the export cannot be read back: {reason}",
                place=place,
                hint="nothing was left behind; `--no-verify` writes it, marked as not verified",
            )
        return json.loads(files[1].read_text(encoding="utf-8")), load_file(files[2])

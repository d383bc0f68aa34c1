"""Checks of the rows of a run: read once more, compared with their tokens, and judged. No torch here.

The findings are stored beside the cached tokens, so that a second start with the same tokens reads no rows. They hold
row numbers, not places or verdicts: those are made anew each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lorafit.check.preference_checks import PairFindings, Pairs
from lorafit.check.text_checks import Finding, TextFindings, Texts
from lorafit.check.token_checks import TokenFindings, Tokens
from lorafit.data.build import TrainingData
from lorafit.data.contract import PromptContract, begins_with
from lorafit.data.row_index import RowIndex
from lorafit.data.row_preview import histogram as bins_of
from lorafit.data.sources import RowReader
from lorafit.data.token_cache import load_facts, store_facts
from lorafit.errors import MAX_LISTED, CheckResult, Outcome
from lorafit.observe import units
from lorafit.observe.progress import progress
from lorafit.version import __version__

CHECKS = 2  # to be raised whenever the same rows would give other findings
_FEW_SUPERVISED = 0.02  # of the tokens: below, most of the computing trains nothing
_MANY_NEAR = 0.01  # of the rows: below, near duplicates are no warning
_MOST_LONGER, _FEW_PAIRS = 0.8, 20  # share of pairs with a longer winner; fewer pairs show nothing
_BARS = " ▏▎▍▌▋▊▉█"
_SHOW = "look at one with `lorafit show --row N`"
_NICE = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10_000)


@dataclass(frozen=True)
class RowFindings:
    """The findings in rows: `tokens` is None without a tokenizer, `pairs` without preferences; `is_complete`: all rows
    were read.
    """

    texts: TextFindings
    tokens: TokenFindings | None
    is_complete: bool
    pairs: PairFindings | None = None


_FINDINGS = TypeAdapter(RowFindings)


def find(training_data: TrainingData, most: int | None, quiet: bool) -> RowFindings:
    """The findings in at most about `most` rows: stored ones for the same tokens, split and bound, else new ones."""
    num_rows = training_data.index.num_rows
    bound = None if most is None or most >= num_rows else most
    parts = [CHECKS, __version__, training_data.cache_key, training_data.digest(), bound]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if (findings := _stored(key, num_rows)) is None:
        with progress("checking rows", quiet=quiet) as advance:
            findings = inspect(training_data.index.sources.reader(), training_data, bound, advance)
        store_facts(key, _FINDINGS.dump_python(findings, mode="json"))
    return findings


def _stored(key: str, num_rows: int) -> RowFindings | None:
    """The stored findings, None where there are none that fit `num_rows` rows."""
    try:
        findings = _FINDINGS.validate_python(load_facts(key))
    except ValidationError:  # also where nothing is stored
        return None
    parts = (findings.texts, findings.tokens, findings.pairs)
    sections = [vars(section) for section in parts if section is not None]
    listed = [value.rows for section in sections for value in section.values() if isinstance(value, Finding)]
    return findings if all(0 <= row < num_rows for rows in listed for row in rows) else None


def inspect(
    reader: RowReader,
    training_data: TrainingData | None = None,
    most: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> RowFindings:
    """Read the rows of `reader` once, at most about `most`; `training_data` has their tokens.

    `advance` is called with (bytes read, bytes in all). Raises DataError with the problems of all rows.
    """
    texts = Texts(training_data.tokenizer.control if training_data else ())
    tokens = Tokens(training_data.renderer, training_data.encoded) if training_data else None
    pairs, is_complete = Pairs(), True
    for chunk in reader.chunks():
        if most is not None and texts.num_rows >= most:
            is_complete = False
            break
        if chunk.rows:
            texts.add(chunk.rows)
            pairs.add(chunk.rows)
        if chunk.rows and tokens is not None:
            tokens.add(chunk.rows)
        if advance:
            advance(*reader.progress())
    held_out = training_data.heldout.numbers if training_data else np.array(reader.heldout(), dtype=np.int64)
    of_pairs = pairs.finish(held_out)
    has_pairs = any(summary.format == "preference" for summary in reader.summaries) or of_pairs.num_pairs
    return RowFindings(texts.finish(held_out), tokens, is_complete, of_pairs if has_pairs else None)


def row_verdicts(
    findings: RowFindings, index: RowIndex, training_data: TrainingData | None = None
) -> list[CheckResult]:
    """A result for each check of the rows; without `training_data` (no tokenizer) only of their texts."""
    texts, tokens = findings.texts, findings.tokens
    account = _account(training_data) if training_data else []
    num_heldout = len(training_data.heldout) if training_data else index.num_heldout
    leaks = [_leaks(texts, num_heldout, index)] if training_data or num_heldout else []
    verdicts = [
        _rows(findings, index), *account, _answers(texts, index), _repeats(texts, index), *leaks,
        _encoding(texts, index), _controls(texts, index, training_data),
    ]  # fmt: skip
    if findings.pairs is not None:
        verdicts += _pairs(findings.pairs, index)
    if texts.arguments.count:
        message = (
            f"arguments are not valid JSON in {_count(texts.arguments.count)} ({texts.arguments.example})"
        )
        hint = "they are trained as they are: correct them, or remove the rows"
        verdicts.append(_result("calls", "warn", message, texts.arguments, index, hint))
    if training_data is not None and tokens is not None:
        contract = training_data.renderer.contract
        verdicts += [
            _stops(tokens, contract, index),
            _bos(tokens, contract, index),
            _round_trip(tokens, index),
        ]
        if tokens.num_thoughts:
            never = "1 thought is" if tokens.num_thoughts == 1 else f"{tokens.num_thoughts:,} thoughts are"
            message = f"the template drops the reasoning of earlier turns: {never} never trained"
            hint = "give a template that keeps it with data.template, or a row for each answer"
            verdicts.append(_result("reasoning", "warn", message, tokens.thoughts, index, hint))
    return verdicts


def _pairs(pairs: PairFindings, index: RowIndex) -> list[CheckResult]:
    """The results about preferences."""
    faults = [
        ("equal answers", pairs.equal, "the two answers are one in", "they teach nothing: remove them"),
        (
            "contradictions",
            pairs.contradictory,
            "the other order of an earlier row's answers is in",
            "keep the order that is right, or set train.label_smoothing",
        ),
        (
            "held-out prompts",
            pairs.leaked,
            "the prompt is trained too, with other answers, in",
            "the held-out margin is too good with them: remove them, or give data.eval_path",
        ),
    ]
    verdicts = [
        _result(name, "warn", f"{what} {_count(finding.count)}", finding, index, hint)
        if finding.count
        else CheckResult(name, "pass", "none")
        for name, finding, what, hint in faults
    ]
    if pairs.num_uneven:
        share = pairs.num_longer / pairs.num_uneven
        message = f"the chosen answer is the longer one in {share:.0%} of {_count(pairs.num_uneven, 'pair')}"
        name, hint = (
            "length of winners",
            "train.method=simpo, or train.loss_type=sigmoid_norm, counts per token",
        )
        bias = pairs.num_uneven >= _FEW_PAIRS and not 1 - _MOST_LONGER < share < _MOST_LONGER
        verdicts.append(
            CheckResult(name, "warn", f"{message}: length alone wins", "train.method", hint)
            if bias
            else CheckResult(name, "pass", message)
        )
    return verdicts


def histogram(lengths: NDArray[np.int32], num_bins: int = 10, width: int = 40) -> list[str]:
    """How many rows have how many tokens: a line with a bar for each range."""
    if not len(lengths):
        return []
    step = max(1, -(-int(lengths.max() + 1) // num_bins))
    step = next((nice for nice in _NICE if nice >= step), step)
    bins = bins_of({"rows": lengths}, step)
    label = len(f"{bins['edges'][-1] - 1:,}")
    most = max(bins["rows"])
    lines = []
    for start, count in zip(bins["edges"][:-1], bins["rows"], strict=True):
        eighths = -(-count * width * 8 // most)
        bar = "█" * (eighths // 8) + _BARS[eighths % 8].strip()
        first, last = f"{start:,}", f"{start + step - 1:,}"
        lines.append(f"{first:>{label}} - {last:>{label}}  {bar:<{width}}  {count:,}".rstrip())
    return ["tokens per row", *lines]


def _result(
    name: str, outcome: Outcome, message: str, finding: Finding, index: RowIndex, hint: str = ""
) -> CheckResult:
    """A result about the rows of `finding`."""
    rows = tuple(number + 1 for number in finding.rows)
    return CheckResult(name, outcome, message, index.places(finding.rows, finding.count), hint, rows)


def _count(number: int, what: str = "row") -> str:
    return units.count(number, what)


def _do(count: int, verb: str) -> str:
    """`1 row says`, `3 rows say`."""
    return f"{_count(count)} {verb}{('es' if verb == 'do' else 's') if count == 1 else ''}"


def _rows(findings: RowFindings, index: RowIndex) -> CheckResult:
    formats = ", ".join(dict.fromkeys(f"{summary.format}: {summary.reason}" for summary in index.summaries))
    part = ", " if findings.is_complete else f", the first {findings.texts.num_rows:,} checked; "
    left_out = f"; {index.sources.left_out}" if index.sources.left_out else ""
    return CheckResult("rows", "pass", f"{_count(index.num_rows)}{part}format {formats}{left_out}")


def _account(training_data: TrainingData) -> list[CheckResult]:
    """The ledger as results: dropped rows, cut rows, supervised tokens."""
    ledger, encoded, index = training_data.ledger, training_data.encoded, training_data.index
    ledger.check()
    trained, held = ledger.trained, ledger.held_out
    verdicts = [CheckResult("ledger", "pass", ledger.sums)]
    verdicts += [CheckResult("loss weights", "pass", line) for line in ledger.loss_lines()]
    if lines := ledger.key_lines():
        verdicts.append(CheckResult("keys", "pass", "; ".join(lines)))
    verdicts += dropped_rows(encoded.dropped, index) or [CheckResult("dropped rows", "pass", "none")]
    message = str(ledger.lengths)
    cut = encoded.numbers[np.flatnonzero(encoded.truncated)]
    if len(cut):
        longest, lost = training_data.renderer.contract.max_length, trained.truncated + held.truncated
        message = f"{_count(len(cut))} cut at {longest:,} tokens, {lost:,} tokens are lost"
        hint = "raise data.max_length, or data.too_long=drop"
        verdicts.append(_result("lengths", "warn", message, _of(cut), index, hint))
    else:
        if training_data.limits is not None:
            message += f"; the model reads {training_data.limits.longest_row:,}"
        verdicts.append(CheckResult("lengths", "pass", message))
    share = ledger.trained_share
    message = f"{share:.1%} of the tokens are trained, {trained.trained:,} per epoch"
    if share < _FEW_SUPERVISED:
        hint = "most of the computing trains nothing: shorten the prompts, or data.train_on=all"
        verdicts.append(CheckResult("supervised share", "warn", message, "data.train_on", hint))
    else:
        verdicts.append(CheckResult("supervised share", "pass", message))
    return verdicts


def dropped_rows(
    dropped: Mapping[str, Sequence[int] | NDArray[np.int64]], index: RowIndex
) -> list[CheckResult]:
    """A result for each reason for which rows are left out."""
    hint = "they are not trained: correct them, or remove them"
    return [
        _result("dropped rows", "warn", f"{_count(len(rows))} dropped: {why}", _of(rows), index, hint)
        for why, rows in dropped.items()
    ]


def _of(numbers: Sequence[int] | NDArray[np.int64]) -> Finding:
    return Finding(len(numbers), [int(number) for number in numbers[:MAX_LISTED]])


def _answers(texts: TextFindings, index: RowIndex) -> CheckResult:
    empty, near_empty = texts.empty, texts.near_empty
    parts = []
    if empty.count:
        parts.append(f"{_count(empty.count)} without any")
    if near_empty.count:
        parts.append(f"{_do(near_empty.count, 'say')} next to nothing ({near_empty.example})")
    if not parts:
        return CheckResult("answers", "pass", "every row has one that says something")
    rows = sorted([*empty.rows, *near_empty.rows])[:MAX_LISTED]
    finding = Finding(empty.count + near_empty.count, rows)
    return _result("answers", "warn", ", ".join(parts), finding, index, "write the answer, or remove the row")


def _repeats(texts: TextFindings, index: RowIndex) -> CheckResult:
    exact, near = texts.duplicates, texts.near_duplicates
    nearly = (
        f"{_count(near.count)} nearly like an earlier one (nine of ten word triples)" if near.count else ""
    )
    hint = "remove the repetitions"
    if exact.count:
        message = f"{_count(exact.count)} like an earlier one word for word"
        return _result("duplicates", "warn", ", ".join(filter(None, [message, nearly])), exact, index, hint)
    if near.count > _MANY_NEAR * texts.num_rows:
        return _result("duplicates", "warn", nearly, near, index, hint)
    return _result("duplicates", "pass", nearly or "none", near, index)


def _leaks(texts: TextFindings, num_held_out: int, index: RowIndex) -> CheckResult:
    held_out = _count(num_held_out, "held-out row")
    if not num_held_out:
        return CheckResult("leaks", "pass", "no row is held out")
    if not texts.leaked.count:
        return CheckResult("leaks", "pass", f"none of {held_out} is among the trained")
    nearly = f", {texts.near_leaks.count:,} of them nearly" if texts.near_leaks.count else ""
    message = f"{texts.leaked.count:,} of {held_out} also trained{nearly}"
    hint = "remove repeated rows: the held-out loss is too low with them"
    return _result("leaks", "warn", message, texts.leaked, index, hint)


def _encoding(texts: TextFindings, index: RowIndex) -> CheckResult:
    kinds = {
        "characters read in the wrong encoding": texts.mojibake,
        "replacement characters": texts.replacement,
        "byte order marks": texts.byte_order,
        "control characters": texts.control_characters,
    }
    parts = [
        f"{kind} in {_count(finding.count)} ({finding.example})"
        for kind, finding in kinds.items()
        if finding.count
    ]
    if not parts:
        return CheckResult("encoding", "pass", "no broken characters")
    hint = "read the source again in its own encoding and write UTF-8"
    return _result("encoding", "warn", ", ".join(parts), texts.broken, index, hint)


def _controls(texts: TextFindings, index: RowIndex, data: TrainingData | None) -> CheckResult:
    plain = texts.plain_controls
    if plain.count and data is not None and not data.renderer.contract.parse_special:
        message = f"{_do(plain.count, 'hold')} the text of control tokens ({plain.example}): they are letters"
        hint = "data.parse_special=true reads them as control tokens; run.check=warn trains the letters"
        return _result("control tokens", "fail", message, plain, index, hint)
    if plain.count and plain.count == texts.marked.count and data is not None:
        message = f"read as such in {_count(plain.count)} (data.parse_special)"
        return CheckResult("control tokens", "pass", message)
    kinds = {"control tokens as text": texts.controls, "a template's marks": texts.templated}
    parts = [
        f"{_do(finding.count, 'hold')} {kind} ({finding.example})"
        for kind, finding in kinds.items()
        if finding.count
    ]
    if not parts:
        return CheckResult("control tokens", "pass", "none in the texts of rows")
    hint = "they stay plain text; give rows without a template around them"
    return _result("control tokens", "warn", ", ".join(parts), texts.marked, index, hint)


def _stops(tokens: TokenFindings, contract: PromptContract, index: RowIndex) -> CheckResult:
    name = "stop token"
    if not contract.add_eos and tokens.no_stop.count == tokens.num_rows - tokens.cut.count:
        message = "answers have none: the model will not learn to stop"
        return CheckResult(name, "warn", message, "data.eos", "data.eos=true ends each answer in one")
    if tokens.no_stop.count:
        message = f"{_do(tokens.no_stop.count, 'do')} not end in a trained stop token"
        return _result(name, "fail", message, tokens.no_stop, index, _SHOW)
    if tokens.open_turns.count:
        message = f"in {_count(tokens.open_turns.count)} only the last answer ends in one"
        hint = "the chat template has none after earlier answers"
        return _result(name, "pass", message, tokens.open_turns, index, hint)
    which = f" ({contract.eos})" if contract.eos and contract.stop_ids == (contract.eos_id,) else ""
    cut = f", {_count(tokens.cut.count)} cut before it" if tokens.cut.count else ""
    message = f"trained after {tokens.num_stopped:,} of {tokens.num_answers:,} answers{which}{cut}"
    return CheckResult(name, "pass", message)


def _bos(tokens: TokenFindings, contract: PromptContract, index: RowIndex) -> CheckResult:
    if contract.bos_id is None:
        return CheckResult("BOS", "pass", begins_with(None, False))
    if tokens.more_bos.count:
        message = f"{_do(tokens.more_bos.count, 'begin')} with it twice ({contract.bos})"
        return _result(
            "BOS", "fail", message, tokens.more_bos, index, "the template writes it too: remove it there"
        )
    if tokens.no_bos.count:
        message = f"{_do(tokens.no_bos.count, 'do')} not begin with it ({contract.bos})"
        return _result("BOS", "fail", message, tokens.no_bos, index, _SHOW)
    return CheckResult("BOS", "pass", f"rows begin with {begins_with(contract.bos, contract.add_bos)}")


def _round_trip(tokens: TokenFindings, index: RowIndex) -> CheckResult:
    name, wrong, changed = "trained text", tokens.wrong, tokens.changed
    if wrong.count:
        message = f"{_count(wrong.count)} whose trained tokens are not the answer ({wrong.example})"
        return _result(name, "fail", message, wrong, index, _SHOW)
    if changed.count:
        message = f"{_count(changed.count)} that the tokenizer cannot write as they are ({changed.example})"
        return _result(name, "warn", message, changed, index, "the model learns the changed text")
    return CheckResult(name, "pass", f"decodes to the answer in all of {_count(tokens.num_rows)}")

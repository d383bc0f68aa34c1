"""Verdicts on the rows of a run: read once more, held against their tokens, and judged. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.check.text_checks import Finding, Repeats, Texts
from lorafit.check.token_checks import Tokens
from lorafit.check.verdict import MAX_LISTED, CheckResult, Outcome
from lorafit.data.ledger import Ledger
from lorafit.data.prompt import PromptContract, Renderer
from lorafit.data.sources import FileSummary, RowReader, SourceFile
from lorafit.data.token_dataset import TokenDataset

Numbers = NDArray[np.int64]
_FEW_SUPERVISED = 0.02  # of the tokens: below, most of the work teaches nothing
_MANY_NEAR = 0.01  # of the rows: below, rows that are nearly the same are mentioned only
_BARS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What went by: `tokens` is None without a tokenizer, `whole` whether all rows were looked at."""

    files: Sequence[SourceFile]
    found: Sequence[FileSummary]
    texts: Texts
    tokens: Tokens | None
    whole: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run as tokens, with what was said of them: what `inspect` and `row_verdicts` look at.

    `found` are the summaries of `files`; `longest` is what the model reads, None where it is not known.
    """

    files: Sequence[SourceFile]
    found: Sequence[FileSummary]
    renderer: Renderer
    encoded: TokenDataset
    held_out: Numbers
    ledger: Ledger
    longest: int | None


def inspect(
    files: Sequence[SourceFile],
    format: str,  # noqa: A002 (the name of the setting)
    rows: Rows | None = None,
    most: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Read the rows of `files` once, at most about `most`, and look at each; `rows` has their tokens.

    `advance` is told (bytes read, bytes in all). Raises DataError with the problems of all rows.
    """
    reader = RowReader(files, format)
    texts = Texts(rows.renderer.tokenizer.control if rows else ())
    tokens = Tokens(rows.renderer, rows.encoded) if rows else None
    whole = True
    for chunk in reader.chunks():
        if most is not None and texts.num_rows >= most:
            whole = False
            break
        texts.add(chunk.rows)
        if tokens is not None:
            tokens.add(chunk.rows)
        if advance:
            advance(*reader.progress())
    return Inspection(files, rows.found if rows else reader.found, texts, tokens, whole)


def row_verdicts(inspection: Inspection, rows: Rows | None = None) -> list[CheckResult]:
    """All that the rows say, a verdict each; without `rows` (no tokenizer) only what their texts say."""
    place = _Places(inspection.files, inspection.found)
    texts = inspection.texts
    verdicts = [_read(inspection)]
    if rows is not None:
        verdicts += _account(rows, place)
    verdicts += [_answers(texts, place), _repeats(texts, place)]
    if rows is not None:
        verdicts.append(_leaks(texts.leaks(rows.held_out), len(rows.held_out), place))
    verdicts += [_encoding(texts, place), _controls(texts, place)]
    if rows is not None and inspection.tokens is not None:
        tokens = inspection.tokens
        contract = rows.renderer.contract
        verdicts += [
            _stops(tokens, contract, place),
            _bos(tokens, contract, place),
            _round_trip(tokens, place),
        ]
    return verdicts


def histogram(lengths: NDArray[np.int32], bins: int = 10, width: int = 40) -> list[str]:
    """How many rows have how many tokens, a line and a bar for each range."""
    if not len(lengths):
        return []
    step = max(1, -(-int(lengths.max() + 1) // bins))
    for nice in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 2500, 5000, 10_000):
        if nice >= step:
            step = nice
            break
    counts = np.bincount(lengths // step)
    label = len(f"{(len(counts)) * step - 1:,}")
    most = int(counts.max())
    lines = []
    for number, count in enumerate(counts.tolist()):
        eighths = -(-count * width * 8 // most)
        bar = "█" * (eighths // 8) + _BARS[eighths % 8].strip()
        first, last = f"{number * step:,}", f"{(number + 1) * step - 1:,}"
        lines.append(f"{first:>{label}} - {last:>{label}}  {bar:<{width}}  {count:,}".rstrip())
    return ["tokens a row", *lines]


class _Places:
    """Row numbers over all sources as a person finds them: file by file, the first few."""

    LISTED = 5

    def __init__(self, files: Sequence[SourceFile], found: Sequence[FileSummary]) -> None:
        self._names = [file.name for file in files]
        self._ends = np.cumsum([0, *(summary.num_rows for summary in found)]).tolist()

    def __call__(self, numbers: Sequence[int]) -> str:
        by_file: dict[str, list[str]] = {}
        for number in numbers[: self.LISTED]:
            file = max(0, int(np.searchsorted(self._ends, number, side="right")) - 1)
            file = min(file, len(self._names) - 1)
            start = self._ends[file] if file < len(self._ends) else 0
            by_file.setdefault(self._names[file], []).append(f"{number - start + 1:,}")
        parts = [
            f"{name} row{'s' if len(rows) > 1 or len(numbers) > self.LISTED else ''} {', '.join(rows)}"
            for name, rows in by_file.items()
        ]
        more = len(numbers) - self.LISTED
        return "; ".join(parts) + (f" and {more:,} more" if more > 0 else "")


def _named(
    name: str, outcome: Outcome, message: str, numbers: Sequence[int], place: _Places, hint: str
) -> CheckResult:
    listed = tuple(number + 1 for number in numbers[:MAX_LISTED])
    return CheckResult(name, outcome, message, place(numbers), hint, listed)


def _count(count: int, what: str = "row") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _do(count: int, verb: str) -> str:
    """`1 row says`, `3 rows say`."""
    return f"{_count(count)} {verb}{('es' if verb == 'do' else 's') if count == 1 else ''}"


def _read(inspection: Inspection) -> CheckResult:
    found, seen = inspection.found, inspection.texts.num_rows
    formats = ", ".join(dict.fromkeys(f"{summary.format}: {summary.reason}" for summary in found))
    if inspection.whole:
        return CheckResult("rows", "pass", f"{_count(seen)}, format {formats}")
    total = sum(summary.num_rows for summary in found)
    return CheckResult("rows", "pass", f"{_count(total)}, the first {seen:,} looked at; format {formats}")


def _account(rows: Rows, place: _Places) -> list[CheckResult]:
    """The ledger as verdicts: what is dropped, what is cut, how much is supervised."""
    ledger, verdicts = rows.ledger, []
    ledger.check()
    trained, held = ledger.trained, ledger.held_out
    sums = (
        f"{_count(ledger.num_rows)} = {trained.rows:,} trained + {held.rows:,} held out + "
        f"{ledger.num_dropped:,} dropped; {trained.total + held.total:,} tokens = "
        f"{trained.trained + held.trained:,} trained + {trained.masked + held.masked:,} masked + "
        f"{trained.truncated + held.truncated:,} truncated"
    )
    verdicts.append(CheckResult("ledger", "pass", sums))
    for reason, numbers in rows.encoded.dropped.items():
        message = f"{_count(len(numbers))} dropped: {reason}"
        hint = "write what is missing, or remove them"
        verdicts.append(_named("dropped rows", "warn", message, numbers.tolist(), place, hint))
    if not rows.encoded.dropped:
        verdicts.append(CheckResult("dropped rows", "pass", "none"))
    lengths = ledger.lengths
    message = (
        f"mean {lengths.mean:.0f}, half up to {lengths.p50:,}, 90% up to {lengths.p90:,}, max {lengths.max:,}"
    )
    cut = rows.encoded.numbers[np.flatnonzero(rows.encoded.flat.truncated)]
    if len(cut):
        lost = trained.truncated + held.truncated
        message = f"{_count(len(cut))} cut at {rows.renderer.contract.max_length:,} tokens, {lost:,} tokens are lost"
        hint = "raise data.max_length, or data.too_long=drop"
        verdicts.append(_named("lengths", "warn", message, cut.tolist(), place, hint))
    else:
        if rows.longest is not None:
            message += f"; the model reads {rows.longest:,}"
        verdicts.append(CheckResult("lengths", "pass", message))
    share = ledger.trained_share
    message = f"{share:.1%} of the tokens are trained, {trained.trained:,} an epoch"
    if share < _FEW_SUPERVISED:
        hint = "most of the work teaches nothing: shorten the prompts, or data.train_on=all"
        verdicts.append(CheckResult("supervised share", "warn", message, "data.train_on", hint))
    else:
        verdicts.append(CheckResult("supervised share", "pass", message))
    return verdicts


def _answers(texts: Texts, place: _Places) -> CheckResult:
    parts = []
    if len(texts.empty.rows):
        parts.append(f"{_count(len(texts.empty.rows))} without any")
    if len(texts.near_empty.rows):
        parts.append(f"{_do(len(texts.near_empty.rows), 'say')} next to nothing ({texts.near_empty.example})")
    numbers = sorted({*texts.empty.rows, *texts.near_empty.rows})
    if not parts:
        return CheckResult("answers", "pass", "every row has one that says something")
    return _named("answers", "warn", ", ".join(parts), numbers, place, "write the answer, or remove the row")


def _repeats(texts: Texts, place: _Places) -> CheckResult:
    repeats = texts.repeats()
    exact, near = [row for row, _ in repeats.exact], [row for row, _ in repeats.near]
    nearly = f"{_count(len(near))} nearly like an earlier one (nine of ten word triples)" if near else ""
    if exact:
        message = f"{_count(len(exact))} like an earlier one word for word"
        message += f", {nearly}" if nearly else ""
        return _named("duplicates", "warn", message, exact, place, "remove what counts twice")
    if len(near) > _MANY_NEAR * texts.num_rows:
        return _named("duplicates", "warn", nearly, near, place, "remove what counts twice")
    rows = tuple(number + 1 for number in near[:MAX_LISTED])
    return CheckResult("duplicates", "pass", nearly or "none", place(near) if near else "", rows=rows)


def _leaks(leaks: Repeats, num_held_out: int, place: _Places) -> CheckResult:
    if not num_held_out:
        return CheckResult("leaks", "pass", "no row is held out")
    pairs = [*leaks.exact, *leaks.near]
    if not pairs:
        return CheckResult(
            "leaks", "pass", f"none of {_count(num_held_out, 'held-out row')} is among the trained"
        )
    nearly = f", {len(leaks.near):,} of them nearly" if leaks.near else ""
    message = f"{len(pairs):,} of {_count(num_held_out, 'held-out row')} also trained{nearly}"
    hint = "remove repeated rows: the held-out loss flatters"
    return _named("leaks", "warn", message, sorted(row for row, _ in pairs), place, hint)


def _encoding(texts: Texts, place: _Places) -> CheckResult:
    kinds: Mapping[str, Finding] = {
        "characters read in the wrong encoding": texts.mojibake,
        "replacement characters": texts.replacement,
        "byte order marks": texts.byte_order,
        "control characters": texts.control_characters,
    }
    parts = [
        f"{what} in {_count(len(found.rows))} ({found.example})"
        for what, found in kinds.items()
        if found.rows
    ]
    if not parts:
        return CheckResult("encoding", "pass", "no broken characters")
    numbers = sorted(set().union(*(found.rows for found in kinds.values())))
    hint = "read the source again in its own encoding and write UTF-8"
    return _named("encoding", "warn", ", ".join(parts), numbers, place, hint)


def _controls(texts: Texts, place: _Places) -> CheckResult:
    parts = []
    if texts.controls.rows:
        parts.append(
            f"{_do(len(texts.controls.rows), 'hold')} control tokens as text ({texts.controls.example})"
        )
    if texts.templated.rows:
        parts.append(
            f"{_do(len(texts.templated.rows), 'hold')} a template's marks ({texts.templated.example})"
        )
    if not parts:
        return CheckResult("control tokens", "pass", "none in the texts of rows")
    numbers = sorted({*texts.controls.rows, *texts.templated.rows})
    hint = "they stay plain text; give rows without a template around them"
    return _named("control tokens", "warn", ", ".join(parts), numbers, place, hint)


def _stops(tokens: Tokens, contract: PromptContract, place: _Places) -> CheckResult:
    name = "stop token"
    if not contract.add_eos and len(tokens.no_stop.rows) == tokens.num_rows - len(tokens.cut.rows):
        message = "answers have none: the model will not learn to stop"
        return CheckResult(name, "warn", message, "data.eos", "data.eos=true ends each answer in one")
    if tokens.no_stop.rows:
        message = f"{_do(len(tokens.no_stop.rows), 'do')} not end in a trained stop token"
        hint = "look at one with `lorafit show --row N`"
        return _named(name, "fail", message, tokens.no_stop.rows, place, hint)
    if tokens.open_turns.rows:
        message = f"in {_count(len(tokens.open_turns.rows))} only the last answer ends in one"
        hint = "the chat template has none after earlier answers"
        return _named(name, "pass", message, tokens.open_turns.rows, place, hint)
    which = f" ({contract.eos})" if contract.eos and contract.stop_ids == (contract.eos_id,) else ""
    cut = f", {_count(len(tokens.cut.rows))} cut before it" if tokens.cut.rows else ""
    return CheckResult(
        name, "pass", f"trained after {tokens.num_stopped:,} of {tokens.num_answers:,} answers{which}{cut}"
    )


def _bos(tokens: Tokens, contract: PromptContract, place: _Places) -> CheckResult:
    if contract.bos_id is None:
        return CheckResult("BOS", "pass", "the model has none")
    if tokens.more_bos.rows:
        message = f"{_do(len(tokens.more_bos.rows), 'begin')} with it twice ({contract.bos})"
        hint = "the template writes it too: take it out there"
        return _named("BOS", "fail", message, tokens.more_bos.rows, place, hint)
    if tokens.no_bos.rows:
        message = f"{_do(len(tokens.no_bos.rows), 'do')} not begin with it ({contract.bos})"
        return _named(
            "BOS", "fail", message, tokens.no_bos.rows, place, "look at one with `lorafit show --row N`"
        )
    how = "once, at the start" if contract.add_bos else "as the template writes it: the tokenizer adds none"
    return CheckResult("BOS", "pass", f"{contract.bos} {how}")


def _round_trip(tokens: Tokens, place: _Places) -> CheckResult:
    name = "trained text"
    if tokens.wrong.rows:
        message = f"{_count(len(tokens.wrong.rows))} whose trained tokens are not the answer ({tokens.wrong.example})"
        return _named(
            name, "fail", message, tokens.wrong.rows, place, "look at one with `lorafit show --row N`"
        )
    if tokens.changed.rows:
        message = f"{_count(len(tokens.changed.rows))} that the tokenizer cannot write as they are"
        message += f" ({tokens.changed.example})"
        return _named(name, "warn", message, tokens.changed.rows, place, "the model learns the changed text")
    return CheckResult(name, "pass", f"decodes to the answer in all of {_count(tokens.num_rows)}")

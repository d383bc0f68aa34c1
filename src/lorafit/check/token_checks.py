"""Findings in the tokens of rows: stop token, BOS, and whether the trained tokens are the answer, byte for byte.

The tokens of every row are decoded and compared with the answer in its file, not with the renderer's text. Blanks at
the ends do not count, because templates add and remove them. In the first rows they count, and the text is compared
with the rendered text too: a mask that is wrong by one blank is wrong in all rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lorafit.check.text_checks import Finding
from lorafit.data.formats import Row
from lorafit.data.packing import Ids
from lorafit.data.prompt import Renderer
from lorafit.data.token_dataset import TokenDataset
from lorafit.data.tokenizer import Tokenizer

_EXACT_ROWS = 100


@dataclass(frozen=True, slots=True)
class _Span:
    """A stretch of trained tokens without its stop token; `stopped`: it had one."""

    ids: list[int]
    stopped: bool


@dataclass
class TokenFindings:
    """The findings in the tokens of `num_rows` rows with `num_answers` answers, `num_stopped` with a stop token."""

    num_rows: int = 0
    num_answers: int = 0
    num_stopped: int = 0
    no_stop: Finding = field(default_factory=Finding)
    open_turns: Finding = field(default_factory=Finding)
    cut: Finding = field(default_factory=Finding)
    no_bos: Finding = field(default_factory=Finding)
    more_bos: Finding = field(default_factory=Finding)
    wrong: Finding = field(default_factory=Finding)
    changed: Finding = field(default_factory=Finding)


class Tokens(TokenFindings):
    """Reads rows with their tokens and collects the findings."""

    def __init__(self, renderer: Renderer, encoded: TokenDataset) -> None:
        """`encoded` are all rows, in the order of their numbers."""
        super().__init__()
        self._renderer, self._encoded = renderer, encoded
        self._numbers = encoded.numbers
        contract = renderer.contract
        self._stops, self._bos = frozenset(contract.stop_ids), contract.bos_id
        self._whole = contract.train_on == "all"
        self._num_exact = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Read `rows`; those without tokens were dropped and are skipped."""
        index = int(np.searchsorted(self._numbers, rows[0].number))
        seen: list[tuple[Row, int]] = []
        texts: list[list[int]] = []
        for row in rows:
            if index == len(self._numbers) or self._numbers[index] != row.number:
                continue
            ids, trained = self._encoded.row(index)
            self._beginning(row, ids)
            if not trained.any():
                self.wrong.add(row.number, "nothing is trained")
                index += 1
                continue
            spans = [self._all(ids)] if self._is_whole(row) else self._spans(ids, trained.nonzero()[0])
            self._endings(row, index, spans)
            seen.append((row, len(spans)))
            texts += [span.ids for span in spans]
            index += 1
        self.num_rows += len(seen)
        decoded = iter(self._renderer.tokenizer.decode_batch(texts))
        for row, count in seen:
            self._answers(row, [next(decoded) for _ in range(count)])

    def _beginning(self, row: Row, ids: Ids) -> None:
        if self._bos is None:
            return
        if self._renderer.contract.add_bos and ids[0] != self._bos:
            self.no_bos.add(row.number)
        # only the beginning: a template may begin each turn with one, and so may a text with several turns
        if len(ids) > 1 and ids[0] == ids[1] == self._bos:
            self.more_bos.add(row.number)

    def _all(self, ids: Ids) -> _Span:
        """The whole row without BOS."""
        start = int(ids[0] == self._bos)
        end = len(ids)
        while end > start and int(ids[end - 1]) in self._stops:
            end -= 1
        stopped = any(int(token) in self._stops for token in ids[-8:])  # a template may end in a line break
        return _Span(ids[start:end].tolist(), stopped)

    def _spans(self, ids: Ids, places: NDArray[np.int64]) -> list[_Span]:
        """The stretches of trained tokens; `places` are their indices."""
        cuts = np.flatnonzero(np.diff(places) > 1) + 1
        spans = []
        for part in np.split(places, cuts) if len(cuts) else [places]:
            tokens = ids[int(part[0]) : int(part[-1]) + 1].tolist()
            stopped = tokens[-1] in self._stops
            spans.append(_Span(tokens[:-1] if stopped else tokens, stopped))
        return spans

    def _endings(self, row: Row, index: int, spans: Sequence[_Span]) -> None:
        self.num_answers += len(spans)
        self.num_stopped += sum(span.stopped for span in spans)
        if self._encoded.flat.truncated[index]:
            self.cut.add(row.number)
        elif not spans[-1].stopped:
            self.no_stop.add(row.number)
        elif not all(span.stopped for span in spans):
            self.open_turns.add(row.number)

    def _answers(self, row: Row, decoded: Sequence[str]) -> None:
        """Compare the text of the trained tokens with the answers of the row."""
        answers = row.content.answers()
        whole = self._is_whole(row)
        if whole:
            fits = all(answer.strip() in decoded[0] for answer in answers)
        else:
            fits = len(answers) == len(decoded) and all(map(_same, answers, decoded))
        if not fits or (self._num_exact < _EXACT_ROWS and not whole):
            self._num_exact += 1
            self._explain(row)

    def _is_whole(self, row: Row) -> bool:
        """Whether all of the row is trained."""
        return self._whole or not row.content.asks

    def _explain(self, row: Row) -> None:
        """Find why the decoded text is not the answer: cut, changed by the tokenizer or the template, or wrong."""
        tokenizer = self._renderer.tokenizer
        index = int(np.searchsorted(self._numbers, row.number))
        ids, trained = self._encoded.row(index)
        spans = self._renderer.text(row)
        if self._is_whole(row):
            bos = self._renderer.contract.bos or ""
            expected = ["".join(span.text for span in spans).removeprefix(bos)]
            decoded = [tokenizer.decode(ids[int(ids[0] == self._bos) :].tolist())]
        else:
            expected = [span.text for span in spans if span.trained]
            decoded = _in_place(tokenizer, ids.tolist(), trained.tolist())
        if self._encoded.flat.truncated[index]:
            expected = expected[: len(decoded)]
            pairs = list(zip(expected, decoded, strict=False))
            fits = all(e.startswith(s.rstrip("\ufffd")) for e, s in pairs)
        else:
            fits = expected == decoded
        if fits:
            return
        for answer in row.content.answers():
            again = tokenizer.decode(tokenizer.encode(answer))
            if not _same(answer, again):
                self.changed.add(row.number, _difference(answer, again))
                return
        normal = [unicodedata.normalize("NFKC", text) for text in (*expected, *decoded)]
        if normal[: len(expected)] == normal[len(expected) :]:
            self.changed.add(row.number, _difference("".join(expected), "".join(decoded)))
        else:
            self.wrong.add(row.number, _difference("".join(expected), "".join(decoded)))


def _same(answer: str, other: str) -> bool:
    """Whether two texts are the same without blanks at their ends, which templates add and remove."""
    return answer == other or answer.strip() == other.strip()


def _in_place(tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> list[str]:
    """The text of each trained stretch, decoded with what comes before it."""
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    edges = [0, *edges, len(ids)]
    parts = [(a, b) for a, b in pairwise(edges) if trained[a]]
    prefixes = tokenizer.decode_batch([ids[:end] for part in parts for end in part])
    return [whole[len(before) :] for before, whole in zip(prefixes[::2], prefixes[1::2], strict=True)]


def _difference(one: str, other: str) -> str:
    """Where two texts begin to differ, a few characters of each."""
    start = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return f"{one[start : start + 12]!r} became {other[start : start + 12]!r}"

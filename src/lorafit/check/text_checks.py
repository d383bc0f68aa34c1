"""Findings in the texts of rows: broken characters, control tokens, empty answers, repetitions.

Rows are read once, in pieces; a few hashes are kept of each. No tokens and no torch here.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lorafit.data.formats import Row
from lorafit.errors import MAX_LISTED

MOST_FOR_NEAR = 1_000_000  # rows beyond that are compared word for word only: 128 bytes per row
NUM_HASHES, BAND = 32, 4  # of each row's word triples, and how many of them make a row a candidate
NEAR = 29  # equal hashes out of NUM_HASHES from which two rows count as nearly the same: nine triples of ten

# A character of UTF-8 read as Latin-1 or Windows-1252: a lead byte and what continues it, as letters.
_CONTINUES = "\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d"
_CONTINUES += "\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178"
_NO_LATIN = _CONTINUES.replace("\u00bf", "\u009f")  # without what French and Spanish write after a vowel
_MOJIBAKE = re.compile(
    f"[\u00c2\u00c3][{_CONTINUES}]"
    f"|[\u00e0-\u00ef][{_NO_LATIN}][{_CONTINUES}]"
    f"|\u00f0[{_NO_LATIN}][{_CONTINUES}]{{2}}"
    f"|(?:[\u00d0\u00d1][{_CONTINUES}]){{2}}"
)
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Control tokens of the field, and the marks that templates put around turns.
_CONTROLS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]",
    "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>",
)  # fmt: skip
_TEMPLATE_MARKS = ("### Instruction:", "### Response:", "Below is an instruction that describes a task")
_PLACEHOLDERS = {
    "n/a", "na", "none", "null", "nil", "nan", "todo", "tbd", "undefined", "unknown", "<nooutput>", "<noinput>",
    "nooutput", "noinput", "empty", "placeholder", "lorem ipsum", "no answer", "no response", "error", "string",
}  # fmt: skip

Numbers = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows with the same text as an earlier row: (row, earlier row), by the number over all sources."""

    exact: tuple[tuple[int, int], ...] = ()
    near: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Finding:
    """The rows with one finding: how many, the numbers of the first MAX_LISTED, and an example from the first."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    example: str = ""

    def add(self, number: int, example: str = "") -> None:
        """Count row `number`; rows come in ascending order."""
        self.count += 1
        self.example = self.example or example
        if len(self.rows) < MAX_LISTED:
            self.rows.append(number)


@dataclass
class TextFindings:
    """The findings in the texts of `num_rows` rows. `broken` has each row with one of the four before it."""

    num_rows: int = 0
    empty: Finding = field(default_factory=Finding)
    near_empty: Finding = field(default_factory=Finding)
    mojibake: Finding = field(default_factory=Finding)
    replacement: Finding = field(default_factory=Finding)
    byte_order: Finding = field(default_factory=Finding)
    control_characters: Finding = field(default_factory=Finding)
    broken: Finding = field(default_factory=Finding)
    controls: Finding = field(default_factory=Finding)
    plain_controls: Finding = field(default_factory=Finding)  # those of the model in rows without a template
    arguments: Finding = field(default_factory=Finding)  # rows with calls whose arguments are no JSON object
    templated: Finding = field(default_factory=Finding)
    marked: Finding = field(default_factory=Finding)  # each row with one of the two before
    duplicates: Finding = field(default_factory=Finding)
    near_duplicates: Finding = field(default_factory=Finding)
    leaked: Finding = field(default_factory=Finding)
    near_leaks: Finding = field(default_factory=Finding)  # among those of `leaked`


class Texts(TextFindings):
    """Reads rows and collects the findings. `controls` are the control tokens of the model, if it is known."""

    def __init__(self, controls: Iterable[str] = ()) -> None:
        super().__init__()
        names = sorted({*_CONTROLS, *controls} - {""}, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, names)))
        self._openings = {name[0] for name in names}
        self._own_controls = frozenset(controls)
        self._numbers: list[Numbers] = []
        self._keys: list[Keys] = []
        self._signatures: list[NDArray[np.uint32]] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Read `rows`, which follow the rows before."""
        keys = array("Q")
        words: list[list[str]] = []
        for row in rows:
            text = "\n".join(row.content.texts())
            self._characters(row.number, text)
            self._marks(row, text)
            self._answers(row)
            self._calls(row)
            lowered = text.lower().split()
            words.append(lowered)
            keys.append(int.from_bytes(blake2b(" ".join(lowered).encode(), digest_size=8).digest(), "little"))
        self._numbers.append(np.fromiter((row.number for row in rows), np.int64, len(rows)))
        self._keys.append(np.array(keys, dtype=np.uint64))
        if self.num_rows < MOST_FOR_NEAR:
            self._signatures.append(_signatures(words))
        self.num_rows += len(rows)

    def _characters(self, number: int, text: str) -> None:
        examples: dict[str, str] = {}
        if match := _CONTROL_CHARACTERS.search(text):
            examples["control_characters"] = f"U+{ord(match.group()):04X}"
        if not text.isascii():
            if "\ufffd" in text:
                examples["replacement"] = _around(text, text.index("\ufffd"))
            if "\ufeff" in text:
                examples["byte_order"] = "U+FEFF"
            if match := _MOJIBAKE.search(text):
                examples["mojibake"] = _around(text, match.start())
        self._add(number, examples, self.broken)

    def _marks(self, row: Row, text: str) -> None:
        examples: dict[str, str] = {}
        if any(opening in text for opening in self._openings) and (match := self._controls.search(text)):
            examples["controls"] = match.group()
            own = (name for name in self._controls.findall(text) if name in self._own_controls)
            if not row.content.has_template and (found := next(own, "")):
                self.plain_controls.add(row.number, found)
        if row.content.has_template and (mark := next((m for m in _TEMPLATE_MARKS if m in text), "")):
            examples["templated"] = mark
        self._add(row.number, examples, self.marked)

    def _add(self, number: int, examples: Mapping[str, str], any_of_them: Finding) -> None:
        for name, example in examples.items():
            getattr(self, name).add(number, example)
        if examples:
            any_of_them.add(number)

    def _answers(self, row: Row) -> None:
        for answer in row.content.answers():
            if len(answer) > 16:
                continue
            bare = answer.strip().lower().rstrip(".")
            if not answer.strip():
                self.empty.add(row.number, "")
            elif bare in _PLACEHOLDERS or (bare.isascii() and not any(map(str.isalnum, bare))):
                self.near_empty.add(row.number, answer.strip())
            else:
                continue
            break

    def _calls(self, row: Row) -> None:
        for turn in row.content.turns() or ():
            for call in turn.calls:
                if not call.is_valid:
                    self.arguments.add(row.number, f"{call.name}({call.arguments[:40]})")
                    return

    def finish(self, held_out: Numbers) -> TextFindings:
        """The findings, with the repetitions among all rows and those of held-out rows (by number) in training."""
        repeats, leaks = self.repeats(), self.leaks(held_out)
        for finding, pairs in (
            (self.duplicates, repeats.exact),
            (self.near_duplicates, repeats.near),
            (self.leaked, [*leaks.exact, *leaks.near]),
            (self.near_leaks, leaks.near),
        ):
            for row in sorted(row for row, _ in pairs):
                finding.add(row)
        return self

    def repeats(self) -> Repeats:
        """The rows that repeat an earlier one, word for word (without case and blanks) or nearly."""
        return self._pairs(_repeated)

    def leaks(self, held_out: Numbers) -> Repeats:
        """Held-out rows (by number) that training has too: (held-out row, training row)."""
        held = np.isin(np.concatenate(self._numbers), held_out) if self._numbers else np.zeros(0, np.bool_)
        return self._pairs(lambda keys: _shared(keys, held[: len(keys)])) if len(held_out) else Repeats()

    def _pairs(self, with_equal_keys: Callable[[Keys], Iterable[tuple[int, int]]]) -> Repeats:
        """The pairs of rows with equal keys, by number: keys of the whole text, then of similar word triples."""
        if not self._keys:
            return Repeats()
        numbers, signatures = np.concatenate(self._numbers), np.concatenate(self._signatures)
        exact = list(with_equal_keys(np.concatenate(self._keys)))
        is_exact = np.zeros(len(numbers), dtype=np.bool_)
        is_exact[[row for row, _ in exact]] = True
        near: dict[int, int] = {}
        for band in _bands(signatures):
            for row, other in with_equal_keys(band):
                is_new = not is_exact[row] and row not in near
                if is_new and np.count_nonzero(signatures[row] == signatures[other]) >= NEAR:
                    near[row] = other
        pairs = (exact, sorted(near.items()))
        return Repeats(*(tuple((int(numbers[a]), int(numbers[b])) for a, b in part) for part in pairs))


def _around(text: str, at: int) -> str:
    """The word around the character at index `at`."""
    start = max(text.rfind(" ", 0, at), text.rfind("\n", 0, at), at - 20) + 1
    return text[start:].split(maxsplit=1)[0][:40] if text[start:].strip() else text[at : at + 1]


_RANDOM = np.random.default_rng(0x4C46)
_FACTORS = _RANDOM.integers(0, 2**32, NUM_HASHES, dtype=np.uint32) | np.uint32(1)
_TERMS = _RANDOM.integers(0, 2**32, NUM_HASHES, dtype=np.uint32)


class _Hashes(dict[str, int]):
    """A cache of the CRC-32 of words: most words occur often."""

    MOST = 500_000

    def __missing__(self, word: str) -> int:
        if len(self) >= self.MOST:
            self.clear()
        self[word] = value = crc32(word.encode("utf-8", "surrogatepass"))
        return value


_HASHES = _Hashes()


def _signatures(rows: Sequence[Sequence[str]]) -> NDArray[np.uint32]:
    """The smallest value of each hash over each row's word triples (MinHash: Broder, 1997), (rows, NUM_HASHES).

    The share of equal values of two rows estimates the share of their common triples.
    """
    flat = array("I")
    starts = array("q")
    for words in rows:
        starts.append(len(flat))
        flat.extend(map(_HASHES.__getitem__, words or [""]))
        flat.extend((0, 0))  # so that the last word begins a triple too, and no triple has words of two rows
    hashes = np.frombuffer(flat, dtype=np.uint32)
    triples = hashes[:-2] * np.uint32(0x9E3779B1)
    triples ^= np.roll(hashes, -1)[:-2] * np.uint32(0x85EBCA77)
    triples *= np.uint32(0xC2B2AE3D)
    triples ^= np.roll(hashes, -2)[:-2] * np.uint32(0x27D4EB2F)
    triples ^= triples >> np.uint32(15)
    signatures = np.empty((len(rows), NUM_HASHES), dtype=np.uint32)
    begins = np.frombuffer(starts, dtype=np.int64)
    ends = np.append(begins[1:], len(flat)) - 2
    last = np.uint32(2**32 - 1)
    outside = np.concatenate([ends[:-1], ends[:-1] + 1])  # the two of each row that begin with a filler
    for number, (factor, term) in enumerate(zip(_FACTORS, _TERMS, strict=True)):
        mixed = triples * factor + term
        mixed ^= mixed >> np.uint32(16)
        mixed[outside] = last
        signatures[:, number] = np.minimum.reduceat(mixed, begins)
    return signatures


def _bands(signatures: NDArray[np.uint32]) -> Iterator[Keys]:
    """Arrays of keys; similar rows have the same key in at least one of them with high probability."""
    for start in range(0, NUM_HASHES, BAND):
        key = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(start, start + BAND):
            key = key * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column]
        yield key


def _repeated(keys: Keys) -> list[tuple[int, int]]:
    """(index, an earlier index with the same key), for each key that came before; ascending."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return sorted(zip(order[same + 1].tolist(), order[same].tolist(), strict=True))


def _shared(keys: Keys, held: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(held-out index, index of a training row with the same key)."""
    training = np.flatnonzero(~held)
    order = training[np.argsort(keys[training], kind="stable")]
    rows = np.flatnonzero(held)
    places = np.searchsorted(keys[order], keys[rows])
    inside = places < len(order)
    for row, place in zip(rows[inside].tolist(), places[inside].tolist(), strict=True):
        if keys[order[place]] == keys[row]:
            yield row, int(order[place])

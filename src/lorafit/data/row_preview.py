"""One row as the model reads it, for people: what is trained, what is only read, control tokens, ids.

What is shown may hold anything, so characters that steer a terminal or turn the direction of writing are spelt out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorafit.config.schema import Config
from lorafit.data.build import make_renderer
from lorafit.data.chat_template import ChatTemplate
from lorafit.data.formats import Chat, Content, Instruction, Message, Row
from lorafit.data.prompt import Piece, PromptContract, Rendered, Renderer, conversation
from lorafit.data.sources import RowReader, find_files
from lorafit.data.token_dataset import TokenDataset
from lorafit.data.tokenizer import StreamDecoder, Tokenizer
from lorafit.errors import ConfigError, DataError, Problem
from lorafit.hub.client import tokenizer_folder
from lorafit.redact import visible

Kind = Literal["read", "trained", "cut"]
_STYLES = {
    ("read", False): "",
    ("read", True): "cyan",
    ("trained", False): "green",
    ("trained", True): "bold green",
    ("cut", False): "red strike",
    ("cut", True): "red strike",
}


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of text of one kind; `control` if it is a control token."""

    text: str
    kind: Kind
    control: bool


@dataclass(frozen=True, slots=True)
class Token:
    """An id, the text that it completes (often "" in the middle of a character), and what becomes of it."""

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class RowView:
    """A rendered row: its text and its tokens. `dropped` says why it is not trained, "" if it is."""

    number: int
    place: str
    stretches: tuple[Stretch, ...]
    tokens: tuple[Token, ...]
    dropped: str = ""

    @property
    def text(self) -> str:
        """The text as the model reads it."""
        return "".join(stretch.text for stretch in self.stretches)

    @property
    def heading(self) -> str:
        """`rows.json row 17: 42 tokens, 12 trained`."""
        if self.dropped:
            return f"{self.place}: not trained, {self.dropped}"
        count = {kind: sum(token.kind == kind for token in self.tokens) for kind in ("trained", "cut")}
        cut = f", {count['cut']:,} cut off" if count["cut"] else ""
        return f"{self.place}: {len(self.tokens):,} tokens, {count['trained']:,} trained{cut}"


def view_row(renderer: Renderer, row: Row) -> RowView:
    """The row as training takes it. Raises DataError if it cannot be rendered."""
    (outcome,) = renderer.render_batch([row])
    if isinstance(outcome, Problem):
        raise DataError.of([outcome])
    if not isinstance(outcome, Rendered):
        return RowView(row.number, row.place, (), (), outcome.reason)
    longest = renderer.contract.max_length
    kept, dropped = longest, ""
    if len(outcome.ids) > longest and renderer.contract.too_long != "truncate":
        kept, dropped = (
            len(outcome.ids),
            f"{len(outcome.ids):,} tokens are more than data.max_length={longest}",
        )
    tokens = _tokens(renderer.tokenizer, outcome, kept)
    lost = sum(len(token.text) for token in tokens[kept:])
    return RowView(row.number, row.place, _stretches(renderer.pieces(row), lost), tokens, dropped)


def marked(view: RowView, opening: str = "\u27e6", closing: str = "\u27e7") -> str:
    """The text with what is trained between marks and what is cut off between doubled ones, where colours are none."""
    parts = []
    for kind, text in _runs(view.stretches):
        times = {"read": 0, "trained": 1, "cut": 2}[kind]
        parts.append(opening * times + visible(text) + closing * times)
    return "".join(parts)


def styled(view: RowView) -> list[tuple[str, str]]:
    """The text in pieces, each with its style for a terminal."""
    return [(visible(stretch.text), _STYLES[stretch.kind, stretch.control]) for stretch in view.stretches]


def token_lines(view: RowView) -> list[list[str]]:
    """A line for each token: its place, its id, what becomes of it, and the text that it completes."""
    return [
        [
            str(place),
            str(token.id),
            token.kind,
            visible(token.text).replace("\n", "\u21b5").replace("\t", "\u21e5"),
        ]
        for place, token in enumerate(view.tokens)
    ]


def shipped(renderer: Renderer, row: Row) -> str:
    """The row by the chat template that the model ships, as transformers' apply_chat_template renders it.

    Raises DataError where the model has none or the row is no conversation.
    """
    source = renderer.tokenizer.chat_template
    if source is None:
        raise DataError("the model has no chat template to compare with", hint="leave --diff out")
    messages = _messages(row.content, renderer.contract)
    if messages is None:
        raise DataError("a row of this format is no conversation: no chat template applies", place=row.place)
    contract, tokenizer = renderer.contract, renderer.tokenizer
    bos = tokenizer.bos.text if tokenizer.bos else None
    eos = tokenizer.eos.text if tokenizer.eos else None
    return ChatTemplate(source, bos=bos, eos=eos, date=contract.date).render(messages)


def difference(view: RowView, other: str) -> list[tuple[str, str]]:
    """What leads from `other` to the row's text, line by line: (" ", "-" or "+", the line with its end marked)."""
    ours, theirs = _lines(view.text), _lines(other)
    found: list[tuple[str, str]] = []
    for line in difflib.ndiff(theirs, ours):
        if line[0] in " -+":
            found.append((line[0], line[2:]))
    return found


def _messages(content: Content, contract: PromptContract) -> Sequence[Message] | None:
    match content:
        case Instruction():
            messages = conversation(content)
        case Chat(given):
            messages = list(given)
        case _:
            return None
    if contract.system and messages[0].role != "system":
        messages = [Message("system", contract.system), *messages]
    return messages


def _lines(text: str) -> list[str]:
    """Lines in which a line end is seen."""
    return [visible(line).replace("\n", "\u21b5") for line in text.splitlines(keepends=True)]


def _tokens(tokenizer: Tokenizer, row: Rendered, kept: int) -> tuple[Token, ...]:
    decoder = StreamDecoder(tokenizer, skip_special=False)
    texts = [decoder.push(number) for number in row.ids]
    if texts:
        texts[-1] += decoder.finish()
    kinds: list[Kind] = ["trained" if trained else "read" for trained in row.trained]
    kinds[kept:] = ["cut"] * len(kinds[kept:])
    return tuple(map(Token, row.ids, texts, kinds))


def _stretches(pieces: Sequence[Piece], lost: int) -> tuple[Stretch, ...]:
    """The pieces, the last `lost` characters of them cut off."""
    left = sum(len(piece.text) for piece in pieces) - lost
    found: list[Stretch] = []
    for piece in pieces:
        here = max(0, min(left, len(piece.text)))
        left -= here
        if piece.text[:here]:
            found.append(Stretch(piece.text[:here], "trained" if piece.trained else "read", piece.control))
        if piece.text[here:]:
            found.append(Stretch(piece.text[here:], "cut", piece.control))
    return tuple(found)


def _runs(stretches: Sequence[Stretch]) -> Iterator[tuple[Kind, str]]:
    """Neighbours of one kind as one text."""
    kind: Kind | None = None
    text = ""
    for stretch in stretches:
        if kind is not None and stretch.kind != kind:
            yield kind, text
            text = ""
        kind, text = stretch.kind, text + stretch.text
    if kind is not None:
        yield kind, text


def wanted_rows(row: int | None, rows: str | None) -> range:
    """The numbers, from 0, that `--row N` or `--rows FIRST-LAST` asks for; the first row without either."""
    if rows is None:
        return range((row or 1) - 1, row or 1)
    match = re.fullmatch(r"(\d+)-(\d+)", rows)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if row is not None or not 0 < first <= last:
        raise ConfigError(
            f"--rows is FIRST-LAST, from 1, not {rows}", hint="for example --rows 1-5, or --row 17"
        )
    return range(first - 1, last)


def rows_of(config: Config, wanted: range) -> tuple[Renderer, list[Row]]:
    """The rows with the numbers `wanted`, and what renders them. Raises a LorafitError."""
    data, offline = config.data, config.run.offline
    base = tokenizer_folder(config.model.name, revision=config.model.revision, offline=offline)
    renderer = make_renderer(config, Tokenizer.from_folder(base.path))
    files, missing = find_files(
        data.path, format=data.format, revision=data.revision, split=data.split, offline=offline
    )
    if missing:
        raise DataError.of(missing)
    found: list[Row] = []
    num_rows = 0
    for chunk in RowReader(files, data.format).chunks():
        num_rows = chunk.rows[-1].number + 1
        found += [row for row in chunk.rows if row.number in wanted]
        if num_rows >= wanted.stop:
            break
    if len(found) < len(wanted):
        hint = f"the last row is number {num_rows:,}"
        raise DataError(f"there is no row {wanted[len(found)] + 1:,}", place=", ".join(data.path), hint=hint)
    return renderer, found


NUM_BINS = 40
MOST_CHARACTERS = 3000  # of one row


def excerpt(
    training: TokenDataset, heldout: TokenDataset, tokenizer: Tokenizer, place: Callable[[int], str]
) -> dict[str, Any]:
    """The lengths of all rows in bins, and some training rows, for rows.json.

    `rows` are the first two, the one of median length and the longest; `place` says where a person finds one. Each
    is its tokens decoded, cut where training begins and ends: what the model reads, not what was meant.
    """
    order = np.argsort(training.lengths, kind="stable")
    chosen = dict.fromkeys([*range(min(2, len(order))), int(order[len(order) // 2]), int(order[-1])])
    return {
        "lengths": histogram(training.lengths, heldout.lengths),
        "rows": [_row(training, index, tokenizer, place(index)) for index in chosen],
    }


def histogram(training: NDArray[np.int32], heldout: NDArray[np.int32]) -> dict[str, list[int]]:
    """Rows in bins of equal width: bin i holds lengths from `edges[i]` to below `edges[i + 1]`."""
    longest = int(max(training.max(initial=0), heldout.max(initial=0)))
    width = -(-(longest + 1) // NUM_BINS)
    edges = np.arange(0, longest + 1 + width, width)
    counts = {"training": training, "heldout": heldout}
    return {
        "edges": edges.tolist(),
        **{name: np.histogram(lengths, edges)[0].tolist() for name, lengths in counts.items()},
    }


def _row(rows: TokenDataset, index: int, tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    ids, trained = rows.row(index)
    spans, room = [], MOST_CHARACTERS
    for is_trained, group in groupby(zip(ids.tolist(), trained.tolist(), strict=True), lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        if room > 0:
            spans.append([text if len(text) <= room else text[:room] + " [...]", bool(is_trained)])
        room -= len(text)
    return {"place": place, "tokens": len(ids), "trained": int(trained.sum()), "spans": spans}

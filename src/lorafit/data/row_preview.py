"""One row as the model reads it, for the user: trained text, text that is only read, control tokens, ids.

A row may hold any character. Characters that control a terminal or the direction of writing are shown by their code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorafit.config.schema import Config
from lorafit.data.build import make_renderer, sources_of
from lorafit.data.chat_template import ChatTemplate
from lorafit.data.formats import Chat, Row
from lorafit.data.prompt import Piece, Rendered, Renderer
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
    """A stretch of text of one kind; `control`: it is a control token."""

    text: str
    kind: Kind
    control: bool


@dataclass(frozen=True, slots=True)
class Token:
    """An id, the text that it completes (often "" in the middle of a character), and its kind."""

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class RowView:
    """A rendered row: its text and its tokens. `dropped` is the reason why it is not trained, "" if it is."""

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
    """The row as training reads it. Raises DataError if it cannot be rendered."""
    (outcome,) = renderer.render_batch([row])
    if isinstance(outcome, Problem):
        raise DataError.of([outcome])
    if not isinstance(outcome, Rendered):
        return RowView(row.number, row.place, (), (), outcome.reason)
    longest = renderer.contract.max_length
    kept, dropped = longest, ""
    is_split = renderer.contract.too_long == "split" and not row.content.asks
    if is_split:
        kept = len(outcome.ids)
    elif len(outcome.ids) > longest and renderer.contract.too_long != "truncate":
        kept = len(outcome.ids)
        dropped = f"{kept:,} tokens are more than data.max_length={longest}"
    tokens = _tokens(renderer.tokenizer, outcome, kept)
    lost = sum(len(token.text) for token in tokens[kept:])
    return RowView(row.number, row.place, _stretches(renderer.pieces(row), lost), tokens, dropped)


def marked(view: RowView, opening: str = "\u27e6", closing: str = "\u27e7") -> str:
    """The text with trained parts between marks and cut parts between doubled marks, for terminals without colours."""
    parts = []
    for kind, stretches in groupby(view.stretches, lambda stretch: stretch.kind):
        times = {"read": 0, "trained": 1, "cut": 2}[kind]
        text = "".join(visible(stretch.text) for stretch in stretches)
        parts.append(opening * times + text + closing * times)
    return "".join(parts)


def styled(view: RowView) -> list[tuple[str, str]]:
    """The text in pieces, each with its style for a terminal."""
    return [(visible(stretch.text), _STYLES[stretch.kind, stretch.control]) for stretch in view.stretches]


def token_lines(view: RowView) -> list[list[str]]:
    """A line for each token: its index, its id, its kind, and the text that it completes."""
    return [
        [str(index), str(token.id), token.kind, _line(token.text).replace("\t", "\u21e5")]
        for index, token in enumerate(view.tokens)
    ]


def shipped(renderer: Renderer, row: Row) -> str:
    """The row by the chat template that the model ships, as transformers' apply_chat_template renders it.

    Raises DataError where the model has none or the row is no conversation.
    """
    source = renderer.tokenizer.chat_template
    if source is None:
        raise DataError("the model has no chat template to compare with", hint="leave --diff out")
    messages = row.content.turns()
    if messages is None:
        raise DataError("a row of this format is no conversation: no chat template applies", place=row.place)
    contract = renderer.contract
    template = ChatTemplate(
        source,
        bos=contract.bos,
        eos=contract.eos,
        date=contract.date,
        arguments={**renderer.tokenizer.named, **contract.template_args},
    )
    tools = row.content.tools if isinstance(row.content, Chat) else ""
    return template.render(contract.with_system(messages), tools=tools)


def difference(view: RowView, other: str) -> list[tuple[str, str]]:
    """The difference from `other` to the row's text by lines: (" ", "-" or "+", the line with its end marked)."""
    ours, theirs = (list(map(_line, text.splitlines(keepends=True))) for text in (view.text, other))
    return [(line[0], line[2:]) for line in difflib.ndiff(theirs, ours) if line[0] in " -+"]


def _line(text: str) -> str:
    """`text` with visible line ends."""
    return visible(text).replace("\n", "\u21b5")


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
    stretches: list[Stretch] = []
    for piece in pieces:
        kept = max(0, min(left, len(piece.text)))
        left -= kept
        kind: Kind = "trained" if piece.trained else "read"
        stretches += [
            Stretch(piece.text[:kept], kind, piece.control),
            Stretch(piece.text[kept:], "cut", piece.control),
        ]
    return tuple(stretch for stretch in stretches if stretch.text)


def wanted_rows(row: int | None, rows: str | None) -> range:
    """The numbers, from 0, that `--row N` or `--rows FIRST-LAST` requests; the first row without either."""
    if rows is None:
        return range((row or 1) - 1, row or 1)
    match = re.fullmatch(r"(\d+)-(\d+)", rows)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if row is not None or not 0 < first <= last:
        raise ConfigError(
            f"--rows is FIRST-LAST, from 1, not {rows}", hint="for example --rows 1-5, or --row 17"
        )
    return range(first - 1, last)


def rows_of(config: Config, numbers: range) -> tuple[Renderer, list[Row]]:
    """The rows with `numbers`, and their renderer. Raises a LorafitError."""
    base = tokenizer_folder(config.model.name, revision=config.model.revision, offline=config.run.offline)
    renderer = make_renderer(config, Tokenizer.from_folder(base.path, tokens=config.lora.tokens))
    return renderer, sources_of(config).reader().read(numbers)


NUM_BINS = 40
MOST_CHARACTERS = 3000  # of one row


def excerpt(
    training: TokenDataset, heldout: TokenDataset, tokenizer: Tokenizer, place: Callable[[int], str]
) -> dict[str, Any]:
    """The lengths of all rows in bins, and some training rows, for rows.json.

    `rows` are the first two, the one of median length and the longest; `place` gives the place of one for messages.
    The text of each is decoded from its tokens, cut where training begins and ends.
    """
    order = np.argsort(training.lengths, kind="stable")
    chosen = dict.fromkeys([*range(min(2, len(order))), int(order[len(order) // 2]), int(order[-1])])
    return {
        "lengths": histogram({"training": training.lengths, "heldout": heldout.lengths}),
        "rows": [shown_row(training, index, tokenizer, place(index)) for index in chosen],
    }


def histogram(lengths: Mapping[str, NDArray[np.int32]], width: int = 0) -> dict[str, list[int]]:
    """Rows in bins of equal width: bin i holds lengths from `edges[i]` to below `edges[i + 1]`.

    Without a width there are about NUM_BINS.
    """
    longest = max(int(values.max(initial=0)) for values in lengths.values())
    width = width or -(-(longest + 1) // NUM_BINS)
    edges = np.arange(0, longest + 1 + width, width)
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in lengths.items()}
    return {"edges": edges.tolist(), **counts}


def shown_row(rows: TokenDataset, index: int, tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    """The row at `index` as JSON values: its text in spans, each with whether it is trained, and its place."""
    ids, trained = rows.row(index)
    spans, room = [], MOST_CHARACTERS
    for is_trained, group in groupby(zip(ids.tolist(), trained.tolist(), strict=True), lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        if room > 0:
            spans.append([text if len(text) <= room else text[:room] + " [...]", bool(is_trained)])
        room -= len(text)
    return {"place": place, "tokens": len(ids), "trained": int(np.count_nonzero(trained)), "spans": spans}

"""The text of an answer, token by token: whole characters, stripped, ended by stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.data.tokenizer import Tokenizer


class AnswerText:
    """Pieces of one answer. Joined, they are the answer up to the first text of `stops`.

    `strip` removes white space at both ends, as `Model.generate` does. `is_stopped` is True after a text of `stops`:
    all later pieces are empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), strip: bool = True) -> None:
        self.is_stopped = False
        self._decoder = tokenizer.stream_decoder()
        self._stops = tuple(stop for stop in stops if stop)
        self._strip = strip
        self._has_text = False
        self._unsure = ""  # may be the beginning of a stop text
        self._blank = ""  # white space that may be at the end

    def push(self, token_id: int) -> str:
        """The text that is complete after `token_id`, often ""."""
        return self._stripped(self._cut(self._decoder.push(token_id), is_last=False))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return self._stripped(self._cut(self._decoder.finish(), is_last=True))

    def _cut(self, piece: str, is_last: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._unsure + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.is_stopped = True
            return text[: min(starts)]
        held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._unsure = text[len(text) - held :]
        return text[: len(text) - held]

    def _stripped(self, piece: str) -> str:
        if not self._strip:
            return piece
        text = self._blank + piece if self._has_text else piece.lstrip()
        ready = text.rstrip()
        if not ready:
            self._blank = text if self._has_text else ""
            return ""
        self._has_text, self._blank = True, text[len(ready) :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as text, with its leading space. `data` is its UTF-8, None for a part of a character."""

    text: str
    data: bytes | None


class TokenTexts:
    """The text of single tokens, as it is after another token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")[-1:]
        self._before = tokenizer.decode(self._anchor)
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        """The text of one token. That of a control token is its name."""
        if token_id not in self._known:
            text = self._tokenizer.decode([*self._anchor, token_id])[len(self._before) :]
            self._known[token_id] = TokenText(text, None if "\ufffd" in text else text.encode())
        return self._known[token_id]

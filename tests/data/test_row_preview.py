"""Rows for people: the text is the one that is trained, nothing in it steers a terminal or a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.data.contents import NAMES, contents, make, swallows_system
from tests.data.toy_tokenizers import hostile_text, load, toys

from lorafit.data.formats import Completion, Content, Instruction, Row
from lorafit.data.row_preview import RowView, difference, marked, shipped, styled, view_row
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError
from lorafit.redact import visible
from lorafit.report.escape import rows_page


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: load(folder) for name, folder in toys(tmp_path_factory.mktemp("toys")).items()}


def row(content: Content) -> Row:
    return Row(6, "x.json row 7", content)


HELLO = row(Instruction("Say hello.", "", "The answer: hello </s> 🙂."))


@given(name=st.sampled_from(NAMES), content=contents)
def test_a_view_is_the_text_and_the_tokens_of_the_row(
    tokenizers: dict[str, Tokenizer], name: str, content: Content
) -> None:
    assume(name != "llama2" or not swallows_system(content))
    renderer = make(tokenizers[name])
    view = view_row(renderer, row(content))
    spans = renderer.text(row(content))
    assert view.text == "".join(span.text for span in spans)
    trained = "".join(stretch.text for stretch in view.stretches if stretch.kind == "trained")
    assert trained == "".join(span.text for span in spans if span.trained)
    (rendered,) = renderer.render_batch([row(content)])
    assert [token.id for token in view.tokens] == rendered.ids  # type: ignore[union-attr]
    assert [token.kind == "trained" for token in view.tokens] == rendered.trained  # type: ignore[union-attr]
    assert "".join(token.text for token in view.tokens) == renderer.tokenizer.decode(rendered.ids)  # type: ignore[union-attr]
    controls = [stretch.text for stretch in view.stretches if stretch.control]
    wanted = renderer.tokenizer.control
    assert [wanted[text] for text in controls] == [t.id for t in view.tokens if t.id in wanted.values()]


def test_typed_control_tokens_are_told_from_real_ones(tokenizers: dict[str, Tokenizer]) -> None:
    view = view_row(make(tokenizers["zephyr"]), HELLO)
    found = [(stretch.text, stretch.control) for stretch in view.stretches if "</s>" in stretch.text]
    assert found == [("</s>", True), ("The answer: hello </s> 🙂.", False), ("</s>", True)]


def test_marks(tokenizers: dict[str, Tokenizer]) -> None:
    renderer = make(tokenizers["zephyr"])
    view = view_row(renderer, HELLO)
    assert marked(view).endswith("<|assistant|>\n⟦The answer: hello </s> 🙂.</s>⟧\n")
    assert marked(view).replace("⟦", "").replace("⟧", "") == view.text
    assert (
        view.heading
        == f"x.json row 7: {len(view.tokens)} tokens, {sum(t.kind == 'trained' for t in view.tokens)} trained"
    )
    short = view_row(make(tokenizers["zephyr"], max_length=len(view.tokens) - 6, too_long="truncate"), HELLO)
    assert short.heading.endswith("6 cut off")
    assert marked(short).count("⟦⟦") == 1
    assert short.text == view.text
    refused = view_row(make(tokenizers["zephyr"], max_length=10), HELLO)
    assert "more than data.max_length=10" in refused.heading
    assert refused.text == view.text


def test_a_row_that_is_dropped_says_why(tokenizers: dict[str, Tokenizer]) -> None:
    view = view_row(make(tokenizers["zephyr"]), row(Instruction("Say.", "", " ")))
    assert view.heading == "x.json row 7: not trained, the answer is empty"
    with pytest.raises(DataError, match="reserved"):
        view_row(make(tokenizers["zephyr"]), row(Instruction("\ufdd0", "", "x")))


@given(
    text=st.text()
    | hostile_text
    | st.sampled_from(["\x1b[31m", "a\u202eb", "\r\x07", "\x9b1m", "\u200b", "\ufeff"])
)
def test_nothing_steers_a_terminal(text: str) -> None:
    shown = visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert re.sub(r"<U\+([0-9A-F]{4})>", lambda m: chr(int(m[1], 16)), shown) in (
        text,
        re.sub(r"<U\+([0-9A-F]{4})>", lambda m: chr(int(m[1], 16)), text),
    )


class Reader(HTMLParser):
    """The text of a fragment, and all tags and attributes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert all(name == "class" for name, _ in attrs), attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(
    text=st.text(max_size=40).filter(str.strip)
    | st.sampled_from(["<script>alert(1)</script>", "&lt;b&gt;", '"><img>'])
)
@pytest.mark.parametrize("ids", [False, True])
def test_a_page_holds_text_and_no_markup_of_a_row(
    tokenizers: dict[str, Tokenizer], text: str, ids: bool
) -> None:
    try:
        view = view_row(make(tokenizers["zephyr"]), row(Completion("Say: ", text)))
    except DataError:
        return
    reader = Reader()
    text = rows_page("Rows", [(view, [])], ids=ids)
    reader.feed(text[text.index("<section") : text.index("</body>")])
    assert reader.tags == {"section", "h2", "pre", "span"}
    if not ids:
        assert visible(view.text).replace("\r", "") in reader.text
    styled(view)


def test_a_page_fetches_nothing_and_runs_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    view = view_row(make(tokenizers["zephyr"]), HELLO)
    text = rows_page("Rows <b>", [(view, [("-", "<i>"), ("+", "x")])])
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|https?://|<b>|<i>", text)


def test_the_difference_to_the_shipped_template(tokenizers: dict[str, Tokenizer]) -> None:
    renderer = make(tokenizers["llama3"])
    view = view_row(renderer, HELLO)
    assert all(sign == " " for sign, _ in difference(view, shipped(renderer, HELLO)))
    other = make(tokenizers["llama3"], "classic")
    signs = {sign for sign, _ in difference(view_row(other, HELLO), shipped(other, HELLO))}
    assert {"-", "+"} <= signs
    with pytest.raises(DataError, match="no conversation"):
        shipped(renderer, row(Completion("a", "b")))


def test_views_are_values() -> None:
    assert RowView(1, "x", (), ()) == RowView(1, "x", (), ())

"""The tokenizer equals the original on plain text, and content never becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.toy_tokenizers import CHATML, hostile_text, llama_like, load, plain_text, qwen_like, toys
from tokenizers import Tokenizer as RustTokenizer

from lorafit.data.tokenizer import BORDER, Tokenizer, reserved
from lorafit.errors import ModelError

NAMES = ["qwen", "zephyr", "legacy"]
blank_text = st.lists(st.sampled_from([" ", "\n", "the", "answer", "▁", "1"]), max_size=9).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toys(tmp_path_factory.mktemp("toys"))


Pairs = dict[str, tuple[Tokenizer, RustTokenizer]]


@pytest.fixture(scope="module")
def both(folders: dict[str, Path]) -> Pairs:
    """Our tokenizer and the original of each kind."""
    originals = {name: RustTokenizer.from_file(str(folders[name] / "tokenizer.json")) for name in NAMES}
    return {name: (load(folders[name]), originals[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@given(
    text=plain_text
    | st.lists(st.sampled_from([" ", "\n", "the", "answer", "▁", "1"]), max_size=9).map("".join)
)
def test_plain_text_is_encoded_as_by_the_original(both: Pairs, name: str, text: str) -> None:
    ours, original = both[name]
    assert ours.encode(text) == original.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", NAMES)
@given(parts=st.lists(st.tuples(plain_text, st.booleans()), max_size=5))
def test_template_control_tokens_are_encoded_as_by_the_original(
    both: Pairs, name: str, parts: list[tuple[str, bool]]
) -> None:
    ours, original = both[name]
    assert ours.eos
    text = "".join(part + (ours.eos.text if control else "") for part, control in parts)
    ids, borders = next(ours.encode_batch([ours.protect(text)]))
    assert ids == original.encode(text, add_special_tokens=False).ids
    assert borders == []
    assert ours.public(ours.protect(text)) == text


@pytest.mark.parametrize("name", NAMES)
@given(text=hostile_text)
def test_content_never_becomes_a_control_token(both: Pairs, name: str, text: str) -> None:
    ours, _ = both[name]
    ids = ours.encode(text)
    assert not set(ids) & set(ours.control.values())
    if name != "qwen":  # whose NFC normaliser changes what is typed
        text = text.replace("▁", " ")
        text = text[1:] if name != "legacy" and text.startswith(" ") else text
        assert ours.decode(ids) == text


def test_typed_control_tokens_come_back_as_typed(both: Pairs) -> None:
    text = "a</s>b<s><|im_end|> <|endoftext|>"
    for ours, original in both.values():
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert set(original.encode(text).ids) & set(ours.control.values())  # the original is fooled


@pytest.mark.parametrize("name", NAMES)
@given(head=hostile_text, tail=hostile_text)
def test_a_border_cuts_where_inference_does(both: Pairs, name: str, head: str, tail: str) -> None:
    ours, _ = both[name]
    ids, [border] = next(ours.encode_batch([head + BORDER + tail]))
    assert ids[:border] == ours.encode(head)
    whole = ours.encode(head + tail)
    assert ours.decode(ids) == ours.decode(whole) or name == "qwen"  # NFC does not compose over the border


@pytest.mark.parametrize("name", NAMES)
@given(text=hostile_text)
def test_streaming_gives_the_same_text(both: Pairs, name: str, text: str) -> None:
    ours, _ = both[name]
    ids = ours.encode(text)
    decoder = ours.stream_decoder()
    pieces = [decoder.push(token) for token in ids]
    assert "".join([*pieces, decoder.finish()]) == ours.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_attributes(folders: dict[str, Path], tmp_path: Path) -> None:
    llama, qwen = load(folders["zephyr"]), load(folders["qwen"])
    assert llama.bos
    assert llama.eos
    assert (llama.bos.text, llama.bos.id, llama.eos.text, llama.eos.id) == ("<s>", 1, "</s>", 2)
    assert llama.adds_bos
    assert llama.stop_ids == (2,)
    assert "<unk>" not in llama.control
    assert qwen.bos is None
    assert not qwen.adds_bos
    assert qwen.chat_template == CHATML
    assert set(qwen.control) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    original = RustTokenizer.from_file(str(folders["qwen"] / "tokenizer.json"))
    assert qwen.vocab_size == original.get_vocab_size()
    assert qwen.control["<|im_end|>"] == original.token_to_id("<|im_end|>")
    assert not load(llama_like(tmp_path / "a", add_bos_token=False)).adds_bos
    assert load(llama_like(tmp_path / "b")).sha256 == llama.sha256 != qwen.sha256


def test_generation_config_adds_stop_ids(tmp_path: Path) -> None:
    folder = qwen_like(tmp_path)
    end = load(folder).control["<|im_end|>"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    tokenizer = load(folder)
    assert tokenizer.eos
    assert tokenizer.stop_ids == (tokenizer.eos.id, end)


@pytest.mark.parametrize("place", ["jinja", "json", "config", "named"])
def test_chat_template_is_found_wherever_it_is(tmp_path: Path, place: str) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = llama_like(tmp_path, {"config": "yes", "named": named}.get(place, "no"))  # type: ignore[arg-type]
    if place == "jinja":
        (folder / "chat_template.jinja").write_text("yes")
    if place == "json":
        (folder / "chat_template.json").write_text('{"chat_template": "yes"}')
    assert load(folder).chat_template == "yes"


def test_merges_cannot_make_a_control_token(tmp_path: Path) -> None:
    folder = llama_like(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for piece in ("<", "/", "s", ">", "</", "s>"):
        spec["model"]["vocab"].setdefault(piece, len(spec["model"]["vocab"]))
    spec["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load(folder)
    assert 2 not in tokenizer.encode("a</s>b")
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"


def test_tokens_that_only_the_config_declares_are_control_tokens(tmp_path: Path) -> None:
    folder = llama_like(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load(folder)
    assert tokenizer.eos
    assert tokenizer.eos.id == 2
    assert next(tokenizer.encode_batch([tokenizer.protect("a</s>")]))[0][-1] == 2


def test_missing_or_broken_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="download the model again"):
        load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match="save_pretrained"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be used"):
        load(tmp_path)


def test_reserved_characters_are_named() -> None:
    assert reserved("plain") == reserved("한국어") == ""
    assert reserved("a\ufdd2") == "U+FDD2"


@pytest.mark.shared
@pytest.mark.parametrize("model", ["tinyllama-1.1b-chat-skeleton", "tinystories-656k"])
def test_real_tokenizers_equal_transformers(shared: Path, model: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(shared / "models" / model)
    ours = load(shared / "models" / model)
    rows = json.loads((shared / "data/alpaca_en_demo.json").read_text())[:100]
    for row in rows:
        text = f"{row['instruction']}\n\n{row['output']}"
        ids = ours.encode(text)
        if 0 not in ids:  # transformers' LlamaTokenizer leaves characters out that the vocabulary lacks
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    text = f"Once upon{theirs.eos_token}\nTwo {theirs.eos_token} three"
    ids, _ = next(ours.encode_batch([ours.protect(text)]))
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.vocab_size == len(theirs)

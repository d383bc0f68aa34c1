"""A vocabulary that went into a GGUF file comes back as a tokenizer with the same ids, for texts of all kinds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.toy_tokenizers import llama_like, qwen_like
from tests.export.test_vocabulary import PIECES, strings
from tests.shared_files import smollm2, smollm2_gguf

from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError
from lorafit.export.gguf_vocabulary import write_vocabulary
from lorafit.gguf_file.header import read_header
from lorafit.gguf_file.splits import BY_NAME
from lorafit.gguf_file.tokenizer import merges_of, tokenizer_files
from lorafit.hub.client import model_folder

ROOT = Path(__file__).parents[2]
SIZES = {"qwen": 700, "llama": 700, "demo": 1024}


def copy_of(original: Tokenizer, folder: Path, size: int) -> Tokenizer:
    """The tokenizer, written to a GGUF file as exports do and read again."""
    folder.mkdir()
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_vocabulary(writer, original, size)
    for key, control in (("bos", original.bos), ("eos", original.eos)):
        if control is not None:
            getattr(writer, f"add_{key}_token_id")(control.id)
    writer.add_add_bos_token(original.adds_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    for name, content in tokenizer_files(read_header(path)).items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=SIZES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    work = tmp_path_factory.mktemp(request.param)
    makers = {"qwen": qwen_like, "llama": lambda folder: llama_like(folder, legacy=True)}
    folder = ROOT / "demo" / "model"
    if request.param in makers:
        folder = work / "original"
        makers[request.param](folder)
    original = Tokenizer.from_folder(folder)
    return original, copy_of(original, work / "copy", SIZES[request.param])


def texts(original: Tokenizer) -> Iterator[str]:
    """Five hundred texts of pieces in several languages, of blanks and of the tokenizer's own tokens."""
    own = [original.decode([number]) for number in range(3, original.vocab_size)]
    own = [text for text in own if text and "\ufffd" not in text]
    yield from strings(200, PIECES)
    yield from strings(300, [*own, *PIECES[:12]])


def test_ids_are_the_same(pair: tuple[Tokenizer, Tokenizer]) -> None:
    original, copy = pair
    for text in texts(original):
        assert copy.encode(text) == original.encode(text), repr(text)
        assert copy.decode(copy.encode(text)) == original.decode(original.encode(text)), repr(text)


def test_named_tokens_are_the_same(pair: tuple[Tokenizer, Tokenizer]) -> None:
    original, copy = pair
    assert (copy.bos, copy.eos, copy.adds_bos) == (original.bos, original.eos, original.adds_bos)
    assert copy.control.items() >= original.control.items()
    assert copy.blank == original.blank


@given(
    st.dictionaries(st.text("abc", min_size=2, max_size=5), st.floats(-50, 0), max_size=12),
    st.text("abc", max_size=14),
)
def test_merges_give_the_pieces_with_the_highest_scores(scored: dict[str, float], text: str) -> None:
    """The merges by rank end where merging the pair with the highest score first ends, as in SentencePiece."""
    pieces = {
        **dict.fromkeys("abc", -100.0),
        **{piece: float(rank) for rank, piece in enumerate(sorted(scored, key=scored.__getitem__))},
    }
    ids = {piece: number for number, piece in enumerate(pieces)}
    ranks = {
        (first, second): rank for rank, (first, second) in reversed([*enumerate(merges_of(pieces, ids))])
    }
    by_rank, by_score = list(text), list(text)
    while found := [
        (ranks[pair], at)
        for at in range(len(by_rank) - 1)
        if (pair := (by_rank[at], by_rank[at + 1])) in ranks
    ]:
        _, at = min(found)
        by_rank[at : at + 2] = ["".join(by_rank[at : at + 2])]
    while found := [
        (-pieces[piece], at)
        for at in range(len(by_score) - 1)
        if (piece := by_score[at] + by_score[at + 1]) in pieces
    ]:
        _, at = min(found)
        by_score[at : at + 2] = ["".join(by_score[at : at + 2])]
    assert len(by_rank) == len(by_score)


def vocabulary(path: Path, **changes: Any) -> Path:
    """A file with a vocabulary of three tokens, changed."""
    writer = gguf.GGUFWriter(path, "llama")
    keys = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "a"],
        "scores": [0.0, 0.0, -1.0],
        "token_type": [2, 3, 1],
    }
    for key, value in {**keys, **changes}.items():
        add = {str: writer.add_string, list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": ["a", "b", "a"]}, "the token 'a' is there twice"),
        ({"token_type": [1]}, "1 of int, and not 3 of int"),
        ({"scores": ["a", "b", "c"]}, "3 of str, and not 3 of float"),
        ({"scores": None}, "scores` is missing"),
        ({"tokens": None, "scores": None, "token_type": None}, "the file has no vocabulary"),
        ({"model": "gpt2"}, "no name for the split of texts"),
        ({"add_bos_token": "yes"}, "a bool is expected"),
        ({"bos_token_id": 3}, "there are 3 tokens"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        tokenizer_files(read_header(vocabulary(tmp_path / "v.gguf", **changes)))


def test_every_split_can_be_loaded() -> None:
    """The regular expressions are ones that the tokenizers library takes."""
    from tokenizers import Tokenizer as Rust
    from tokenizers.models import BPE

    for split in {*BY_NAME.values()}:
        spec = json.loads(Rust(BPE()).to_str())
        assert Rust.from_str(json.dumps({**spec, "pre_tokenizer": split.pre_tokenizer()}))


@pytest.mark.slow
def test_ids_of_a_real_file_are_those_of_its_model() -> None:
    """SmolLM2: texts in several languages, with code, blanks and emoji, and the template."""
    copy, original = (
        Tokenizer.from_folder(model_folder(str(smollm2_gguf())).path),
        Tokenizer.from_folder(smollm2()),
    )
    dice = random.Random(0)
    code = [
        "def f(x):\n    return x ** 2",
        "for (int i = 0; i < 10; ++i) {",
        "SELECT * FROM t WHERE a <> 'b';",
    ]
    samples = [*texts(original), *("\n".join(dice.sample(code, 2)) for _ in range(20))]
    # the folder, which was made from the file, lacks the split of digits that the file names (`smollm`)
    samples = [text for text in samples if not any(map(str.isnumeric, text))]
    assert len(samples) > 100
    for text in samples:
        assert copy.encode(text) == original.encode(text), repr(text)
    assert copy.chat_template == original.chat_template
    assert (copy.bos, copy.eos, copy.stop_ids, copy.control) == (
        original.bos, original.eos, original.stop_ids, original.control,
    )  # fmt: skip

"""Token ids are llama.cpp's: for generated strings and for whole prompts, with the tokenizers that people have."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from tests.data.toy_tokenizers import llama_like, qwen_like
from tests.export.made import source_of
from tests.runs import run_to_export
from tests.shared_files import shared_dir
from tests.tiny_models import write_model

from lorafit.data.formats import Message
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError
from lorafit.export.chat_template import written_prompt
from lorafit.export.gguf_model import write_gguf
from lorafit.export.gguf_vocabulary import write_vocabulary
from lorafit.export.llama_cpp import Server
from lorafit.export.run_source import RunSource

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARED = ["tinyllama-1.1b-chat-skeleton", "tinystories-656k"]
MODELS = [*(pytest.param(name, marks=pytest.mark.shared) for name in SHARED), "demo", "toy", "legacy toy"]
PIECES = [
    "the", "Once upon a time", "llama", "It's", "don't", "1234", "3.14", "x = y", "def f(x):", "http://a.b/c?d=e",
    " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "a", "Z", "é", "e\u0301", "ß", "한국어", "라마가 ", "日本", "🙂",
    "👩‍👩‍👧", "\u200b", "\u00a0", "▁", "--", "...", "!?", "(", ")", "{", "}", "\\n", "<", "</", "<|", "|>", "[INST]",
    "### Response:", "\x01", "\u3000", "ﬁ", "ⅷ", "𝒳", "العربية", "עברית", "ไทย", "🇰🇷", "'", '"', "`", "#", "@", "%",
    "antidisestablishment",
]  # fmt: skip
RANGES = [(32, 126), (0xA1, 0x17F), (0x3B1, 0x3C9), (0xAC00, 0xD7A3), (0x4E00, 0x9FFF), (0x1F300, 0x1F64F)]


def strings(count: int, pieces: Sequence[str] = PIECES) -> Iterator[str]:
    """Texts of all kinds of pieces, and of random characters; the same every time."""
    dice = random.Random(0)
    for _ in range(count):
        if dice.random() < 0.8:
            yield "".join(
                dice.choice(pieces) + dice.choice(["", "", " "]) for _ in range(dice.randint(1, 12))
            )
        else:
            ranges = [
                (32, 126),
                (0xA1, 0x17F),
                (0x3B1, 0x3C9),
                (0xAC00, 0xD7A3),
                (0x4E00, 0x9FFF),
                (0x1F300, 0x1F64F),
            ]
            yield "".join(chr(dice.randint(*dice.choice(ranges))) for _ in range(dice.randint(1, 20)))


def source_with(folder: Path, tokenizer: Path, size: int) -> RunSource:
    """A run of a tiny network that has the tokenizer of the model in folder `tokenizer`."""
    model = write_model(folder / "model", vocab_size=size, chat=False)
    for file in tokenizer.glob("*token*.json"):
        shutil.copyfile(file, model / file.name)
    if (tokenizer / "generation_config.json").is_file():
        shutil.copyfile(tokenizer / "generation_config.json", model / "generation_config.json")
    return source_of(run_to_export(folder, "train.max_steps=1", "run.samples=0", model=model))


def toy(folder: Path, *, legacy: bool) -> Path:
    """A small SentencePiece-like tokenizer in which every token but the first is one that a merge makes."""
    llama_like(folder, None, legacy=legacy)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"] = {text: n for text, n in spec["model"]["vocab"].items() if "\n" not in text}
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if legacy:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True}))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunSource, Server]:
    name = request.param
    work = tmp_path_factory.mktemp(name.replace(" ", "-"))
    if name == "demo":
        folder = ROOT / "demo" / "model"
    elif "toy" in name:
        folder = toy(work / "toy", legacy="legacy" in name)
    else:
        folder = shared_dir() / "models" / name
    sizes = {"tinystories-656k": 2048, "demo": 1024, "toy": 700, "legacy toy": 700}
    source = source_with(work, folder, sizes.get(name, 32000))
    write_gguf(source, work / "model.gguf", "f16", lambda done, total: None)
    return source, Server(work / "model.gguf", None, 256, 1)


def check(opened: tuple[RunSource, Server], count: int) -> None:
    """As many texts of the vocabulary's own pieces as of others; those with characters that it lacks are left out:
    where a vocabulary has no bytes for them, llama.cpp has nothing to say.
    """
    source, server = opened
    tokenizer, checked = source.renderer.tokenizer, 0
    own = [tokenizer.decode([number]) for number in range(3, tokenizer.vocab_size)]
    own = [text for text in own if text and "\ufffd" not in text and text not in tokenizer.control]
    for text in chain(strings(count // 2), strings(count // 2, own), strings(count, [*own, *PIECES[:12]])):
        if checked == count:
            break
        # where the blank stands before the first word only, it is the template that writes it
        prefix = tokenizer._prefix
        blank = " " if prefix and prefix.first_only and text[0] not in prefix.unless else ""
        asked = {"content": blank + text, "add_special": False, "parse_special": False}
        if tokenizer.unknown_id in tokenizer.encode(text):
            continue
        checked += 1
        assert server._ask("/tokenize", **asked)["tokens"] == tokenizer.encode(text), repr(text)
    assert checked >= count * 0.8


def test_ids_of_generated_strings_are_llama_cpps(opened: tuple[RunSource, Server]) -> None:
    check(opened, 300)


def test_ids_of_ten_thousand_strings_are_llama_cpps(opened: tuple[RunSource, Server]) -> None:
    check(opened, 10_000 if opened[0].arch.vocab_size != 700 else 1_000)  # 700: the toys


def test_ids_of_whole_prompts_are_llama_cpps(opened: tuple[RunSource, Server]) -> None:
    """The template in the file, rendered by llama.cpp and tokenised with whatever it adds: the contract's ids."""
    source, server = opened
    for text in strings(150):
        messages = [Message("user", text)]
        if source.renderer.tokenizer.unknown_id in source.renderer.prompt_ids(messages):
            continue
        rendered = server.render([{"role": "user", "content": text}])
        assert server.tokenize(rendered) == source.renderer.prompt_ids(messages), repr(text)
        assert written_prompt(source.renderer, messages).endswith(rendered)


def of(folder: Path, size: int = 600) -> dict[str, Any]:
    """The values that a GGUF file has of the tokenizer in `folder`, without `tokenizer.ggml.`."""
    writer = gguf.GGUFWriter(None, "llama")
    write_vocabulary(writer, Tokenizer.from_folder(folder), size)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}


def test_every_id_has_a_text_and_a_kind(tmp_path: Path) -> None:
    folder = qwen_like(tmp_path / "qwen")
    tokenizer = Tokenizer.from_folder(folder)
    made = of(folder)
    assert (made["model"], made["pre"], made["normalizer.nfc"]) == ("gpt2", "qwen2", True)
    tokens, kinds = made["tokens"], made["token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 600
    controls = {number: text for text, number in tokenizer.control.items()}
    assert {n: tokens[n] for n, kind in enumerate(kinds) if kind == TokenType.CONTROL} == controls
    unused = [n for n, kind in enumerate(kinds) if kind == TokenType.UNUSED]
    assert unused == list(range(tokenizer.vocab_size, 600))
    assert not made["add_space_prefix"]


def test_sentence_piece_scores_tokens_by_their_first_merge(tmp_path: Path) -> None:
    folder = llama_like(tmp_path / "a")
    made = of(folder, 700)
    assert (made["model"], made["token_type"].count(TokenType.BYTE)) == ("llama", 256)
    assert "merges" not in made
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    ids, scores = [made["tokens"].index("".join(pair)) for pair in merges], made["scores"]
    assert [scores[number] for number in ids] == [-float(rank) for rank in range(len(merges))]
    assert max(score for n, score in enumerate(scores) if n not in ids) < min(scores[n] for n in ids)


def test_what_llama_cpp_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ids up to"):
        of(qwen_like(tmp_path / "qwen"), size=300)
    odd = qwen_like(tmp_path / "odd")
    spec = (
        (odd / "tokenizer.json")
        .read_text(encoding="utf-8")
        .replace("|ll|d)", "|ll|d|x)")
        .replace("'ll|'d", "'xx|'d")
    )
    (odd / "tokenizer.json").write_text(spec, encoding="utf-8")
    with pytest.raises(ModelError, match="no name for the pattern"):
        of(odd)

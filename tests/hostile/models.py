"""Hostile model folders: headers of weights that lie, configs of absurd size, tokenizers that explode, index files."""

from __future__ import annotations

import json
import os
import struct
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import ESCAPES, IMPORT_BOMB, PICKLE, Case, Place, cases, edited, with_changes

CONFIG, TOKENIZER, TOKENS = "config.json", "tokenizer.json", "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EVERYWHERE = frozenset({"train", "plan", "generate"})


def model(change: Callable[[Path], object]) -> Callable[[Place], Path]:
    """A copy of the good model, changed."""

    def make(place: Place) -> Path:
        folder = place.copy("model", "model")
        change(folder)
        return folder

    return make


def raw(name: str, content: str | bytes | Callable[[], str]) -> Callable[[Place], Path]:
    def change(folder: Path) -> None:
        made = content() if callable(content) else content
        (folder / name).write_bytes(made.encode() if isinstance(made, str) else made)

    return model(change)


def config(**changes: Any) -> Callable[[Place], Path]:
    return model(lambda folder: edited(folder / CONFIG, **changes))


def tokens(**changes: Any) -> Callable[[Place], Path]:
    return model(lambda folder: edited(folder / TOKENS, **changes))


def tokenizer(change: Callable[[Any], Any]) -> Callable[[Place], Path]:
    return model(lambda folder: with_changes(folder / TOKENIZER, change))


def generation(value: Any) -> Callable[[Place], Path]:
    return model(
        lambda folder: (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    )


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Place], Path]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return model(change)


def index(names: Any) -> Callable[[Place], Path]:
    """A sharded model whose index says that."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return model(change)


def header(value: Any, numbers: bytes = b"\0" * 64) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def tensor(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, bytes] = {
    "empty": b"",
    "a few bytes": b"\1\2\3",
    "no header": struct.pack("<Q", 0),
    "header of a hundred gigabytes": struct.pack("<Q", 100 << 30) + b"{}",
    "header of all there is": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header of a negative length": struct.pack("<q", -1) + b"{}",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header is no JSON": header(b"\xff" * 100),
    "header is a list": header([1, 2]),
    "header is nested": header(b"[" * 100_000),
    "header is nested objects": header(b'{"a":' * 100_000),
    "header of blanks": header(b" " * 1_000_000),
    "a hundred thousand names": header({f"t{i}": tensor("U8", [0], [0, 0]) for i in range(100_000)}, b""),
    "a long name": header({"a" * 1_000_000: tensor()}, b"\0" * 16),
    "a name that steers a terminal": header({ESCAPES: tensor()}, b"\0" * 16),
    "no such type": header({"a": tensor("PICKLE")}),
    "type of another type": header({"a": tensor(1)}),
    "type of two bytes": header({"a": tensor("F16")}),
    "shape too large": header({"a": tensor(shape=[2**62, 4])}),
    "shape of overflow": header({"a": tensor(shape=[2**63, 2**63])}),
    "negative shape": header({"a": tensor(shape=[-2, -2])}),
    "shape of fractions": header({"a": tensor(shape=[0.5, 8])}),
    "shape is text": header({"a": tensor(shape="22")}),
    "offsets beyond": header({"a": tensor(offsets=[0, 2**40])}),
    "negative offsets": header({"a": tensor(offsets=[-16, 0])}),
    "offsets turned round": header({"a": tensor(offsets=[16, 0])}),
    "overlapping": header({"a": tensor(), "b": tensor(offsets=[8, 24])}, b"\0" * 24),
    "hole": header({"a": tensor(), "b": tensor(offsets=[32, 48])}, b"\0" * 48),
    "bytes left over": header({"a": tensor()}, b"\0" * 99),
    "the same name twice": header(
        b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}", b"\0" * 16
    ),
    "metadata of other types": header({"__metadata__": {"a": [1]}, "a": tensor()}, b"\0" * 16),
    "a pickle": PICKLE,
    "a zip of pickles": b"PK\3\4" + PICKLE,
}


def with_code(folder: Path) -> None:
    edited(folder / CONFIG, auto_map={"AutoModelForCausalLM": "modeling.Model"}, architectures=["os.system"])
    edited(
        folder / TOKENS,
        auto_map={"AutoTokenizer": ["tokenization.Tokenizer", None]},
        tokenizer_class="os.system",
    )
    for name in ("modeling.py", "tokenization.py", "__init__.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(IMPORT_BOMB)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(PICKLE)


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "away")
    (folder / "away").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def sparse(folder: Path) -> None:
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header({"a": tensor(shape=[2**34, 4], offsets=[0, 2**38])}, b""))
        file.truncate(file.tell() + 2**38)


def replacing(*contents: str, pattern: str = " ") -> Callable[[Any], None]:
    """A normalizer that replaces again and again."""

    def change(spec: Any) -> None:
        steps = [
            {"type": "Replace", "pattern": {"String": pattern}, "content": content} for content in contents
        ]
        spec["normalizer"] = {"type": "Sequence", "normalizers": steps}

    return change


def split_by(pattern: str) -> Callable[[Any], None]:
    def change(spec: Any) -> None:
        spec["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }

    return change


def put(**parts: Any) -> Callable[[Any], None]:
    return lambda spec: spec.update(parts)


def in_model(**parts: Any) -> Callable[[Any], None]:
    return lambda spec: spec["model"].update(parts)


def nested(depth: int) -> str:
    return '{"normalizer": ' + '{"type": "Sequence", "normalizers": [' * depth


def charsmap(text: bytes) -> Any:
    return {
        "type": "Precompiled",
        "precompiled_charsmap": b64encode(struct.pack("<I", 4) + b"\0" * 4 + text).decode(),
    }


def far_ids(spec: Any) -> None:
    spec["model"]["vocab"] = {token: number + 100_000 for token, number in spec["model"]["vocab"].items()}


MODEL: dict[str, Case | Callable[[Place], Path]] = {
    "code beside it": Case(model(with_code), harmless=EVERYWHERE),
    "pickles only": model(only_pickles),
    "weights: sparse and huge": Case(model(sparse), many=True),
    "weights: a pipe": replaced(WEIGHTS, os.mkfifo),
    "weights: a device": replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "weights: a folder": replaced(WEIGHTS, Path.mkdir),
    "index: outside": index({"a": "../../outside/precious.safetensors"}),
    "index: absolute": index({"a": "/etc/passwd"}),
    "index: upwards": index({"a": ".."}),
    "index: of another system": index({"a": "..\\..\\x.safetensors"}),
    "index: a null": index({"a": "x\0.safetensors"}),
    "index: no names": Case(index({"a": None, "b": {}}), many=True),
    "index: a list": index(["a"]),
    "index: a thousand files": Case(index({f"t{i}": f"m{i}.safetensors" for i in range(1000)}), many=True),
    "config: nested": raw(CONFIG, "[" * 100_000),
    "config: a list": raw(CONFIG, "[]"),
    "config: empty": raw(CONFIG, ""),
    "config: not UTF-8": raw(CONFIG, b"\xff\xfe\xff"),
    "config: too large": raw(CONFIG, lambda: '{"a": "' + "a" * 20_000_000 + '"}'),
    "config: a pipe": replaced(CONFIG, os.mkfifo),
    "config: a device": replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")),
    "config: other family": config(model_type=ESCAPES),
    "config: family of another type": config(model_type={"a": 1}),
    "config: huge vocabulary": Case(config(vocab_size=10_000_000), many=True),
    "config: everything huge": config(
        vocab_size=10**7, hidden_size=10**7, intermediate_size=10**7, num_hidden_layers=1000
    ),
    "config: too many layers": config(num_hidden_layers=10**9),
    "config: more layers": Case(config(num_hidden_layers=900), many=True),
    "config: a number of a thousand digits": raw(
        CONFIG, '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"
    ),
    "config: negative": Case(config(hidden_size=-4, vocab_size=-1), many=True),
    "config: nought": Case(config(hidden_size=0, num_attention_heads=0), many=True),
    "config: fractions": Case(config(hidden_size=16.5, vocab_size=1e3), many=True),
    "config: texts": Case(config(hidden_size="16", num_hidden_layers="1"), many=True),
    "config: truths": Case(config(hidden_size=True), many=True),
    "config: not a number": config(rms_norm_eps=float("nan")),
    "config: infinity": config(rope_theta=float("inf")),
    "config: rope of another type": config(rope_scaling=[1]),
    "config: rope that runs": config(rope_scaling={"rope_type": "__import__('os')"}),
    "config: activation that runs": config(hidden_act="os.system"),
    "config: packed weights": config(quantization_config={"quant_method": "os.system"}),
    "config: odd heads": Case(config(head_dim=7), many=True),
    "config: heads do not divide": Case(config(num_key_value_heads=3), many=True),
    **{f"weights: {name}": Case(raw(WEIGHTS, content), many=True) for name, content in HEADERS.items()},
}
TOKENIZERS: dict[str, Case | Callable[[Place], Path]] = {
    "tokenizer: empty": raw(TOKENIZER, ""),
    "tokenizer: no parts": raw(TOKENIZER, "{}"),
    "tokenizer: a list": raw(TOKENIZER, "[]"),
    "tokenizer: nested": raw(TOKENIZER, "[" * 100_000),
    "tokenizer: nested sequences": raw(TOKENIZER, nested(50_000)),
    "tokenizer: too large": raw(TOKENIZER, lambda: '{"model": "' + "a" * 70_000_000 + '"}'),
    "tokenizer: a pipe": replaced(TOKENIZER, os.mkfifo),
    "tokenizer: a device": replaced(TOKENIZER, lambda path: path.symlink_to("/dev/zero")),
    "tokenizer: no such model": tokenizer(in_model(type="Pickle")),
    "tokenizer: model is a list": tokenizer(put(model=[])),
    "tokenizer: vocabulary is a list": tokenizer(in_model(vocab=[1, 2])),
    "tokenizer: no vocabulary": Case(tokenizer(in_model(vocab={})), harmless=EVERYWHERE),
    "tokenizer: ids are texts": tokenizer(in_model(vocab={"a": "b"})),
    "tokenizer: negative ids": tokenizer(in_model(vocab={"a": -1})),
    "tokenizer: ids beyond 32 bits": tokenizer(in_model(vocab={"a": 2**40})),
    "tokenizer: ids beyond the model": tokenizer(far_ids),
    "tokenizer: merges of nothing": tokenizer(in_model(merges=[["zz", "yy"]])),
    "tokenizer: merges of another type": tokenizer(in_model(merges=[1])),
    "tokenizer: merges of three": tokenizer(in_model(merges=[["a", "b", "c"]])),
    "tokenizer: added tokens of another type": tokenizer(put(added_tokens=[1])),
    "tokenizer: added tokens without text": tokenizer(put(added_tokens=[{"id": 1}])),
    "tokenizer: a hundred thousand special tokens": tokenizer(
        put(added_tokens=[{"id": i, "content": f"<{i}>", "special": True} for i in range(100_000)])
    ),
    "tokenizer: replaces forever": tokenizer(replacing("b" * 1000, "c" * 1000, "d" * 1000)),
    "tokenizer: replaces one by much": tokenizer(replacing("b" * 1_000_000)),
    "tokenizer: doubles forever": tokenizer(replacing(*["a"] * 40, pattern="")),
    "tokenizer: maps one to much": tokenizer(put(normalizer=charsmap(b"a" * 100_000 + b"\0"))),
    "tokenizer: map of nothing": tokenizer(
        put(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    ),
    "tokenizer: decodes one to much": tokenizer(
        put(
            decoder={
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1_000_000}],
            }
        )
    ),
    "tokenizer: expression without end": Case(
        tokenizer(split_by("(a|a?)+(\\w+\\s?)+$!")), harmless=EVERYWHERE
    ),
    "tokenizer: expression in itself": tokenizer(split_by("(" * 10_000)),
    "tokenizer: not an expression": tokenizer(split_by("[")),
    "tokenizer: prefix of another type": tokenizer(
        put(pre_tokenizer={"type": "Metaspace", "replacement": 1})
    ),
    "tokenizer: post-processor of nothing": Case(
        tokenizer(put(post_processor={"type": "TemplateProcessing", "single": []})), harmless=EVERYWHERE
    ),
    "tokens: nested": raw(TOKENS, "[" * 100_000),
    "tokens: no object": raw(TOKENS, "1"),
    "tokens: no end token": tokens(eos_token=None),
    "tokens: an unknown end token": tokens(eos_token="<nothing>"),
    "tokens: end token of another type": tokens(eos_token=["</s>"]),
    "tokens: declared out of order": tokens(added_tokens_decoder={"x": {"content": "a"}}),
    "tokens: declared as numbers": tokens(added_tokens_decoder={"1": 2}),
    "tokens: template of another type": Case(tokens(chat_template={"a": 1}), harmless=EVERYWHERE),
    "tokens: templates without names": tokens(chat_template=[{"x": 1}]),
    "tokens: template that escapes": tokens(chat_template="{{ ''.__class__.__mro__ }}"),
    "tokens: template without end": tokens(
        chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "tokens: template of a device": Case(
        model(lambda folder: (folder / "chat_template.jinja").symlink_to("/dev/zero")), harmless=EVERYWHERE
    ),
    "stop ids: text": generation("</s>"),
    "stop ids: a fraction": generation(1.5),
    "stop ids: nested": generation([[1]]),
    "stop ids: negative": generation(-1),
    "stop ids: beyond the model": Case(generation(10**12), harmless=EVERYWHERE),
    "stop ids: a device": Case(
        replaced("generation_config.json", lambda path: path.symlink_to("/dev/zero")), harmless=EVERYWHERE
    ),
}
CASES = cases({**MODEL, **TOKENIZERS})

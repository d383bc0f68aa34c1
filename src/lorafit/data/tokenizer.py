"""A Hugging Face tokenizer in which control tokens come only from the template, never from content.

The tokenizer is loaded as a copy in which every special token has a private name with noncharacters. `protect`
replaces the control tokens of template text by the private names. Content is not changed, so `</s>` typed by a user
is plain text to the copy. A whole text is encoded in one call, so that normalisers, pre-tokenizers and merges work
exactly as in the original. `BORDER`, one more private token, cuts a text where inference does: the text before it is
encoded alone, the text after it as its continuation.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as RustTokenizer

from lorafit.data.token_length import TokenLength
from lorafit.data.tokenizer_files import (
    chat_template,
    generation_config,
    missing_hint,
    read_object,
    steps_of,
    token_text,
    tokenizer_config,
    with_tokens,
)
from lorafit.data.word_cache import Words, can_go_by_words
from lorafit.errors import ModelError

# Noncharacters that Unicode reserves for use inside a program; rows with one of them are refused.
_OPEN, _CLOSE, BORDER, HOLE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_RESERVED = re.compile("[\ufdd0-\ufdd4]")
_MAX_PROTECTED = 4096
MAX_SPECIALS = 20_000
MAX_GROWTH = 64  # times that normalizers or decoders may lengthen a text


@dataclass(frozen=True, slots=True)
class Control:
    """A control token: its public text and its id."""

    text: str
    id: int


def reserved(text: str) -> str:
    """The first character of `text` that is reserved for the private names, as `U+FDD0`; "" if none."""
    if text.isascii():
        return ""
    match = _RESERVED.search(text)
    return f"U+{ord(match.group()):04X}" if match else ""


class Tokenizer:
    """Text to ids and back for one Hugging Face model folder.

    Attributes: `bos` and `eos` (None where the model has none), `adds_bos` (whether texts start with BOS),
    `stop_ids` (the ids that end an answer according to the model), `named` (the texts of all tokens that the config
    names, by key), `control` (text to id of every special token but the unknown one), `unknown_id` (the token for
    characters outside of the vocabulary, if there is one), `vocab_size`, `chat_template` (Jinja source or None),
    `folder` (from which it was read), `sha256` (of the files that decide tokenisation), `trained` (tokens whose rows
    are trained: id to the ids of its pieces, none where the model has the token), `files` (saved beside the adapter).
    """

    def __init__(
        self,
        spec: dict[str, Any],
        *,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        chat_template: str | None,
        folder: Path,
        sha256: str,
    ) -> None:
        """`spec`, `config` and `generation` are the contents of tokenizer.json, tokenizer_config.json and
        generation_config.json; `spec` is changed in place."""
        names = {key: token_text(config.get(key)) for key in ("bos_token", "eos_token")}
        self.named = _named_tokens(config)
        specials = _specials(spec, config, [text for value in self.named.values() for text in _listed(value)])
        self._private = {text: f"{_OPEN}{index}{_CLOSE}" for index, text in enumerate(specials)}
        self._public = {private: text for text, private in self._private.items()}
        if len(specials) > MAX_SPECIALS:
            raise ModelError(f"it has more than {MAX_SPECIALS:,} special tokens", place="tokenizer.json")
        for part in ("normalizer", "decoder"):
            if _growth(spec.get(part)) > MAX_GROWTH:
                message = f"its {part} makes texts more than {MAX_GROWTH} times as long"
                raise ModelError(message, place="tokenizer.json")
        unknown = _unknown(spec["model"])
        adds_bos = config.get("add_bos_token")
        self.adds_bos = (
            _adds(spec.get("post_processor"), names["bos_token"]) if adds_bos is None else bool(adds_bos)
        )
        self._length = TokenLength(spec)
        _rename(spec, self._private)
        self._prefix = _take_prefix(spec, legacy=config.get("legacy") is not False)
        self._rust = RustTokenizer.from_str(json.dumps(spec))
        self._words = Words(self._encode_checked) if can_go_by_words(spec) else None
        self.vocab_size: int = self._rust.get_vocab_size(with_added_tokens=True)
        self._rust.add_special_tokens([BORDER])
        self._border_id = self._id(BORDER)

        self.control = {text: self._id(private) for text, private in self._private.items() if text != unknown}
        unknown_id = self._rust.token_to_id(self._private.get(unknown, unknown)) if unknown else None
        self.unknown_id: int | None = unknown_id
        self._control_ids = frozenset(self.control.values())
        self._protected: dict[str, str] = {}
        self._control_pattern = _either(self.control)
        self.bos = self._named(names["bos_token"])
        self.eos = self._named(names["eos_token"])
        self.adds_bos = self.adds_bos and self.bos is not None
        declared = generation.get("eos_token_id")
        also = declared if isinstance(declared, list) else [] if declared is None else [declared]
        if not all(isinstance(number, int) and number >= 0 for number in also):
            raise ModelError("`eos_token_id` is no token id", place="generation_config.json or config.json")
        self.stop_ids = tuple(dict.fromkeys([*([self.eos.id] if self.eos else []), *also]))
        self.chat_template = chat_template
        self.folder = folder
        self.sha256 = sha256
        self.trained: dict[int, tuple[int, ...]] = {}
        self.files: dict[str, bytes] = {}

    @classmethod
    def from_folder(cls, path: Path, beside: Path | None = None, tokens: Sequence[str] = ()) -> Tokenizer:
        """The tokenizer of the model in folder `path`; ModelError says which file is missing or unusable.

        `beside` is the folder of an adapter, whose own tokenizer and chat template go before those of the model.
        `tokens` are those whose rows are trained; those that the model does not have are added.
        """
        model = path
        path = beside if beside is not None and (beside / "tokenizer.json").is_file() else model
        if not (path / "tokenizer.json").is_file():
            raise ModelError("tokenizer.json is missing", place=str(path), hint=missing_hint(path))
        files: dict[str, bytes] = {}
        plain = cls.from_folder(path) if tokens else None
        spec = read_object(path / "tokenizer.json")
        config, deciding = tokenizer_config(path)
        if tokens:
            files, ids, new = with_tokens(path, tokens)
            spec, config = (json.loads(content) for content in files.values())
        digest = hashlib.sha256()
        for name in deciding:
            if name in files or (not files and (path / name).is_file()):
                content = files.get(name) or (path / name).read_bytes()
                digest.update(f"{name} {len(content)}\n".encode() + content)
        try:
            tokenizer = cls(
                spec,
                config=config,
                generation=generation_config(model),
                chat_template=next(filter(None, map(chat_template, filter(None, (beside, model)))), None),
                folder=path,
                sha256=digest.hexdigest(),
            )
            if plain is not None:
                tokenizer.files = files
                tokenizer.trained = {
                    number: tuple(piece for piece in plain.encode(text) if piece != plain.unknown_id)
                    if text in new
                    else ()
                    for text, number in ids.items()
                }
            return tokenizer
        except ModelError:
            raise
        except BaseException as error:  # the Rust library raises plain Exception, or panics
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            hint = "download the model again, or save it with transformers' save_pretrained"
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(
                f"cannot be used: {what}", place=str(path / "tokenizer.json"), hint=hint
            ) from error

    def protect(self, template_text: str) -> str:
        """`template_text` with its control tokens under their private names. Not for content."""
        known = self._protected.get(template_text)
        if known is None:
            known = self._control_pattern.sub(lambda match: self._private[match.group()], template_text)
            if len(self._protected) < _MAX_PROTECTED:  # templates repeat the same few texts in every row
                self._protected[template_text] = known
        return known

    def guard(self, content: str) -> str:
        """`content` with a GUARD in each text of a control token, so that `protect` does not take it for one."""
        return self._control_pattern.sub(lambda match: f"{match[0][0]}{GUARD}{match[0][1:]}", content)

    def public(self, text: str) -> str:
        """A protected text with the public names of its control tokens."""
        if BORDER in text:
            text = text.replace(BORDER, "")
        if _OPEN not in text:
            return text
        return re.sub(f"{_OPEN}\\d+{_CLOSE}", lambda match: self._public[match.group()], text)

    def cut(self, protected: str) -> Iterator[tuple[str, bool]]:
        """A protected text in public pieces, each with whether it is a control token, without empty ones."""
        for part in re.split(f"({_OPEN}\\d+{_CLOSE})", protected.replace(BORDER, "")):
            if part:
                yield self.public(part), part[0] == _OPEN

    def leading_control(self, protected: str) -> Control | None:
        """The control token at the start of a protected text, after blanks, if there is one."""
        match = re.match(f"\\s*({_OPEN}\\d+{_CLOSE})", protected)
        return self._named(self._public[match[1]]) if match else None

    def encode(self, content: str) -> list[int]:
        """The ids of plain content, without BOS and without any control token."""
        return next(self.encode_batch([content]))[0]

    def fewest_tokens(self, content: str) -> int:
        """A number of tokens that plain content has at least, without encoding it."""
        return self._length.fewest(content)

    def encode_batch(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
        """For each text (protected template text and plain content): its ids, and the positions in the ids of
        its BORDERs, which are not ids themselves. No BOS or EOS is added.
        """
        inputs = [self._prefix.add(text) for text in texts] if self._prefix else list(texts)
        encoded = self._words.encode_batch(inputs) if self._words else self._encode_checked(inputs)
        for text, ids in zip(texts, encoded, strict=True):
            borders: list[int] = []
            for _ in range(text.count(BORDER)):
                borders.append(ids.index(self._border_id, borders[-1] if borders else 0))
                del ids[borders[-1]]
            yield ids, borders

    def _encode_checked(self, inputs: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text with its BORDERs; ModelError if the control tokens are not those of the text."""
        try:
            encodings = self._rust.encode_batch_fast(inputs, add_special_tokens=False)
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise ModelError(f"the tokenizer fails: {error}", place="tokenizer.json") from error
        for text, encoding in zip(inputs, encodings, strict=True):
            ids: list[int] = encoding.ids
            if sum(map(self._control_ids.__contains__, ids)) != text.count(_OPEN):
                raise ModelError("the tokenizer does not read the template's control tokens one by one")
            yield ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; control tokens by their public text, or left out."""
        text: str = self._rust.decode(list(ids), skip_special_tokens=skip_special)
        return self.public(text)

    def decode_batch(self, texts: Sequence[list[int]]) -> list[str]:
        """The text of each list of ids, on all cores."""
        return [self.public(text) for text in self._rust.decode_batch(texts, skip_special_tokens=False)]

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for the ids of one answer, one by one."""
        return StreamDecoder(self)

    @property
    def blank(self) -> Literal["none", "first", "each"]:
        """Where a blank is added: nowhere, before the start of a text, or after control tokens too."""
        if self._prefix is None:
            return "none"
        return "first" if self._prefix.first_only else "each"

    def _id(self, token: str) -> int:
        number = self._rust.token_to_id(token)
        assert number is not None
        return int(number)

    def _named(self, text: str | None) -> Control | None:
        return Control(text, self.control[text]) if text in self.control and text is not None else None


class StreamDecoder:
    """Turns ids into text piece by piece. A character of several ids is returned when it is complete.

    The text of control tokens is "", or with `skip_special=False` their public text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._ids: list[int] = []  # the previous piece and the new ids: decoding depends on neighbours
        self._num_shown = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often "" in the middle of a character."""
        self._ids.append(token_id)
        return self._piece(final=False)

    def finish(self) -> str:
        """The rest at the end, such as half a character."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        shown = self._tokenizer.decode(self._ids[: self._num_shown], skip_special=self._skip)
        text = self._tokenizer.decode(self._ids, skip_special=self._skip)
        if len(text) <= len(shown) or (text.endswith("\ufffd") and not final):
            return ""
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        return text[len(shown) :]


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The blank that SentencePiece-like tokenizers add before a text. We add it, because none may follow a BORDER.

    `first_only`: only before the start of the text, else after control tokens too; `unless`: no blank is added before
    one of these characters.
    """

    text: str
    first_only: bool
    unless: str

    def add(self, text: str) -> str:
        if BORDER not in text and _OPEN not in text:  # the frequent case
            return self.text + text if text and text[0] not in self.unless else text
        place = "^" if self.first_only else f"(?:^|(?<={_CLOSE}))"
        return re.sub(
            f"{place}({BORDER}*)(?=[^{BORDER}{_OPEN}{re.escape(self.unless)}])", rf"\1{self.text}", text
        )


def _take_prefix(spec: dict[str, Any], legacy: bool) -> _Prefix | None:
    """Remove from `spec` every step that adds a blank before texts, and return the same rule."""
    for step in steps_of(spec.get("pre_tokenizer")):
        if step["type"] == "Metaspace":
            default = "always" if step.pop("add_prefix_space", True) else "never"
            scheme, step["prepend_scheme"] = step.get("prepend_scheme", default), "never"
            blank = step["replacement"]
            return None if scheme == "never" else _Prefix(blank, scheme == "first", f" {blank}")
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            step["add_prefix_space"] = False
            return _Prefix(" ", False, " ")
    for step in steps_of(spec.get("normalizer")):
        if step["type"] == "Prepend":
            # Without "legacy", transformers prepends to the start of a text only, whatever the file says.
            step.update(type="Replace", pattern={"String": step["prepend"]}, content=step["prepend"])
            return _Prefix(step.pop("prepend"), not legacy, "")
    return None


def _growth(part: dict[str, Any] | None) -> int:
    """The factor by which the steps of a normalizer or decoder can lengthen a text."""
    growth = 1
    for step in steps_of(part):
        if step["type"] == "Replace":
            always_takes_some = bool(step["pattern"].get("String"))
            growth *= max(1, len(step["content"]) + (not always_takes_some))
        elif step["type"] == "Precompiled":
            chars = base64.b64decode(step["precompiled_charsmap"])
            texts = chars[4 + int.from_bytes(chars[:4], "little") :]  # after a trie that points to them
            growth *= max(1, *map(len, texts.split(b"\0")))
    return growth


def _adds(post_processor: dict[str, Any] | None, bos: str | None) -> bool:
    """Whether the post-processor starts texts with `bos`."""
    for step in steps_of(post_processor):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return bool(step["single"][0]["SpecialToken"]["id"] == bos)
    return False


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The texts of the tokens that the config names, as transformers gives them to a chat template."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), dict):
            named |= config[key]
    found: dict[str, str | list[str]] = {}
    for key, value in named.items():
        if text := token_text(value):
            found[key] = text
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), list):
            found[key] = [text for text in map(token_text, config[key]) if text]
    return found


def _specials(spec: dict[str, Any], config: Mapping[str, Any], named: Sequence[str]) -> list[str]:
    """The texts of all special tokens; those that only the config declares are added to `spec`."""
    vocab = spec["model"]["vocab"]
    known = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    added = {token["content"]: token for token in spec["added_tokens"]}
    declared = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    for number, token in declared:
        added.setdefault(token["content"], {**token, "id": int(number)})
    for text in named:
        if text in known:
            added.setdefault(text, {"content": text, "id": known[text]})
        if text in added:
            added[text]["special"] = True
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"] = [{**defaults, **token} for token in added.values()]
    return [token["content"] for token in spec["added_tokens"] if token["special"]]


def _unknown(model: Mapping[str, Any]) -> str | None:
    """The token for characters that the model does not know; it alone may come from content."""
    if isinstance(model.get("unk_id"), int):
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _rename(spec: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give the special tokens of `spec` their private names, and remove the steps that add or cut tokens."""
    model = spec["model"]
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        # No merge may make a control token out of letters.
        model["merges"] = [
            [a, b] for a, b in pairs if a not in names and b not in names and a + b not in names
        ]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    spec.update(post_processor=None, truncation=None, padding=None)


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked; that exception derives from BaseException."""
    return type(error).__name__ == "PanicException"


def _either(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")

"""The files of a tokenizer in a model folder, joined as transformers joins them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.hub.folder_keys import GENERATION, TOKENIZER, refused
from lorafit.storage.safe_read import MB, read_json, read_text

FILES = ("tokenizer.json", "tokenizer_config.json")  # of an adapter with new tokens
_DECIDING_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_ADDED = "added_tokens.json"
MAX_JSON = 64 * MB


def token_text(value: object) -> str | None:
    """The text of a token in a config: text, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where the file does not exist. Raises ModelError."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path, MAX_JSON)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", place=str(path)) from error
    except ValueError as error:
        raise ModelError(f"is not JSON: {error}", place=str(path), hint="download the model again") from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", place=str(path), hint="download the model again")
    return value


def tokenizer_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of tokenizer_config.json with those of older files, as transformers joins them, and the names of the
    files that decide tokenisation.
    """
    config, named = read_object(path / "tokenizer_config.json"), read_object(path / "special_tokens_map.json")
    if "added_tokens_decoder" in config:
        config, deciding = {**named, **config}, [*_DECIDING_FILES]
    else:
        config, deciding = {**config, **named}, [*_DECIDING_FILES]
        if added := read_object(path / _ADDED):
            specials = {token_text(value) for key, value in config.items() if key.endswith("_token")}
            config["added_tokens_decoder"] = {
                str(number): {
                    "content": text,
                    "special": text in specials,
                    "normalized": text not in specials,
                }
                for text, number in added.items()
            }
            deciding.append(_ADDED)
    if problems := refused(config, TOKENIZER, str(path / "tokenizer_config.json")):
        raise ModelError.of(problems)
    return config, deciding


def with_tokens(path: Path, texts: Sequence[str]) -> tuple[dict[str, bytes], dict[str, int], set[str]]:
    """tokenizer.json and tokenizer_config.json of a folder with the tokens `texts`, the id of each, and which are new.

    A new token is found in contents too, unlike a control token. A token that is there stays as it is.
    """
    spec, (config, _) = read_object(path / "tokenizer.json"), tokenizer_config(path)
    vocab, declared = spec["model"]["vocab"], config.get("added_tokens_decoder")
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: at for at, entry in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids |= {token["content"]: int(number) for number, token in (declared or {}).items()}
    new = {text for text in texts if text not in ids}
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for number, text in enumerate((text for text in texts if text in new), max(ids.values()) + 1):
        ids[text] = number
        spec["added_tokens"].append({"id": number, "content": text, **defaults})
        if declared is not None:
            declared[str(number)] = {"content": text, **defaults}
    if (template := chat_template(path)) is not None:
        config["chat_template"] = template
    files = {"tokenizer.json": spec, "tokenizer_config.json": config}
    return (
        {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in files.items()},
        {text: ids[text] for text in texts},
        new,
    )


def generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json with the stop tokens of config.json where it names none, as transformers reads them."""
    generation = read_object(path / "generation_config.json")
    if problems := refused(generation, GENERATION, str(path / "generation_config.json")):
        raise ModelError.of(problems)
    if generation.get("eos_token_id") is None:
        generation["eos_token_id"] = read_object(path / "config.json").get("eos_token_id")
    return generation


def chat_template(path: Path) -> str | None:
    """The chat template in a folder: its own file, else the one in the config; of several, the default."""
    config = read_object(path / "tokenizer_config.json")
    if (path / "chat_template.jinja").is_file():
        return read_text(path / "chat_template.jinja", MB)
    template = read_object(path / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) and template else None


def missing_hint(path: Path) -> str:
    """What to do where a folder has no tokenizer.json."""
    if not path.is_dir():
        return "no such folder: check the path of the model"
    slow = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (path / name).is_file()]
    if slow:
        return (
            f"the folder has only {slow[0]}; convert it once with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return "download the model again with all its tokenizer files"


def steps_of(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or post-processor as its plain steps."""
    if part is None:
        return
    lists = ("normalizers", "pretokenizers", "processors", "decoders")
    nested = next((part[name] for name in lists if part.get(name)), None)
    if nested is None:
        yield part
    for step in nested or []:
        yield from steps_of(step)

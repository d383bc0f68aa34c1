"""Every key that the installed transformers and peft know is used, without effect here, or refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import config_of, write_model

from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError
from lorafit.hub import folder_keys
from lorafit.hub.folder_keys import ADAPTER, CONFIG, GENERATION, ROPE, TOKENIZER, Rule, refused
from lorafit.model.architecture import parse_architecture
from lorafit.model.families import FAMILIES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# Names of classes and of methods' arguments, which no config file has.
_NOT_IN_FILES = {"self", "args", "kwargs"}


def config_keys() -> set[str]:
    keys: set[str] = set()
    for model_type in FAMILIES:
        config = transformers.AutoConfig.for_model(model_type)
        keys |= {*config.to_dict(), *inspect.signature(type(config).__init__).parameters}
        keys |= {*inspect.signature(transformers.PreTrainedConfig.__init__).parameters}
    return keys - _NOT_IN_FILES


def rope_keys() -> set[str]:
    from transformers.modeling_rope_utils import RopeParameters

    return set(RopeParameters.__annotations__)


def tokenizer_keys() -> set[str]:
    """The arguments of the tokenizers' classes, and what they take out of others."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    keys = {*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}
    for kind in (
        PreTrainedTokenizerBase,
        TokenizersBackend,
        transformers.LlamaTokenizer,
        transformers.Qwen2Tokenizer,
    ):
        keys |= {*inspect.signature(kind.__init__).parameters}
        source = inspect.getsource(kind.__init__)
        keys |= set(re.findall(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"', source))
    return keys - _NOT_IN_FILES


KNOWN: dict[str, tuple[dict[str, Rule], set[str]]] = {
    "adapter": (ADAPTER, {field.name for field in dataclasses.fields(peft.LoraConfig)}),
    "config": (CONFIG, config_keys()),
    "rope": (ROPE, rope_keys()),
    "generation": (GENERATION, {*transformers.GenerationConfig().to_dict()}),
    "tokenizer": (TOKENIZER, tokenizer_keys()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_each_key_of_this_version_has_a_rule(name: str) -> None:
    rules, keys = KNOWN[name]
    assert len(keys) > 10
    assert keys - rules.keys() == set(), "a new key: is it used, without effect, or to be refused?"


def test_a_new_field_of_a_new_version_is_found() -> None:
    assert {"r", "new_field"} - ADAPTER.keys() == {"new_field"}


@pytest.mark.parametrize("name", KNOWN)
def test_each_harmless_default_is_accepted_and_every_other_value_refused(name: str) -> None:
    for key, rule in KNOWN[name][0].items():
        if isinstance(rule, tuple):
            assert all(not refused({key: value}, {key: rule}, "") for value in rule)
            assert len(refused({key: "something"}, {key: rule}, "file")) == 1


def test_defaults_of_both_libraries_are_accepted() -> None:
    raw = json.loads(json.dumps(peft.LoraConfig(target_modules=["q_proj"]).to_dict(), default=list))
    assert not refused(raw, ADAPTER, "")
    assert not refused(transformers.GenerationConfig().to_dict(), GENERATION, "")
    for model_type in FAMILIES:
        assert not refused(transformers.AutoConfig.for_model(model_type).to_dict(), CONFIG, "")


@pytest.mark.parametrize("key", [key for key, rule in CONFIG.items() if isinstance(rule, tuple)])
def test_a_network_with_such_a_key_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=f"`{key}` is 'x'"):
        parse_architecture({**config_of("llama"), key: "x"}, "config.json")


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "split_special_tokens", True),
        ("tokenizer_config.json", "do_lower_case", True),
        ("generation_config.json", "suppress_tokens", [5]),
        ("generation_config.json", "stop_strings", ["###"]),
        ("generation_config.json", "forced_eos_token_id", 2),
    ],
)
def test_a_tokenizer_with_such_a_key_is_refused(file: str, key: str, value: Any, tmp_path: Path) -> None:
    path = write_model(tmp_path) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError, match=f"`{key}` is"):
        Tokenizer.from_folder(tmp_path)


def test_a_key_that_nobody_knows_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    folder_keys._name.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not refused({"strange": 3, "empty": None, "image_token": "<i>"}, CONFIG, "a/config.json")
    assert [record.getMessage() for record in caplog.records] == [
        "note: keys that lorafit does not know are not used: strange (a/config.json)"
    ]

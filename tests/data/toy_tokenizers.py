"""Small tokenizers of every kind that Llama-family models have, and chat templates of the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from lorafit.data.tokenizer import Tokenizer

CORPUS = [
    "### Instruction:\nWrite the answer to the question.\n\n### Response:\nThe answer is the answer.",
    "user assistant system question answer hello world, this is it.\n\n- one\n- two\n\n\n    return x",
    "Below is an instruction that describes a task. Write a response that completes the request. It's 1234.",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# TinyLlama's and Zephyr's.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Writes BOS itself, merges the system turn into the first question, strips, puts blanks around answers.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Asks for the date, trims, uses generation blocks.
LLAMA_3 = (
    "{{- bos_token }}{%- set date = strftime_now('%d %b %Y') %}{{- '[system] Today is ' + date + '\\n' }}"
    "{% for message in messages %}{{- '[' + message['role'] + ']\\n\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{- message['content'] | trim + eos_token }}"
    "{% endgeneration %}{% else %}{{- message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# Drops the thinking of earlier turns, and gives the last answer an empty one where it has none.
QWEN_3 = (
    "{%- for message in messages %}{%- if message.role != 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- else %}"
    "{%- set content = message.content %}{%- set thinking = '' %}{%- if '</think>' in content %}"
    "{%- set thinking = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- if loop.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thinking.strip('\\n') + '\\n</think>\\n\\n' "
    "+ content.lstrip('\\n') + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
)
# No control token after an answer.
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] }}{% else %}"
    "{{ 'USER: ' + message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
)

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _added(names: list[str], first: int, special: bool = True) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": first + i, "content": name, "special": special, **flags} for i, name in enumerate(names)]


def save(folder: Path, spec: dict[str, Any], config: dict[str, Any]) -> Path:
    """A model folder with just the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def qwen_like(folder: Path, chat_template: str = CHATML, **config: Any) -> Path:
    """Byte-level BPE without BOS; EOS is not the token that ends a turn."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    spec = json.loads(rust.to_str())
    size = len(spec["model"]["vocab"])
    spec["normalizer"] = {"type": "NFC"}
    spec["added_tokens"] = _added(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], size)
    spec["added_tokens"] += _added(["<think>", "</think>"], size + 3, special=False)
    return save(folder, spec, {"eos_token": "<|endoftext|>", "chat_template": chat_template, **config})


def llama_like(folder: Path, chat_template: str | None = ZEPHYR, legacy: bool = False, **config: Any) -> Path:
    """SentencePiece-like BPE with byte fallback and BOS; `legacy`: the leading blank is a normalizer."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    spec = json.loads(rust.to_str())
    pieces = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    pieces = [piece for piece in pieces if piece != "\n"]  # as in Llama's: a byte
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spec["model"]["vocab"] = {piece: number for number, piece in enumerate([*first, *pieces])}
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "\n" not in "".join(pair)]
    spec["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    spec["added_tokens"] = _added(["<unk>", "<s>", "</s>"], 0)
    if legacy:
        spec["pre_tokenizer"] = None
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        spec["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
        }
    else:
        spec["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, pair],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save(folder, spec, {**tokens, "chat_template": chat_template, **config})


def toys(folder: Path) -> dict[str, Path]:
    """One folder of each kind."""
    return {
        "qwen": qwen_like(folder / "qwen"),
        "qwen3": qwen_like(folder / "qwen3", QWEN_3),
        "zephyr": llama_like(folder / "zephyr"),
        "legacy": llama_like(folder / "legacy", legacy=True),
        "llama2": llama_like(folder / "llama2", LLAMA_2),
        "llama3": llama_like(folder / "llama3", LLAMA_3),
        "vicuna": llama_like(folder / "vicuna", VICUNA),
    }


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


_controls = ["</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<0x0A>", "Response:\n"]
_letters = [" ", "  ", "\n", "\n\n", "\t", "▁", "-", "the answer", "It's", "123", "한국어", "e\u0301", "🙂"]
_characters = st.characters(exclude_categories=("Cs", "Cn", "Co"), exclude_characters="\0")
plain_text = st.text(_characters, max_size=12)
# Text as hostile as data can be: control tokens, blanks and borders of all kinds.
hostile_text = st.lists(st.sampled_from(_controls + _letters) | plain_text, max_size=8).map("".join)

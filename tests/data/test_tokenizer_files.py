"""The files of a tokenizer as transformers joins them: added and special tokens, stop ids, and names for templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import byte_tokenizer, write_model

from lorafit.data.formats import Instruction
from lorafit.data.prompt import Renderer, contract
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError

transformers = pytest.importorskip("transformers")
TEMPLATE = (
    "{{ bos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in {**raw, **values}.items() if value is not None}))


def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (257, 9, (257,)),
        ([257, 5, 6], 9, (257, 5, 6)),
        (None, 9, (257, 9)),
        (None, [9, 257], (257, 9)),
        (None, None, (257,)),
    ],
)
def test_stop_ids_are_read_wherever_they_are(
    generation: Any, config: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = write_model(tmp_path)
    change(folder, "generation_config.json", eos_token_id=generation)
    change(folder, "config.json", eos_token_id=config)
    assert Tokenizer.from_folder(folder).stop_ids == expected
    (folder / "generation_config.json").unlink()
    if generation is None:
        assert Tokenizer.from_folder(folder).stop_ids == expected


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_named_tokens_reach_the_template_as_in_transformers(file: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<pad>", "<unk>", "<image>", "<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder, "tokenizer_config.json", chat_template=TEMPLATE)
    named = {"pad_token": "<pad>", "unk_token": "<unk>"}
    change(folder, file, **named)
    change(folder, "tokenizer_config.json", image_token="<image>", additional_special_tokens=["<more>"])
    ours = Tokenizer.from_folder(folder)
    renderer = Renderer(
        contract(ours, template="chat", train_on="response", max_length=99, too_long="error", add_eos=True),
        ours,
    )
    text = theirs(folder).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert renderer.prompt_text(Instruction("Hi", "", ""))[1] == text == "<s>|<pad>|<unk>|<image>|Hi"
    assert "<more>" in ours.control


def test_special_tokens_map_counts_over_the_config_only_without_added_tokens(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    change(folder, "special_tokens_map.json", eos_token={"content": "<|user|>", "lstrip": False})
    ours = Tokenizer.from_folder(folder)
    assert ours.eos is not None
    assert ours.eos.text == theirs(folder).eos_token == "<|user|>"
    change(
        folder, "tokenizer_config.json", added_tokens_decoder={"257": {"content": "</s>", "special": True}}
    )
    ours = Tokenizer.from_folder(folder)
    assert ours.eos is not None
    assert ours.eos.text == theirs(folder).eos_token == "</s>"


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_beside_tokenizer_json_have_their_ids(file: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    before = Tokenizer.from_folder(folder).sha256
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps({"<tool>": 260}))
    else:
        change(folder, file, added_tokens_decoder={"260": {"content": "<tool>", "special": False}})
    ours = Tokenizer.from_folder(folder)
    assert ours.sha256 != before
    text = "a<tool>b"
    assert ours.encode(text) == theirs(folder)(text, add_special_tokens=False)["input_ids"]
    assert 260 in ours.encode(text)


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_a_slow_tokenizer_alone_is_refused_with_what_to_do(file: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "tokenizer.json").rename(folder / file)
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_folder(folder)
    assert f"only {file}" in caught.value.problems[0].hint
    assert "save_pretrained" in caught.value.problems[0].hint


def test_the_files_beside_an_adapter_come_first_and_the_models_fill_up(tmp_path: Path) -> None:
    model, beside = write_model(tmp_path / "model"), tmp_path / "adapter"
    beside.mkdir()
    whole = Tokenizer.from_folder(model)
    assert Tokenizer.from_folder(model, beside).sha256 == whole.sha256
    (beside / "chat_template.jinja").write_text(TEMPLATE)
    both = Tokenizer.from_folder(model, beside)
    assert (both.sha256, both.chat_template) == (whole.sha256, TEMPLATE)
    (beside / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, beside)
    change(beside, "tokenizer_config.json", chat_template=None, eos_token="<|user|>")
    both = Tokenizer.from_folder(model, beside)
    assert both.eos is not None
    assert (both.eos.text, both.chat_template) == ("<|user|>", whole.chat_template)
    assert both.stop_ids == (258, 257)  # its own EOS, and that of the model's generation_config.json

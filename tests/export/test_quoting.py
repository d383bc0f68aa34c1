"""Foreign names and texts in what an export holds: the model card, its commands and code, the Modelfile, GGUF."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.hostile.foreign import (
    NASTY,
    blocks_of,
    code_of,
    is_one_line,
    modelfile_of,
    steering,
)

from lorafit.data.formats import Message
from lorafit.errors import ModelError
from lorafit.export.merge import write_json
from lorafit.export.ollama import quoted, render_go, to_go_template
from lorafit.export.quoting import code, fenced, yaml_text
from lorafit.redact import json_line, line, visible
from lorafit.storage.safe_read import read_json

texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=5), max_size=4).map("".join)


@given(texts)
def test_a_code_span_and_a_block_hold_the_text_and_nothing_else(text: str) -> None:
    spans = code_of(f"before {code(text)} after")
    shown = line(text) or " "
    assert [span.strip() for span in spans] == [shown.strip()]
    assert is_one_line(code(text))
    blocks = code_of(f"{fenced(text, 'text')}\n\n# after\n")
    assert [block.rstrip("\n") for block in blocks] == [visible(text).rstrip("\n")]
    cell = code(text).replace("\\|", "\\ |").replace("|", "\\|")
    assert (
        len(
            [
                kind
                for kind, _ in blocks_of(f"| a | b |\n| --- | --- |\n| x | {cell} |\n")
                if kind == "td_open"
            ]
        )
        == 2
    )


@given(texts.filter(lambda text: not re.search("[\ud800-\udfff]", text)))
def test_yaml_is_the_value_and_steers_nothing(text: str) -> None:
    value = {"base_model": text, "nested": {"a": [text, 1]}}
    written = yaml_text(value)
    assert yaml.safe_load(written) == value
    assert steering(written) == []
    assert not re.search(r"^(---|\.\.\.)", written, re.MULTILINE)


@given(texts.filter(lambda text: not re.search("[\ud800-\udfff]", text)))
def test_json_is_a_literal_of_python(text: str) -> None:
    assert ast.literal_eval(json_line(text)) == text


@given(texts)
def test_a_value_of_a_modelfile_is_the_text(text: str) -> None:
    try:
        written = f"FROM ./x\nPARAMETER stop {quoted(text)}\nSYSTEM {quoted(text)}\n"
    except ModelError:
        assert '"""' in text or text.endswith('"')
        return
    assert modelfile_of(written) == [("FROM", "./x"), ("PARAMETER stop", text), ("SYSTEM", text)]


@given(texts | st.text('{}"\n a', max_size=12))
def test_a_template_of_go_renders_the_text(text: str) -> None:
    escaped = to_go_template(text)
    template = f"{escaped}{{{{ .System }}}}{escaped}{{{{ .System }}}}"
    assert render_go(template, [Message("system", "be")]) == f"{text}be{text}be"
    assert '"""' not in escaped
    rest = re.sub(r'\{\{ ("(?:\\.|[^"\\])*"|\.System) \}\}', "", template)  # Go reads from left to right
    assert "{{" not in rest
    assert modelfile_of(f'TEMPLATE """{template}"""\n') == [("TEMPLATE", template)]


def test_texts_in_json_files_of_an_export_come_back(tmp_path: Path) -> None:
    for text in NASTY:
        write_json(tmp_path / "config.json", {"_name_or_path": text, text: 1})
        assert read_json(tmp_path / "config.json", 1 << 20) == {"_name_or_path": text, text: 1}

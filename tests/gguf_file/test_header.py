"""The header of a GGUF file that somebody damaged or made to harm is refused with one error, at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hostile.gguf_files import HOSTILE
from tests.tiny_gguf import write_gguf_model

from lorafit.errors import LorafitError, ModelError
from lorafit.gguf_file.header import is_gguf, read_header
from lorafit.hub.client import model_folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    content, said = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said) as caught:
        model_folder(str(path))
    assert len(caught.value.problems) == 1


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf_model(tmp_path_factory.mktemp("good") / "model.gguf").read_bytes()


@settings(max_examples=30)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(
    data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cut anywhere, or with other bytes in its header: there is a folder, or one error of lorafit."""
    content = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(content)
    try:
        assert (model_folder(str(path)).path / "config.json").is_file()
    except LorafitError as error:
        assert len(error.problems) == 1


def test_a_file_is_known_by_its_name_or_its_first_bytes(tmp_path: Path) -> None:
    named, other, folder = tmp_path / "a.gguf", tmp_path / "blob", tmp_path / "folder.gguf"
    named.write_bytes(b"?")
    other.write_bytes(b"GGUF....")
    folder.mkdir()
    assert [is_gguf(path) for path in (named, other, folder, tmp_path / "none")] == [True, True, False, False]
    assert not is_gguf(Path("x" * 5000))


def test_a_whole_header_is_read(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(good)
    read = read_header(tmp_path / "model.gguf")
    assert read.architecture == "llama"
    assert read.tensors["token_embd.weight"].shape == (260, 32)
    assert read.metadata["llama.block_count"] == 2

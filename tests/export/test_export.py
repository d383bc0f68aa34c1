"""`lorafit export` as people meet it: where it writes, what it says, and that it writes all or nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from tests.command import Cli
from tests.export.made import read_back_here

from lorafit.errors import ConfigError, RunError
from lorafit.export import readback
from lorafit.export import run as export_module
from lorafit.export.run import export_run
from lorafit.infer.model import load
from lorafit.storage.atomic import read_facts, verify_folder
from lorafit.verify import reload


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Path:
    return finished_run


@pytest.fixture
def cli(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line; what it exports is read back in this process."""
    read_back_here(monkeypatch)
    return cli


def test_it_says_what_was_verified_and_gives_the_folder(finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    code, out, err = cli("export", run, "merged", "--offline")
    assert code == 0, err
    assert out == f"{run / 'exports' / 'merged-f32'}\n"
    assert "verified by transformers" in err
    assert "greedy answers equal; loss" in err
    assert "held-out rows" in err


def test_json_has_path_files_and_parity(run: Path, tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli("export", run, "gguf", "--type", "f16", "--output", tmp_path / "out", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["path"], told["kind"], told["type"]) == (str(tmp_path / "out"), "gguf", "f16")
    assert told["files"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(told["files"]) == {"run-f16.gguf", "README.md", "prompt.json", "parity.json", "manifest.json"}
    assert told["parity"] == json.loads((tmp_path / "out" / "parity.json").read_text())
    assert verify_folder(tmp_path / "out") == []
    assert read_facts(tmp_path / "out")["export"] == "gguf"


def test_leaving_the_comparison_out_is_said_and_recorded(run: Path, tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli("export", run, "adapter", "--output", tmp_path / "out", "--no-verify", "--json")
    assert code == 0
    assert "warning: not verified: --no-verify" in err
    assert json.loads(out)["parity"] == {"verified": False, "why": "--no-verify"}
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["verified"] is False
    assert "Not verified: --no-verify." in (tmp_path / "out" / "README.md").read_text()


def test_a_program_that_is_missing_is_named_with_its_pip_line(
    run: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readback, "find_spec", lambda module: None)
    code, _, err = cli("export", run, "adapter", "--output", tmp_path / "out")
    assert code == 0
    line = "not verified: transformers and peft not installed (pip install 'lorafit[verify]')"
    assert line in err
    assert line.partition(": ")[2] in json.loads((tmp_path / "out" / "parity.json").read_text())["why"]


def test_without_the_package_gguf_its_pip_line_is_said(
    run: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = cli("export", run, "gguf", "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "pip install 'lorafit[gguf]'" in err
    assert not (tmp_path / "out").exists()


def test_types_are_the_kind_s_own(run: Path, cli: Cli) -> None:
    code, _, err = cli("export", run, "merged", "--type", "q8_0")
    assert code == 2
    assert "one of auto, f32, bf16, f16" in err
    with pytest.raises(ConfigError, match="no export `onnx`"):
        export_run(run, "onnx")


def test_an_earlier_export_is_replaced_and_anything_else_is_not(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_run(run, "adapter", output=folder, verify=False)
    export_run(run, "merged", output=folder, verify=False, type_name="bf16")
    assert read_facts(folder)["export"] == "merged"
    assert not (folder / "adapter_config.json").exists()
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty, and no export"):
        export_run(run, "adapter", output=other, verify=False)
    assert (other / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RunError, match="is not empty, and no export"):
        export_run(run, "adapter", output=run, verify=False)


@pytest.mark.parametrize("kind", ["merged", "gguf", "gguf-lora", "ollama", "adapter"])
def test_a_full_disk_leaves_what_was_there(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    export_run(run, "adapter", output=folder, verify=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "card", full)  # the last file of all
    with pytest.raises(RunError, match="No space left on device") as caught:
        export_run(run, kind, output=folder, verify=False)
    assert "the run itself is unchanged" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_program_that_dies_is_told_with_its_last_words(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process that is given a file it cannot read."""
    from lorafit.export import gguf_model

    right = gguf_model.write_gguf

    def wrong(source: object, path: Path, *rest: object) -> None:
        right(source, path, *rest)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[:-5000])

    monkeypatch.setattr(gguf_model, "write_gguf", wrong)
    with pytest.raises(RunError, match="cannot be read back"):
        export_run(run, "gguf", output=tmp_path / "out", offline=True)
    assert list(tmp_path.iterdir()) == []


def test_the_child_is_given_no_token(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    real = reload.subprocess.Popen

    def spy(*words: object, env: dict[str, str], **rest: object) -> object:
        seen.update(env)
        return real(*words, env=env, **rest)  # type: ignore[call-overload]

    monkeypatch.setattr(reload.subprocess, "Popen", spy)
    monkeypatch.setenv("HF_TOKEN", "hf_canary1234567890")
    export_run(run, "gguf-lora", output=tmp_path / "out", offline=True)
    assert "HF_TOKEN" not in seen
    assert seen["HF_HUB_OFFLINE"] == "1"


@pytest.mark.slow
def test_transformers_and_peft_read_back_in_a_process_of_their_own(run: Path, tmp_path: Path) -> None:
    for kind in ("merged", "adapter"):
        done = export_run(run, kind, output=tmp_path / kind, offline=True)
        assert done.parity["verified"]


def test_lorafit_itself_answers_from_an_exported_adapter_and_model(run: Path, tmp_path: Path) -> None:
    adapter = export_run(run, "adapter", output=tmp_path / "adapter", verify=False).path
    merged = export_run(run, "merged", output=tmp_path / "merged", verify=False).path
    live = load(run, device="cpu").generate(["Say 7."], max_tokens=8)
    rest = {"device": "cpu", "dtype": "float32"}
    assert load(run.parent / "model", adapter=adapter, **rest).generate(["Say 7."], max_tokens=8) == live
    assert load(merged, **rest).generate(["Say 7."], max_tokens=8) == live

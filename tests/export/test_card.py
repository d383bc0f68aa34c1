"""The model card says what the run's files say, and nothing of the machine, its user or the rows."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.export.made import source_of
from tests.hostile.foreign import NAMES, blocks_of, code_of, header_of, steering, words_of
from tests.runs import run_to_export

from lorafit.errors import RunError
from lorafit.export.card import card, nameless, redacted
from lorafit.export.kinds import EXPORTS
from lorafit.export.run import export_run
from lorafit.export.run_source import RunSource
from lorafit.observe.metrics_file import read_metrics
from lorafit.run_dir import RunDirectory

SECRETS = {
    "HF_TOKEN": "hf_canaryCANARYcanary1234",
    "WANDB_API_KEY": "canary-wandb-0123456789",
    "MY_PASSWORD": "correct horse battery",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canary-folder")
    made = run_to_export(
        folder, "train.max_steps=30", "train.eval_every=10", "data.system=Be kind.", "run.verify=true"
    )
    env = json.loads((made / "env.json").read_text())
    env["command"] = (
        f"lorafit train --model {folder / 'model'} --data={folder / 'rows.json'} train.max_steps=30 "
        "run.output=/home/canary-user/runs/x hf_canaryCANARYcanary1234 https://u:canary-pw@example.org/m"
    )
    (made / "env.json").write_text(json.dumps(env))
    return made


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_card_tells_the_run(run: Path, kind: str) -> None:
    source = source_of(run)
    text = card(source, EXPORTS[kind], "f16", run, {"verified": False, "why": "a reason"})
    header = yaml.safe_load(text.split("---\n")[1])
    assert "lora" in header["tags"]
    assert "base_model" not in header  # a folder here is no model of the hub
    for told in ("`model`", "contract", "`</s>` (257)", '"Be kind."', "Not verified: a reason.", "rank: 4"):
        assert told in text
    assert "40 = 36 trained + 4 held out + 0 dropped" in text
    assert "lorafit train --model model --data=rows.json train.max_steps=30" in text
    heldout = [event for event in read_metrics(run / "metrics.jsonl") if event["event"] == "heldout"]
    for event in heldout:
        assert f"| {event['step']} |" in text
        assert f"{event['loss']:.4f}" in text
    curve = re.search("`([▁▂▃▄▅▆▇█]+)`", text)
    assert curve
    assert len(curve[1]) == 30
    assert (curve[1][0], "▁" in curve[1]) == ("█", True)


def test_metrics_of_any_values_are_told_as_far_as_they_are_numbers(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with (copy / "metrics.jsonl").open("a") as file:
        for event in (
            {"event": ["step"], "step": {}},
            {"event": "step", "step": 1e999, "loss": 10**4000},
            {"event": "heldout", "step": 40, "loss": "x", "base_loss": []},
        ):
            file.write(json.dumps(event).replace("Infinity", "1e999") + "\n")
    told = [
        card(source_of(path), EXPORTS["merged"], "f32", path, {"verified": False, "why": "-"})
        for path in (run, copy)
    ]
    assert told[0] == told[1]


def test_a_prompt_contract_of_tokens_that_the_model_lacks_is_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    prompt = json.loads((copy / "prompt.json").read_text())
    (copy / "prompt.json").write_text(json.dumps({**prompt, "bos_id": 10**9}))
    with pytest.raises(RunError, match="token 1000000000 has no embedding"):
        export_run(copy, "merged", verify=False, offline=True)


@pytest.mark.parametrize("kind", EXPORTS)
def test_nothing_of_machine_user_or_rows_is_told(
    run: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = card(source_of(run), EXPORTS[kind], "f16", run, {"verified": False, "why": "x"})
    assert "canary" not in text.lower()
    assert str(Path.home()) not in text
    assert "/tmp" not in text
    assert "Say the number" not in text  # a row


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_secret_that_yaml_or_a_shell_writes_otherwise_is_not_told(
    run: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes are doubled, other letters become numbers, and long values are wrapped."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    secrets = ["pa\"ss\\wo'rd12", "\u00e9t\u00e9-\u4e2d\u4e2d-la", " ".join(["several", "words"] * 20)]
    env = json.loads((copy / "env.json").read_text())
    env["command"] = shlex.join(["lorafit", "train", *(f"data.system={secret}" for secret in secrets)])
    (copy / "env.json").write_text(json.dumps(env))
    source = source_of(copy)
    data = source.config.data.model_copy(update={"path": tuple(secrets)})
    source = replace(source, config=source.config.model_copy(update={"data": data}))
    before = card(source, EXPORTS[kind], "f16", copy, {"verified": False, "why": "x"})
    for number, secret in enumerate(secrets):
        monkeypatch.setenv(f"PASSWORD_{number}", secret)
    text = card(source, EXPORTS[kind], "f16", copy, {"verified": False, "why": "x"})
    for part in ("ss\\", "t\u00e9-", "several words"):
        assert part in before
        assert part not in text
    assert "Every key" in text


def test_no_file_of_an_export_names_a_path(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for kind in ("adapter", "merged", "gguf", "gguf-lora", "ollama"):
        done = export_run(run, kind, output=tmp_path / kind, verify=False, offline=True)
        for path in done.path.iterdir():
            content = path.read_bytes()
            assert b"canary" not in content.lower(), (kind, path.name)
            assert str(tmp_path.parent).encode() not in content, (kind, path.name)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/a/models/llama", "llama"),
        ("--data=/mnt/x/rows.json", "--data=rows.json"),
        ("~/rows.json", "rows.json"),
        ("../up/rows.json", "rows.json"),
        (r"C:\Users\a\rows.json", "rows.json"),
        ("owner/name", "owner/name"),
        ("demo/rows.json", "demo/rows.json"),
        ("train.max_steps=3", "train.max_steps=3"),
        ("/", "."),
    ],
)
def test_of_a_path_only_the_last_part_is_shown(word: str, shown: str) -> None:
    assert nameless(word) == shown


def test_redacting_leaves_plain_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY_TOKEN", "")
    plain = "A token is a piece of text; sk is short; see https://huggingface.co/a/b and half / half; "
    plain += "runs/skateboarding-tutorials"
    assert redacted(plain) == plain


def foreign(source: RunSource, text: str, folder: Path) -> Iterator[tuple[RunSource, Path]]:
    """The run with a foreign text as its base's name, row file, system prompt, BOS, and command; once with a hub's."""
    run = Path(shutil.copytree(source.run.path, folder / "run"))
    text = text.encode(errors="replace").decode()
    for revision in (None, "a" * 40):
        base = replace(source.base, name=text, revision=revision, path=Path("/models") / text)
        contract = replace(source.contract, system=text, bos=text, add_bos=True)
        data = source.config.data.model_copy(update={"path": (text,), "system": text})
        config = source.config.model_copy(update={"data": data})
        renderer = type(source.renderer)(contract, source.renderer.tokenizer)
        yield replace(source, base=base, config=config, renderer=renderer), run


@pytest.mark.parametrize("kind", ["adapter", "gguf-lora"])
def test_a_card_quotes_every_name(kind: str, run: Path, tmp_path: Path) -> None:
    """Of all texts at once, and of each that could end a block: the card has the blocks of a plain one."""

    def written(text: str) -> Iterator[tuple[str, str]]:
        for number, (one, copy) in enumerate(foreign(source_of(run), text, tmp_path / f"{abs(hash(text))}")):
            made = card(one, EXPORTS[kind], "f32", copy, {"verified": False, "why": "a reason"})
            yield made, f"{number}"

    plain = {number: text for text, number in written("plain")}
    for text in ("".join(NAMES), *(text for text in NAMES if re.search(r"[`\n|<\[{]", text))):
        for made, number in written(text):
            assert steering(made) == []
            assert blocks_of(made) == blocks_of(plain[number]), text
            header = header_of(made)
            assert header.keys() == header_of(plain[number]).keys()
            assert header["tags"] == ["lora", "lorafit"]
            if number == "1":
                assert header["base_model"] == text.encode(errors="replace").decode()


def test_code_in_a_card_is_the_code_that_is_meant(run: Path, tmp_path: Path) -> None:
    for number, text in enumerate(NAMES):
        (one, copy), _ = foreign(source_of(run), text, tmp_path / str(number))
        made = card(one, EXPORTS["adapter"], "f32", copy, {"verified": False, "why": "a reason"})
        (program,) = [block for block in code_of(made) if "AutoModelForCausalLM" in block]
        calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
        assert len(calls) == 4
        first = next(call for call in calls if "AutoModelForCausalLM.from" in ast.unparse(call))
        assert ast.literal_eval(first.args[0]) == one.base_name


def test_names_of_exports_are_no_options_and_leave_no_folder(run: Path, tmp_path: Path) -> None:
    source = source_of(run)
    for text in NAMES:
        folder = tmp_path / text.replace("\ud800", "x")
        name = replace(source, run=RunDirectory(folder)).name
        assert re.fullmatch(r"[^\W_][\w.-]*|_[\w.-]*", name), name
        assert words_of(f"ollama create {name.lower()}") == [b"ollama", b"create", name.lower().encode()]

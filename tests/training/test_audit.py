"""An audit: an unchanged run passes to the bit; one changed row, key, number or byte is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runs import events, tiny_run
from typer.testing import CliRunner

from lorafit.cli.main import app
from lorafit.errors import CheckResult
from lorafit.run_dir import RunDirectory
from lorafit.training.audit import audit

SETTINGS = [
    "train.max_steps=7",
    "train.save_every=2",
    "train.eval_every=3",
    "train.keep=3",
    "lora.dropout=0.1",
]


@pytest.fixture(scope="module")
def audited(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rows of its own, so that a test can change a copy of them."""
    folder = tmp_path_factory.mktemp("audit")
    rows = next(word for word in tiny if word.startswith("data.path=")).partition("=")[2]
    shutil.copy(rows, folder / "rows.json")
    return tiny_run([*tiny, f"data.path={folder / 'rows.json'}", *SETTINGS], folder / "run").path


def failed(results: list[CheckResult]) -> list[str]:
    return [f"{result.name} {result.text}" for result in results if result.verdict != "pass"]


def test_an_unchanged_run_passes_to_the_bit(audited: Path) -> None:
    before = {path: path.read_bytes() for path in audited.rglob("*") if path.is_file()}
    kept = RunDirectory(audited).saved_steps()
    results = audit(audited, steps=20, quiet=True)
    assert failed(results) == []
    names = [result.name for result in results if result.name.startswith("step ")]
    assert names[:7] == [f"step {step}" for step in range(1, 8)]  # from the start all of them
    assert {f"step {step + 1}" for step in kept if step < 7} <= set(names[7:])
    with_digest = [result.name for result in results if "adapter are equal" in result.text]
    recorded = {f"step {event['step']}" for event in events(audited, "digest")}
    assert set(with_digest) <= recorded
    assert {"step 1", *(f"step {step + 1}" for step in kept if step < 7)} <= set(with_digest)
    assert {path: path.read_bytes() for path in audited.rglob("*") if path.is_file()} == before


def test_the_seed_chooses_the_steps(audited: Path) -> None:
    def steps(seed: int) -> list[str]:
        return [
            result.name for result in audit(audited, steps=2, seed=seed, quiet=True) if "step " in result.name
        ]

    assert len(steps(1)) == 2
    assert steps(1) == steps(1)


Change = Callable[[Path, pytest.MonkeyPatch], None]


def one_digit(run: Path, patch: pytest.MonkeyPatch) -> None:
    """Another loss of the first step."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    index = next(number for number, line in enumerate(lines) if '"step", "step": 1,' in line)
    event = json.loads(lines[index])
    event["loss"] = event["loss"] * (1 + 1e-9)
    lines[index] = json.dumps(event) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))


def one_rate(run: Path, patch: pytest.MonkeyPatch) -> None:
    text = (run / "metrics.jsonl").read_text()
    rate = next(event["learning_rate"] for event in events(run, "step"))
    (run / "metrics.jsonl").write_text(
        text.replace(f'"learning_rate": {rate!r}', f'"learning_rate": {rate / 2!r}', 1)
    )


def one_row(run: Path, patch: pytest.MonkeyPatch) -> None:
    rows = run.parent / "rows.json"
    rows.write_text(rows.read_text().replace("number 7.", "number 8.", 1))


def one_key(run: Path, patch: pytest.MonkeyPatch) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("dropout: 0.1", "dropout: 0.2"))


def a_key_that_changes_no_result(run: Path, patch: pytest.MonkeyPatch) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("log_every: 10", "log_every: 11"))


def one_byte_of(name: str) -> Change:
    def change(run: Path, patch: pytest.MonkeyPatch) -> None:
        path = next(run.glob(name))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def another_order(run: Path, patch: pytest.MonkeyPatch) -> None:
    """A program that trains other rows than it says."""
    from lorafit.data.row_order import RowOrder

    rows = RowOrder.rows
    patch.setattr(RowOrder, "rows", lambda order, step: rows(order, step + 1))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (one_digit, "step 1 loss is"),
        (one_rate, "step 1 learning_rate is"),
        (one_row, "facts the data changed"),
        (one_key, "facts lora.dropout changed: was 0.1, is 0.2"),
        (a_key_that_changes_no_result, "files it was changed after the run had ended (config.yaml)"),
        (one_byte_of("adapter/adapter_model.safetensors"), "files "),
        (one_byte_of("checkpoints/step-*/state.safetensors"), "files "),
        (one_byte_of("checkpoints/step-*/adapter_config.json"), "files "),
        (another_order, "step 1 loss is"),
    ],
)
def test_one_change_is_found(
    audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, what: str
) -> None:
    run = Path(shutil.copytree(audited, tmp_path / "run"))
    shutil.copy(audited.parent / "rows.json", tmp_path / "rows.json")
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace(str(audited.parent / "rows.json"), str(tmp_path / "rows.json"))
    )
    moved = [*failed(audit(run, steps=0, quiet=True))]  # the path of the rows is another one in the copy
    assert moved == ["files it was changed after the run had ended (config.yaml)"]
    change(run, monkeypatch)
    found = failed(audit(run, steps=4, quiet=True))  # the first step from each place
    assert any(line.startswith(what) for line in found), found


def test_other_rounding_is_within_the_bounds_and_a_change_is_not(
    audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of another size round otherwise, as other machines do."""
    run = Path(shutil.copytree(audited, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("micro_batch_tokens: 2048", "micro_batch_tokens: 64"))
    steps = [result for result in audit(run, steps=4, quiet=True) if result.name.startswith("step ")]
    assert any(result.verdict == "fail" for result in steps)
    monkeypatch.setattr("lorafit.training.audit.machine_facts", lambda _: {"machine": "another one"})
    results = audit(run, steps=4, quiet=True)
    assert all(result.verdict == "pass" for result in results if result.name.startswith("step "))
    assert [result.verdict for result in results if result.name == "machine"] == ["warn"]
    one_rate(run, monkeypatch)
    assert any("learning_rate is" in line for line in failed(audit(run, steps=4, quiet=True)))


def test_the_command_names_its_seed_and_its_exit_code(audited: Path) -> None:
    done = CliRunner().invoke(app, ["audit", str(audited), "--steps", "1", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["checks"][-1]["verdict"] == "pass"
    again = CliRunner().invoke(
        app, ["audit", str(audited), "--steps", "1", "--seed", str(told["seed"]), "--json"]
    )
    assert json.loads(again.stdout) == told
    assert f"lorafit audit {audited} --steps 5" in (audited / "report.html").read_text()

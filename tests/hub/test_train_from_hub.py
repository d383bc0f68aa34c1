"""The whole command with a gated model and a data set that come from a hub, then again without any network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub.stub import GOOD_TOKEN, Hub
from tests.tiny_models import write_model, write_rows
from tests.waiting import HANGS, until

from lorafit.model.adapter_file import CONFIG


def environment(folder: Path, hub: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    return {
        **inherited,
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": hub,
        "LORAFIT_NATIVE": "0",
    }


def lorafit(
    folder: Path, hub: str, *words: str, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    env = environment(folder, hub)
    if token:
        env["HF_TOKEN"] = token
    command = [sys.executable, "-m", "lorafit", "train", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS)


@pytest.mark.slow
def test_train_by_id_gated_pinned_and_offline(tmp_path: Path) -> None:
    hub = Hub()
    model = write_model(tmp_path / "files")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit = hub.add("owner/tiny", files, is_gated=True)
    rows = write_rows(tmp_path / "rows.json").read_bytes()
    data_commit = hub.add("datasets/owner/rows", {"data/train.json": rows, "loader.py": "raise SystemExit"})
    words = [
        "--model",
        "owner/tiny",
        "--data",
        "owner/rows",
        "train.max_steps=2",
        "run.samples=0",
        "run.verify=false",
    ]

    refused = lorafit(tmp_path, hub.url, *words, "--output", "refused")
    assert refused.returncode == 2
    assert "gated" in refused.stderr
    assert "accept the licence" in refused.stderr
    assert "Traceback" not in refused.stderr

    first = lorafit(tmp_path, hub.url, *words, "--output", "first", token=GOOD_TOKEN)
    assert first.returncode == 0, first.stderr
    adapter = json.loads((tmp_path / "first/adapter" / CONFIG).read_text())
    assert adapter["base_model_name_or_path"] == "owner/tiny"
    assert adapter["revision"] == commit
    assert not [request for request in hub.requests if request.endswith(".py")]
    for path in (tmp_path / "first").rglob("*"):
        assert not path.is_file() or GOOD_TOKEN.encode() not in path.read_bytes(), path
    assert GOOD_TOKEN not in first.stderr + first.stdout

    hub.close()
    pinned = [f"model.revision={commit}", f"data.revision={data_commit}", "run.offline=true"]
    again = lorafit(tmp_path, hub.url, *words, *pinned, "--output", "again")
    assert again.returncode == 0, again.stderr
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()

    lost = lorafit(tmp_path, hub.url, "--model", "owner/other", "--data", "owner/rows", "run.offline=true")
    assert lost.returncode == 2
    assert "hf download owner/other" in lost.stderr


@pytest.mark.slow
def test_control_c_ends_a_download_that_stands_still(tmp_path: Path) -> None:
    """And the same command downloads what is missing."""
    hub = Hub()
    model = write_model(tmp_path / "files")
    hub.add("owner/tiny", {path.name: path.read_bytes() for path in model.iterdir()})
    words = ["--model", "owner/tiny", "--data", str(write_rows(tmp_path / "rows.json")), "--output", "run"]
    words += ["train.max_steps=2", "run.samples=0", "run.verify=false"]
    env = {**environment(tmp_path, hub.url), "HF_HUB_DOWNLOAD_TIMEOUT": str(int(HANGS))}
    hub.stalled_on = "model.safetensors"
    command = [sys.executable, "-m", "lorafit", "train", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        until(hub.has_stalled.is_set, process.poll)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Ctrl-C: stopped"
    assert "Traceback" not in errors
    hub.goes_on.set()
    hub.stalled_on = None
    assert lorafit(tmp_path, hub.url, *words).returncode == 0
    hub.close()

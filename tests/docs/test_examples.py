"""The cluster examples, as far as they can be tried without a cluster: their syntax and the commands in them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from lorafit.cli.main import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
TORCHRUN_FLAGS = {
    "--nnodes",
    "--nproc-per-node",
    "--rdzv-id",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--max-restarts",
}


def text(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def test_what_is_listed_is_there() -> None:
    page = (EXAMPLES.parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+\.(?:sbatch|yaml|py))` \|", page, re.MULTILINE)
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == set(listed)


def test_shell_is_shell(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    run = tmp_path / "run.sh"
    run.write_text(yaml.safe_load(text("skypilot.yaml"))["run"])
    pods = tmp_path / "pods.sh"
    pods.write_text(yaml.safe_load(text("trainjob.yaml"))["spec"]["trainer"]["args"][0])
    for script in (EXAMPLES / "slurm.sbatch", run, pods):
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script
    for script in (EXAMPLES / "slurm.sbatch", run):
        used = set(re.findall(r"^\s+(--[a-z-]+) ", script.read_text(), re.MULTILINE))
        assert used == TORCHRUN_FLAGS


def test_torchrun_has_these_flags() -> None:
    from torch.distributed.run import get_args_parser

    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert known >= TORCHRUN_FLAGS


def test_manifests_start_commands_that_exist() -> None:
    train = typer.main.get_group(app).commands["train"]
    pods = yaml.safe_load(text("pytorchjob.yaml"))["spec"]["pytorchReplicaSpecs"]["Worker"]["template"][
        "spec"
    ]
    (worker,) = pods["containers"]
    assert worker["name"] == "pytorch"  # the operator looks for that name
    script = yaml.safe_load(text("trainjob.yaml"))["spec"]["trainer"]["args"][0]
    found = [[*worker["command"], *worker["args"]]]
    found += [line.split()[1:] for line in script.splitlines() if "exec " in line]
    assert len(found) == 3
    for words in found:
        assert words[:4] == ["torchrun", "-m", "lorafit", "train"]
        assert train.make_context("train", words[4:])


def test_python_compiles() -> None:
    assert ast.parse(text("ray_train.py"))

"""examples/cluster/ray_train.py on a Ray of this machine: two workers train the run of one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.tiny_models import write_model, write_rows
from tests.waiting import HANGS

from lorafit.config.load import load_config
from lorafit.training.run import start_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LORAFIT_LONG"), reason="takes minutes: `make hosts`")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: the extra `ray`")
def test_two_workers_of_ray_compute_what_one_process_does(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.json", 60)
    words = [
        "model.dtype=float32",
        "model.device=cpu",
        "train.batch_size=6",
        "train.max_steps=6",
        "lora.rank=4",
    ]
    words += ["train.learning_rate=0.001", "run.samples=0", "run.verify=false"]
    own = [f"model.name={model}", f"data.path={rows}", f"run.output={tmp_path / 'one'}"]
    one = start_run(load_config(None, [*words, *own]), quiet=True)
    places = ["--model", str(model), "--data", str(rows), "--output", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "cluster" / "ray_train.py"), *places, *words],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "two" / "adapter")
    weights, wanted = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "two" / "adapter", one.adapter)
    )
    assert max(float((weights[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6

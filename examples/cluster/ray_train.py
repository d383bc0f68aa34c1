"""lorafit on Ray: TorchTrainer makes the process group, and every worker calls lorafit's own entry point.

python examples/cluster/ray_train.py --model MODEL --data ROWS --output RUN --workers 2 [--gpu] [section.key=value ...]

Needs `pip install 'lorafit[ray]'`. Every worker must have access to the model, the rows and the run directory. An
existing run directory is resumed, so a worker that Ray restarts continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def train_worker(given: dict[str, Any]) -> None:
    """One rank: the environment and the process group are Ray's."""
    from lorafit.config.load import load_config
    from lorafit.training.run import resume_run, start_run

    if (Path(given["output"]) / "config.yaml").is_file():
        resume_run(given["output"], quiet=True)
    else:
        start_run(load_config(None, given["settings"]), quiet=True)


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("settings", nargs="*")
    words = parser.parse_args()
    output = str(Path(words.output).absolute())
    own = [f"model.name={words.model}", f"data.path={words.data}", f"run.output={output}"]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"output": output, "settings": [*words.settings, *own]},
        scaling_config=ScalingConfig(num_workers=words.workers, use_gpu=words.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()
    print(Path(output) / "adapter")


if __name__ == "__main__":
    main()

"""lorafit on Ray: TorchTrainer makes the process group, and every worker calls lorafit's own entry point.

python examples/cluster/ray_train.py --model MODEL --data ROWS --output RUN --workers 2 [--gpu] [section.key=value ...]

Needs `pip install 'lorafit[ray]'`. Every worker must have access to the model, the rows and the run directory. An
existing run directory is resumed, so a worker that Ray restarts continues from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def train_worker(worker_config: dict[str, Any]) -> None:
    """Run one rank. Ray has set the environment and the process group."""
    from lorafit.config.load import load_config
    from lorafit.training.run import resume_run, start_run

    if (Path(worker_config["output"]) / "config.yaml").is_file():
        resume_run(worker_config["output"], quiet=True)
    else:
        start_run(load_config(None, worker_config["settings"]), quiet=True)


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    output = str(Path(arguments.output).absolute())
    paths = [f"model.name={arguments.model}", f"data.path={arguments.data}", f"run.output={output}"]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"output": output, "settings": [*arguments.settings, *paths]},
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()
    print(Path(output) / "adapter")


if __name__ == "__main__":
    main()

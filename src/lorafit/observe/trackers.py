"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, Trackio), each through its own library.

The libraries are optional. A library is imported only when its tracker is requested.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import ConfigError, similar
from lorafit.observe.events import Event, Heldout, Step
from lorafit.redact import logger_of, one_line

PROJECT = "lorafit"
Log = Callable[[dict[str, float], int], object]  # (values by name, step)
Close = Callable[[], object]

logger = logger_of(__name__)


class Tracker:
    """An observer that sends a run's curves to one tracker.

    A tracker that fails during the run (no network, full disk) gets no more values, with one warning. It never stops
    a run.
    """

    def __init__(self, name: str, log: Log, close: Close) -> None:
        self._name, self._log, self._close = name, log, close
        self._is_open = True

    def __call__(self, event: Event) -> None:
        match event:
            case Step():
                names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
                values = {f"train/{name}": getattr(event, name) for name in names}
            case Heldout():
                values = {"heldout/loss": event.loss}
            case _:
                return
        self._attempt(lambda: self._log(values, event.step))

    def close(self) -> None:
        """Send what is left and end the tracker's run; a second call does nothing."""
        self._attempt(self._close)
        self._is_open = False

    def _attempt(self, send: Close) -> None:
        if not self._is_open:
            return
        try:
            send()
        except Exception as error:  # of any type: libraries raise their own
            self._is_open = False
            logger.warning("%s failed and gets no more values: %s", self._name, one_line(str(error)))


def tracker(name: str, run_name: str, folder: Path, config: Mapping[str, object]) -> Tracker:
    """The tracker `name` (`tensorboard`, `wandb`, `mlflow` or `trackio`), with a new run.

    Trackers that write local files put them into `folder`. The run gets `config`, except in TensorBoard, which has no
    field for it. Raises ConfigError for an unknown name, a library that is not installed, or a tracker that does not
    start.
    """
    start = _START.get(name)
    if start is None:
        near = similar(name, _START)
        raise ConfigError(
            f"there is no tracker `{name}`",
            hint=f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(_START)}",
        )
    try:
        return Tracker(name, *start(run_name, folder, config))
    except ImportError as error:
        raise ConfigError(
            f"the tracker `{name}` cannot be used: {error}", hint=f"pip install 'lorafit[{name}]'"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"the tracker `{name}` did not start: {error}",
            hint="log in to it, use its offline mode, or remove it from the recipe",
        ) from error


def _tensorboard(run_name: str, folder: Path, config: Mapping[str, object]) -> tuple[Log, Close]:
    """TensorBoard's own writer, which needs neither TensorFlow nor torch."""
    writer = importlib.import_module("tensorboard.summary").Writer(str(folder / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(run_name: str, folder: Path, config: Mapping[str, object]) -> tuple[Log, Close]:
    run: Any = importlib.import_module("wandb").init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=run_name, dir=str(folder), config=dict(config)
    )
    return lambda values, step: run.log(values, step=step), run.finish


def _mlflow(run_name: str, folder: Path, config: Mapping[str, object]) -> tuple[Log, Close]:
    """MLflow, to the server of MLFLOW_TRACKING_URI, else to files in the folder."""
    mlflow: Any = importlib.import_module("mlflow")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3 needs a database
        mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
    if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
        mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=run_name)
    mlflow.log_params(_flat(config))
    return lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run


def _trackio(run_name: str, folder: Path, config: Mapping[str, object]) -> tuple[Log, Close]:
    """Trackio, in its own folder, which `trackio show` reads."""
    trackio: Any = importlib.import_module("trackio")
    trackio.init(project=PROJECT, name=run_name, config=dict(config))
    return lambda values, step: trackio.log(values, step=step), trackio.finish


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """`{"lora": {"rank": 8}}` as `{"lora.rank": 8}`."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


_START: dict[str, Callable[[str, Path, Mapping[str, object]], tuple[Log, Close]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}

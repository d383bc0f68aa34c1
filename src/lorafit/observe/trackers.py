"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, Trackio), each through its own library.

The libraries are optional and imported only when one is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lorafit.errors import ConfigError
from lorafit.observe.events import Event, Heldout, Step
from lorafit.redact import one_line

PROJECT = "lorafit"

logger = logging.getLogger(__name__)


class Tracker:
    """An observer that sends a run's curves to one tracker.

    A tracker that fails on the way (no network, full disk) is left out from then on, with one warning: it
    never stops a run.
    """

    def __init__(self, name: str, backend: _Backend) -> None:
        self._name = name
        self._backend: _Backend | None = backend

    def __call__(self, event: Event) -> None:
        match event:
            case Step():
                values = {
                    "train/loss": event.loss,
                    "train/learning_rate": event.learning_rate,
                    "train/grad_norm": event.grad_norm,
                    "train/tokens_per_second": event.tokens_per_second,
                }
            case Heldout():
                values = {"heldout/loss": event.loss}
            case _:
                return
        self._attempt(lambda backend: backend.log(values, event.step))

    def close(self) -> None:
        """Send what is left and end the tracker's run; a second call does nothing."""
        self._attempt(lambda backend: backend.close())
        self._backend = None

    def _attempt(self, act: Callable[[_Backend], None]) -> None:
        if self._backend is None:
            return
        try:
            act(self._backend)
        except Exception as error:  # whatever the library raises, the run goes on
            self._backend = None
            logger.warning("%s failed and is left out from here on: %s", self._name, one_line(str(error)))


def tracker(name: str, run_name: str, folder: Path, config: Mapping[str, object]) -> Tracker:
    """The tracker called `name` (`tensorboard`, `wandb`, `mlflow` or `trackio`), with a new run in it.

    `folder` is where trackers that write local files put them; `config` is kept with the run, except by
    TensorBoard, which has no place for it. Raises ConfigError for a name that is none of them, a library that
    is not installed, or a tracker that does not start.
    """
    start = _BACKENDS.get(name)
    if start is None:
        near = difflib.get_close_matches(name, _BACKENDS, n=1)
        raise ConfigError(
            f"there is no tracker `{name}`",
            hint=f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(_BACKENDS)}",
        )
    try:
        return Tracker(name, start(run_name, folder, config))
    except ImportError as error:
        raise ConfigError(
            f"the tracker `{name}` cannot be used: {error}", hint=f"pip install 'lorafit[{name}]'"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"the tracker `{name}` did not start: {error}",
            hint="log in to it, use its offline mode, or take it out of the recipe",
        ) from error


class _Backend(Protocol):
    """What is asked of a tracker's library."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """TensorBoard's own writer, which needs neither TensorFlow nor torch."""

    def __init__(self, run_name: str, folder: Path, config: Mapping[str, object]) -> None:
        self._writer = importlib.import_module("tensorboard.summary").Writer(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_name: str, folder: Path, config: Mapping[str, object]) -> None:
        self._run: Any = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            dir=str(folder),
            config=dict(config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow, to the server of MLFLOW_TRACKING_URI or else to files in the folder."""

    def __init__(self, run_name: str, folder: Path, config: Mapping[str, object]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # else MLflow 3 wants a database for this
            self._mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=run_name)
        self._mlflow.log_params(_flat(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    """Trackio, in its own place, where `trackio show` looks for it."""

    def __init__(self, run_name: str, folder: Path, config: Mapping[str, object]) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(project=PROJECT, name=run_name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """`{"lora": {"rank": 8}}` as `{"lora.rank": 8}`."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


_BACKENDS: dict[str, Callable[[str, Path, Mapping[str, object]], _Backend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}

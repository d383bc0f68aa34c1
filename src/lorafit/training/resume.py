"""Where a run resumes: its config, its newest checkpoint that verifies, and the damaged ones that were skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.config.load import load_config
from lorafit.config.schema import Config
from lorafit.distributed.env import ProcessEnv
from lorafit.errors import ConfigError
from lorafit.observe.run_summary import RunState
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts
from lorafit.training.checkpoint import TrainState, read_state


@dataclass(frozen=True, slots=True)
class Resumption:
    """What rank 0 reads from a run directory, for all ranks.

    `step` is None before the first checkpoint, `finished` the last state of a finished run.
    """

    config: Config
    step: int | None
    skipped: Mapping[int, str]
    finished: TrainState | None

    @classmethod
    def of(cls, run: RunDirectory, overrides: Sequence[str]) -> Resumption:
        """Read a run; `overrides` change its settings. Raises a LorafitError."""
        run.clean()
        config = load_config(run.config_file, overrides)
        step, skipped = run.newest_checkpoint()
        finished = None
        if step is not None and RunState.of(run).is_complete and run.has_adapter():
            state, facts = read_state(run.checkpoint(step)), read_facts(run.checkpoint(step))
            last = facts.get("steps") if state.refit_from is None else state.refit_from + state.refit_steps
            last = last if state.budget is None else state.budget.last
            if state.early_stopped(config.train.patience) or step == last:
                finished = state
        return cls(config, step, skipped, finished)


def find_run_of_launch(env: ProcessEnv, output: str | None) -> str:
    """The run directory that an earlier start of this launch made, empty where there is none.

    torchrun's agent starts the same command again after a worker was lost; then the run is resumed. A directory of
    another launch is not used. Raises ConfigError without `run.output`: a restart could not find the run.
    """
    if not env.has_agent:
        return ""
    if output is None:
        raise ConfigError(
            "torchrun restarts lost workers, and they have to find the run",
            place="run.output",
            hint="give the run directory: --output runs/NAME",
        )
    run = RunDirectory(Path(output).expanduser())
    if not run.config_file.is_file():
        return ""
    named = env.launch != "none" and run.read_json(run.env_file).get("launch") == env.launch
    return output if env.restarts or named else ""

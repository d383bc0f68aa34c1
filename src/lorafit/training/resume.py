"""Where a run goes on: its config, its newest checkpoint that verifies, and what was skipped on the way there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lorafit.config.load import load_config
from lorafit.config.schema import Config
from lorafit.distributed.env import ProcessEnv
from lorafit.errors import ConfigError
from lorafit.observe.run_summary import RunState
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts
from lorafit.training.checkpoint import TrainState, read_state, state_of


@dataclass(frozen=True, slots=True)
class Resumption:
    """What the first rank finds in a run directory, for all of them.

    `step` is None before the first checkpoint, `finished` the last state of a run that has come to its end.
    """

    config: Config
    step: int | None
    skipped: Mapping[int, str]
    finished: TrainState | None

    @classmethod
    def of(cls, run: RunDirectory, overrides: Sequence[str]) -> Resumption:
        """Look into a run, with settings laid over its own. Raises a LorafitError."""
        run.clean()
        config = load_config(run.config_file, overrides)
        step, skipped = run.newest_checkpoint()
        finished = None
        if step is not None and RunState.of(run).is_complete and run.has_adapter():
            state = read_state(run.checkpoint(step))
            gave_up = 0 < config.train.patience <= state.num_worse
            ended = gave_up or read_facts(run.checkpoint(step)).get("steps") == step
            finished = state if ended else None
        return cls(config, step, skipped, finished)

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(
            {
                "config": self.config.model_dump_json(exclude_unset=True),
                "step": self.step,
                "skipped": list(self.skipped.items()),
                "finished": None if self.finished is None else asdict(self.finished),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Resumption:
        """What `to_json` wrote."""
        values = json.loads(text)
        finished = values["finished"]
        return cls(
            Config.model_validate_json(values["config"]),
            values["step"],
            dict(values["skipped"]),
            None if finished is None else state_of(finished),
        )


def find_run_of_launch(env: ProcessEnv, output: str | None) -> str:
    """The run directory that an earlier start of this launch has begun, empty if there is none.

    torchrun's agent starts the same command again when a worker was lost: then the run goes on. A directory that
    another launch has made is not taken. Raises ConfigError without `run.output`, where it would not be found again.
    """
    if not env.has_agent:
        return ""
    if output is None:
        raise ConfigError(
            "torchrun starts lost workers again, and they have to find the run",
            place="run.output",
            hint="give the run directory: --output runs/NAME",
        )
    run = RunDirectory(Path(output).expanduser())
    if not run.config_file.is_file():
        return ""
    named = env.launch != "none" and run.read_json(run.env_file).get("launch") == env.launch
    return output if env.restarts or named else ""

"""The Python API: train, load, generate. The same calls as the command line makes, without a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.config.load import load_config, recipe_file, validate
from lorafit.config.schema import Config
from lorafit.infer.model import Answer, Model, Question, load
from lorafit.infer.sampling import Sampling
from lorafit.training.run import Result, start_run

__all__ = ["generate", "load", "train"]


def train(config: Config | Mapping[str, Any] | str | Path, *, quiet: bool = True) -> Result:
    """Train a new run and return what it came to: its path, adapter and losses.

    `config` is a Config, a mapping of sections such as `{"model": {"name": ...}, "data": {"path": ...}}`, a
    recipe file, or the name of a recipe that ships with lorafit. `quiet` shows no progress. Raises a LorafitError,
    before anything is trained, that carries everything found wrong.
    """
    if isinstance(config, str | Path):
        config = load_config(recipe_file(str(config)))
    elif not isinstance(config, Config):
        config = validate(config)
    return start_run(config, quiet=quiet)


def generate(
    model: Model,
    prompts: Sequence[Question],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    base: bool = False,
) -> list[Answer]:
    """Answer every prompt, in order, with what `load` returned; temperature 0 is greedy, `base` leaves the adapter out.

    A prompt is a question, a row's content or a conversation that ends in a user turn.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    return model.generate(prompts, max_tokens=max_tokens, sampling=sampling, base=base)

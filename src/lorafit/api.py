"""The Python API: train, load, generate. The command line makes the same calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.config.load import load_config, recipe_file, validate
from lorafit.config.schema import Config, DataSection
from lorafit.data.memory_rows import rows_file, rows_in
from lorafit.infer.model import Answer, Model, Question, load
from lorafit.infer.sampling import Sampling
from lorafit.training.run import Result, start_run

__all__ = ["generate", "load", "train"]


def train(config: Config | Mapping[str, Any] | str | Path, *, quiet: bool = False) -> Result:
    """Train a new run.

    Args:
        config: a Config, a mapping of sections such as `{"model": {"name": ...}, "data": {"path": ...}}`, a recipe
            file, or the name of a recipe that lorafit contains. In a mapping, `data` or its `path` can be rows:
            `{"data": [{"instruction": ..., "output": ...}]}`, a generator of them, a DataFrame of pandas or polars, or
            a `datasets.Dataset`. They are kept in the cache.
        quiet: shows no progress; by default it is shown as `lorafit train` shows it, on stderr.

    Returns the Result: path, adapter and losses of the run. Raises a LorafitError, before the training, with all
    problems of the config, the rows and the model.
    """
    if isinstance(config, str | Path):
        config = load_config(recipe_file(str(config)))
    elif not isinstance(config, Config):
        config = validate(_with_files(config))
    return start_run(config, quiet=quiet)


def _with_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the file of its rows where `data` or `data.path` has them in memory."""
    data = config.get("data")
    section: dict[str, Any] = {"path": data}
    if isinstance(data, Mapping) and data.keys() & DataSection.model_fields.keys():
        section = dict(data)
    elif data is None or (isinstance(data, Mapping) and all(isinstance(one, str) for one in data.values())):
        return dict(config)  # settings, none of which is known
    if (rows := rows_in(section.get("path"))) is not None:
        section["path"] = [str(rows_file(rows))]
    return {**config, "data": section}


def generate(
    model: Model,
    prompts: Question | Sequence[Question],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    base: bool = False,
) -> list[Answer]:
    """Answer all prompts. One prompt gives a list of one answer.

    Args:
        model: the result of `load`.
        prompts: each a question, the content of a row, or a conversation that ends in a user turn: a list of
            `{"role": ..., "content": ...}`.
        max_tokens: most tokens of an answer.
        temperature: 0 is greedy, and ignores the following three.
        top_k: sample from the most probable tokens; 0 is all.
        top_p: sample from the most probable tokens that have this probability together.
        seed: of the sampling.
        base: disables the adapter.

    Returns the answers, in order. Raises ModelError where a prompt does not fit the model, DataError where it cannot
    be rendered.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    return model.generate(prompts, max_tokens=max_tokens, sampling=sampling, base=base)

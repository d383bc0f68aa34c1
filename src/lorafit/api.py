"""The Python API: train, load, generate. The command line makes the same calls."""

from __future__ import annotations

import os
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


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: Any = None,
    output: str | Path | None = None,
    quiet: bool = False,
) -> Result:
    """Train a new run.

    Args:
        config: a mapping of sections such as `{"train": {"epochs": 3}}`, a recipe file, the name of a recipe that
            lorafit contains, or a Config.
        model: `model.name`: a folder, a GGUF file or a hub id.
        data: `data.path`: files, a folder or a hub id, or rows: a list `[{"instruction": ..., "output": ...}]`, a
            generator of them, a DataFrame of pandas or polars, or a `datasets.Dataset`. Rows are kept in the cache.
            In a mapping, `data` or its `path` can be the same.
        output: `run.output`: the folder of the run.
        quiet: shows no progress; by default it is shown as `lorafit train` shows it, on stderr.

    `model`, `data` and `output` replace those of `config`. Returns the Result: path, adapter and losses of the run.
    Raises a LorafitError, before the training, with all problems of the config, the rows and the model.
    """
    given = {"model.name": model, "data.path": data, "run.output": output}
    flags = {key: _paths(value) for key, value in given.items() if value is not None}
    if isinstance(config, str | Path):
        config = load_config(recipe_file(str(config)), (), flags)
    elif flags or not isinstance(config, Config):
        values = (
            config.model_dump(exclude_unset=True) if isinstance(config, Config) else _with_files(config or {})
        )
        for key, value in flags.items():
            section, _, name = key.partition(".")
            if isinstance(part := values.get(section, {}), Mapping):
                values[section] = {**part, name: value}
        config = validate(values)
    return start_run(config, quiet=quiet)


def _paths(data: Any) -> Any:
    """`data` with paths as texts, or the file of its rows where it has them in memory."""
    if (rows := rows_in(data)) is not None:
        return [str(rows_file(rows))]
    if isinstance(data, list | tuple):
        return [os.fspath(one) if isinstance(one, os.PathLike) else one for one in data]
    return os.fspath(data) if isinstance(data, os.PathLike) else data


def _with_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with sections where a name stands for them, and with the file of the rows that it has in memory."""
    data, model = config.get("data"), config.get("model")
    if isinstance(model, str | os.PathLike):
        config = {**config, "model": {"name": os.fspath(model)}}
    section: dict[str, Any] = {"path": data}
    if isinstance(data, Mapping) and data.keys() & DataSection.model_fields.keys():
        section = dict(data)
    elif data is None or (isinstance(data, Mapping) and all(isinstance(one, str) for one in data.values())):
        return dict(config)  # settings, none of which is known
    if "path" in section:
        section["path"] = _paths(section["path"])
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

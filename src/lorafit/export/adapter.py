"""The adapter as a PEFT folder that stands alone: with tokenizer, chat template and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path

from lorafit.export.merge import generation_config, write_tokenizer
from lorafit.export.run_source import RunSource
from lorafit.model.adapter_file import CONFIG, WEIGHTS


def write_adapter(source: RunSource, staging: Path) -> None:
    """Copy the run's adapter and put beside it what other programs need to ask it as in training. Raises OSError.

    The base is named by its hub id; a local one by its folder's name alone, which is no path on anybody's machine.
    """
    (staging / WEIGHTS).write_bytes((source.adapter / WEIGHTS).read_bytes())
    config = json.loads((source.adapter / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.base_name
    config["revision"] = source.base.revision
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (staging / CONFIG).write_text(text, encoding="utf-8")
    write_tokenizer(source, staging)
    ends = json.dumps(generation_config(source), indent=2) + "\n"
    (staging / "generation_config.json").write_text(ends, encoding="utf-8")

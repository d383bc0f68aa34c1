"""The base's answers to neutral prompts for a run: read from its directory, or answered once and stored there."""

from __future__ import annotations

from lorafit.config.schema import Config
from lorafit.distributed.ranks import Ranks
from lorafit.errors import ConfigError
from lorafit.evaluate.drift import Neutral, answer_neutral, neutral_packs, read_answers
from lorafit.infer.model import Model
from lorafit.run_dir import RunDirectory
from lorafit.training.setup import is_sharded


def neutral_of(config: Config, run: RunDirectory, ranks: Ranks, model: Model) -> Neutral | None:
    """The base's answers to neutral prompts, where the config wants them; the first rank measures and anchors.

    They are stored in the run. Raises ConfigError where no rank holds the whole base.
    """
    wanted = config.run.drift or config.train.max_drift is not None or config.train.anchor > 0
    if wanted and is_sharded(config, ranks):
        hint = "use distributed.strategy=ddp, or leave run.drift, train.max_drift and train.anchor out"
        raise ConfigError("no rank holds the whole base, which the drift is measured from", hint=hint)
    if not wanted or not ranks.is_main:
        return None
    texts = read_answers(run.drift_file, model.network.arch.vocab_size)
    if texts is None:
        texts = answer_neutral(model)
        if not all(texts.values()):
            raise ConfigError("the model can read none of the neutral prompts", place="run.drift")
        run.write_json(run.drift_file, texts)
    return neutral_packs(texts)

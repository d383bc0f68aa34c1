"""Options without an effect (bug 29)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant

from lorafit.config.schema import keys
from lorafit.distributed.ranks import Ranks
from lorafit.model.adapter_file import CONFIG, WEIGHTS
from lorafit.model.llama import Layer
from lorafit.observe.metrics_file import read_metrics
from lorafit.storage.atomic import sha256_file
from lorafit.training import loop
from lorafit.training.run import Result

BASE = (
    "train.max_steps=3",
    "train.eval_every=2",
    "train.save_every=1",
    "train.keep=3",
    "data.holdout=4",
    "run.samples=1",
)
CUT = "data.max_length=70 data.too_long=drop"
# The last word changes a key; the words before are needed for it. The run is compared with one without the last word.
CHANGES = [
    "train.weight_decay=0.5",
    "train.warmup=2",
    "data.shuffle=false",
    "data.order=hash",
    "model.dtype=bfloat16",
    "model.quantize=int8",
    "model.name={other_model}",
    "lora.rank=2",
    "lora.alpha=64",
    "lora.dropout=0.5",
    "lora.targets=[q_proj]",
    "lora.rslora=true",
    "lora.init_from={adapter}",
    "data.path={other_rows}",
    "data.weights=[0.5]",
    "data.format=alpaca",
    "data.template=classic",
    "data.system=Be",
    "data.too_long=drop data.max_length=70",
    "data.max_length=70 data.too_long=drop data.too_long=truncate",
    "data.train_on=all",
    "data.template=classic data.eos=false",
    "data.packing=false",
    "data.holdout=0",
    "train.max_steps=null train.epochs=0.5",
    "train.max_steps=2",
    "train.batch_size=4",
    "train.micro_batch_tokens=100",
    "train.recompute=layers",
    "train.learning_rate=0.02",
    "train.schedule=constant",
    "train.max_grad_norm=0.01",
    "train.seed=7",
    "train.eval_every=1",
    "train.save_every=2",
    "train.keep=1",
    "run.samples=0",
    "distributed.timeout=7",
]
_CLOCKS = {"seconds", "tokens_per_second", "memory_bytes"}


@probe(
    29,
    Plant("model.adamw:AdamW.step", "if self.weight_decay:", "if not self.weight_decay:"),
    Plant("config.schema:TrainSection.warmup_steps", "return min(", "return 0 and min("),
    Plant("data.row_order:_epoch_rows", "if not order.shuffle:", "if False:"),
)
def another_value_changes_the_run(lab: Lab) -> None:
    """For every key, another value changes steps, passes, files or bytes of a run, or a test sets the key."""
    places = {
        "other_model": lab.model(name="other", seed=3),
        "other_rows": lab.rows(39, "other.json"),
        "adapter": lab.adapter(),
    }
    changed = {change.format(**places).split()[-1].partition("=")[0] for change in CHANGES}
    texts = [path.read_text(encoding="utf-8") for path in _test_files()]
    untested = [key for key in keys() if key not in changed and not any(f"{key}=" in text for text in texts)]
    assert untested == [], f"no run and no test changes {untested}"

    before: dict[tuple[str, ...], str] = {(): str(_trace(lab))}
    assert before[()] == str(_trace(lab)), "two equal runs differ"
    for change in CHANGES:
        *others, word = change.format(**places).split()
        context = tuple(others)
        before[context] = before.get(context) or str(_trace(lab, *context))
        assert str(_trace(lab, *context, word)) != before[context], f"{word} changes nothing"


def _trace(lab: Lab, *overrides: str) -> list[Any]:
    """The passes, files and events of a run, without times and config."""
    passes: list[tuple[int, ...]] = []
    layers, timeouts = [0], []
    pack_losses, forward, connect = loop.pack_losses, Layer.forward, Ranks.connect

    def connected(ranks: Any, device: Any, timeout: float) -> Any:
        timeouts.append(timeout)
        return connect(ranks, device, timeout)

    def recorded(network: Any, pack: Any, **more: Any) -> Any:
        passes.append(pack.lengths)
        return pack_losses(network, pack, **more)

    def counted(layer: Any, *arguments: Any) -> Any:
        layers[0] += 1
        return forward(layer, *arguments)

    with lab.patch.context() as patch:
        patch.setattr(loop, "pack_losses", recorded)
        patch.setattr(Layer, "forward", counted)
        patch.setattr(Ranks, "connect", connected)
        result = lab.run(*BASE, *overrides, name=f"run{len(list(lab.folder.iterdir()))}")
    return [passes, layers, timeouts, *_files(result)]


def _files(result: Result) -> Iterator[Any]:
    yield sorted(_events(result))  # sorted, because the time of a `saved` event depends on the disk
    for name in ("ledger.json", "prompt.json", "samples.json"):
        path = result.path / name
        yield json.loads(path.read_text()) if path.is_file() else None
    yield sorted(path.name for path in (result.path / "checkpoints").iterdir())
    yield [sha256_file(result.adapter / name) for name in (WEIGHTS, CONFIG)]


def _events(result: Result) -> Iterator[str]:
    for event in read_metrics(result.path / "metrics.jsonl"):
        if event["event"] in ("step", "heldout", "saved") or event.get("text", "").startswith("format"):
            kept = {key: value for key, value in event.items() if key not in _CLOCKS}
            yield json.dumps(kept).replace(str(result.path), "")


def _test_files() -> list[Path]:
    root = Path(__file__).parents[1]
    return [path for path in root.rglob("test_*.py") if path.parent.name not in ("bugs", "config")]

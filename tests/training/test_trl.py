"""Losses, rewards and gradients of methods that compare answers are those of TRL's trainers, on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import random_network, write_adapter, write_model
from torch import Tensor

from lorafit.config.auto import without_auto
from lorafit.config.load import load_config
from lorafit.data.batch import RankShare
from lorafit.data.build import build_data, sizes_of
from lorafit.data.packing import Packer
from lorafit.data.pair_marks import documents_of
from lorafit.distributed.ranks import Ranks
from lorafit.hub.client import model_folder
from lorafit.model.adapter_file import load_adapter
from lorafit.model.build import build
from lorafit.model.lora import LoraSpec, adapter_parameters
from lorafit.training.answers import measured, mismatched
from lorafit.training.objective import Passes
from lorafit.training.reference import Reference

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAIRS = [
    {
        "prompt": f"Say {'so ' * n}now: ",
        "chosen": f"{n} is it, is it not?",
        "rejected": f"{'no ' * (n + 1)}{n}",
    }
    for n in range(6)
]
SPEC = LoraSpec(2, 4, 0.0, ("all-linear",), False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trl")
    write_model(made / "model")
    for seed, name in ((1, "start"), (2, "now")):
        write_adapter(made / name, random_network(), SPEC, seed=seed, base=str(made / "model"))
    (made / "pairs.json").write_text(json.dumps(PAIRS))
    return made


def ours(folder: Path, *words: str) -> Any:
    """A job at the step of all pairs: the policy is the adapter `now`, the reference `start`."""
    base = str(folder / "model")
    words = (f"model.name={base}", f"data.path={folder / 'pairs.json'}", "data.holdout=0", "model.dtype=float32",
             f"lora.init_from={folder / 'start'}", "model.device=cpu", *words)  # fmt: skip
    config = load_config(None, words)
    data = build_data(config, model_folder(base), None, quiet=True)
    config = without_auto(config, sizes_of(data, None))
    network = build(config, folder / "model", torch.device("cpu")).network
    packer, count = Packer(100_000), len(PAIRS)
    flat = data.training.flat
    rows = [flat.row(at) for at in range(count)]
    others = [mismatched(rows[at], rows[(at + 1) % count], 2048) for at in range(count)]
    values = np.concatenate(
        [
            measured(network, packer.packs(rows), count, Ranks()),
            measured(network, packer.packs(others), count, Ranks())[:, :1],
        ],
        axis=1,
    )
    load_adapter(network, folder / "now")
    job = SimpleNamespace(
        config=config, data=data, rows=data.training, packer=packer, ranks=Ranks(), network=network,
        reference=Reference(values, "", {}), is_late=False,
    )  # fmt: skip
    batch = RankShare().of(data.training.to_pack, np.arange(count), packer)
    compute = Passes(job, batch)  # type: ignore[arg-type]
    network.train()
    loss = sum(compute(network, pack)[0] for pack in batch.packs) / batch.weight
    loss.backward()
    job.loss = float(loss.detach())
    job.event = compute.event(job, 1, compute.sums().tolist())  # type: ignore[arg-type]
    job.gradients = {name: parameter.grad for name, parameter in adapter_parameters(network).items()}
    job.flat, job.others = rows, others
    return job


def padded(rows: list[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Rows of ids and masks as a batch of TRL, padded on the right; a supervised prompt is no completion."""
    longest = max(len(ids) for ids, _ in rows)
    batch = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for at, (ids, told) in enumerate(rows):
        batch[0, at, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        batch[1, at, : len(ids)] = 1
        batch[2, at, : len(ids)] = torch.from_numpy((told >= told.max()).astype(np.int64))
    return dict(zip(("input_ids", "attention_mask", "completion_mask"), batch, strict=True))


def both(job: Any) -> tuple[list[Any], list[Any]]:
    """The chosen and the rejected rows."""
    documents = [list(documents_of(*row)) for row in job.flat]
    return [one[1:] for one, _ in documents], [other[1:] for _, other in documents]


def policy(folder: Path) -> Any:
    """peft's model with the adapter `start`."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "start", is_trainable=True)


def trainer(folder: Path, kind: str, **keys: Any) -> Any:
    """TRL's trainer whose policy has moved from `start`, which is its reference, to `now`."""
    import transformers
    import trl
    from datasets import Dataset
    from safetensors.torch import load_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    rows: list[dict[str, Any]] = [{**row} for row in PAIRS]
    if kind == "KTO":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=len(PAIRS), **keys,
    )  # fmt: skip
    made = getattr(trl, f"{kind}Trainer")(
        model=policy(folder), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    names = dict(made.model.named_parameters())
    for name, tensor in load_file(folder / "now" / "adapter_model.safetensors").items():
        names[name.replace(".weight", ".default.weight")].data.copy_(tensor)
    made.model.train()
    return made


def compare(job: Any, loss: Tensor, model: Any) -> None:
    """The losses and all gradients of the adapter."""
    assert job.loss == pytest.approx(float(loss.detach()), abs=1e-5)
    model.zero_grad()
    loss.backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if ".default." in name
    }
    assert len(theirs) == len(job.gradients)
    for name, gradient in job.gradients.items():
        torch.testing.assert_close(gradient, theirs[name.removesuffix(".weight")], rtol=1e-4, atol=1e-5)


def rewards(job: Any, metrics: dict[str, list[float]]) -> None:
    assert job.event.chosen_reward == pytest.approx(metrics["rewards/chosen"][-1], abs=1e-5)
    assert job.event.rejected_reward == pytest.approx(metrics["rewards/rejected"][-1], abs=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("robust", 0.1)]
)
def test_dpo_is_that_of_trl(folder: Path, loss_type: str, smoothing: float) -> None:
    job = ours(
        folder, "train.method=dpo", f"train.loss_type={loss_type}", f"train.label_smoothing={smoothing}"
    )
    theirs = trainer(folder, "DPO", loss_type=loss_type, label_smoothing=smoothing)
    chosen, rejected = both(job)
    compare(job, theirs.compute_loss(theirs.model, padded([*chosen, *rejected])), theirs.model)
    if loss_type != "sigmoid_norm":  # whose rewards TRL logs without the norm
        rewards(job, theirs._metrics["train"])


def test_kto_is_that_of_trl(folder: Path) -> None:
    words = ("train.desirable_weight=1.5", "train.undesirable_weight=0.5")
    job = ours(folder, "train.method=kto", *words)
    theirs = trainer(
        folder, "KTO", desirable_weight=1.5, undesirable_weight=0.5, train_sampling_strategy="sequential"
    )
    chosen, rejected = both(job)
    batch: dict[str, Any] = padded([*chosen, *rejected])
    # each pair is two answers; both have the mismatched row of their pair
    kl = padded([*job.others, *job.others])
    batch |= {f"KL_{name}": value for name, value in kl.items()}
    batch["label"] = torch.tensor([True] * len(chosen) + [False] * len(rejected))
    compare(job, theirs.compute_loss(theirs.model, batch), theirs.model)
    rewards(job, theirs._metrics["train"])
    assert job.event.kl == pytest.approx(theirs._metrics["train"]["kl"][-1], abs=1e-5)


def means(model: Any, rows: list[Any]) -> tuple[Tensor, Tensor]:
    """(mean log-probability of each answer, mean loss of all tokens) by transformers."""
    batch = padded(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask, every = batch["completion_mask"][:, 1:], batch["attention_mask"][:, 1:]
    return (logps * mask).sum(-1) / mask.sum(-1), -(logps * every).sum() / every.sum()


def moved(folder: Path) -> Any:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "now", is_trainable=True)


def test_orpo_is_that_of_trl(folder: Path) -> None:
    from trl.experimental.orpo import ORPOTrainer

    job, model = ours(folder, "train.method=orpo", "data.train_on=all"), moved(folder)
    chosen, rejected = both(job)
    (good, nll), (bad, _) = means(model, chosen), means(model, rejected)
    own = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    losses, good_rewards, bad_rewards, *_ = ORPOTrainer.odds_ratio_loss(own, good, bad)
    compare(job, nll - losses.mean(), model)
    rewards(
        job, {"rewards/chosen": [float(good_rewards.mean())], "rewards/rejected": [float(bad_rewards.mean())]}
    )


def test_simpo_is_that_of_trl(folder: Path) -> None:
    from trl.experimental.cpo import CPOTrainer

    words = ("train.beta=2.5", "train.simpo_gamma=0.7", "train.label_smoothing=0.1")
    job, model = ours(folder, "train.method=simpo", *words), moved(folder)
    chosen, rejected = both(job)
    good, bad = means(model, chosen)[0], means(model, rejected)[0]
    own = SimpleNamespace(beta=2.5, simpo_gamma=0.7, label_smoothing=0.1, loss_type="simpo", alpha=0.0,
                          accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    losses, good_rewards, bad_rewards = CPOTrainer.cpo_loss(own, good, bad)
    compare(job, losses.mean(), model)
    rewards(
        job, {"rewards/chosen": [float(good_rewards.mean())], "rewards/rejected": [float(bad_rewards.mean())]}
    )

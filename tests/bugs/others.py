"""`python -m tests.bugs.others`: applies probes to transformers + peft and to TRL.

Each probe runs on both tools with default settings, except the settings that the probe needs, on a random model of two
layers. The answers are measured results as text. `--write FILE` writes them between the marks in FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import peft
import torch
import transformers
import trl
from benchmarks.marks import put_between
from datasets import Dataset
from tests.bugs.accumulation import RAGGED
from tests.bugs.stopping import chatml_model
from tests.data.toy_tokenizers import qwen_like
from tests.tiny_models import write_model
from torch.utils.data import SequentialSampler

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Tool:
    """One of the two tools: the function that makes its trainer, and its name in the table."""

    name: str
    trainer: Callable[..., Any]


def lora(**changes: Any) -> peft.LoraConfig:
    """LoRA on all linear layers."""
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **changes})


def base_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    """Load a model folder as both tools do; EOS is the padding token if the tokenizer has none."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def arguments(work: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a small run on the CPU, without output."""
    settings = {
        "output_dir": str(work),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
    }
    settings |= {"per_device_train_batch_size": 6, "save_strategy": "no", "disable_tqdm": True, "seed": 1}
    return {**settings, **changes}


def trainer_of_transformers(
    model: Path, rows: Rows, work: Path, *, adapter: peft.LoraConfig | None = None, **changes: Any
) -> Any:
    """The usual trainer without TRL: text of the chat template, its ids, and the collator for language modelling."""
    base, tokenizer = base_and_tokenizer(model)
    longest = changes.pop("max_length", 512)
    texts = [_text(tokenizer, row) for row in rows]
    encoded = [tokenizer(text, truncation=True, max_length=longest) for text in texts]
    torch.manual_seed(0)
    return transformers.Trainer(
        model=peft.get_peft_model(base, adapter or lora()),
        args=transformers.TrainingArguments(**arguments(work, **changes)),
        train_dataset=Dataset.from_list([dict(row) for row in encoded]),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def trainer_of_trl(
    model: Path, rows: Rows, work: Path, *, adapter: peft.LoraConfig | None = None, **changes: Any
) -> Any:
    """SFTTrainer on rows of messages, of prompt and completion, or of text."""
    base, tokenizer = base_and_tokenizer(model)
    torch.manual_seed(0)
    return trl.SFTTrainer(
        model=base,
        args=trl.SFTConfig(**arguments(work, **changes)),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=adapter or lora(),
    )


TOOLS = (Tool("transformers + peft", trainer_of_transformers), Tool("TRL", trainer_of_trl))


def _text(tokenizer: Any, row: dict[str, Any]) -> str:
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return str(row.get("text") or row["prompt"] + row["completion"] + tokenizer.eos_token)


def conversations(rows: Rows) -> list[dict[str, Any]]:
    """Alpaca rows as messages."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]


def in_order(trainer: Any) -> Any:
    """The trainer with rows in the order of the data."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def steps(trainer: Any) -> list[dict[str, Any]]:
    """The log entry of each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def compared(one: float, two: float) -> str:
    """The relative distance of two numbers as text."""
    distance = abs(one - two) / max(abs(one), 1e-30)
    return "the same" if distance < 1e-4 else f"{distance:.0%} apart"


def accumulation(tool: Tool, lab: Path) -> str:
    """1 · Six rows of different lengths, in one micro-batch and in six: gradient norm"""
    norms = []
    for size in (6, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size, "max_steps": 1}
        trainer = in_order(tool.trainer(lab / "model", conversations(RAGGED), lab / "w", **cut))
        trainer.train()
        norms.append(steps(trainer)[0]["grad_norm"])
    return compared(*norms)


def last_window(tool: Tool, lab: Path) -> str:
    """3 · Six rows in micro-batches of two, two per step: gradient norm of the last step, and of its two rows alone"""
    rows, norms = conversations(RAGGED), []
    for part, accumulate in ((rows, 2), (rows[4:], 1)):
        cut = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": 0.0,
        }
        trainer = in_order(tool.trainer(lab / "model", part, lab / "w", num_train_epochs=1, **cut))
        trainer.train()
        norms.append(steps(trainer)[-1]["grad_norm"])
    return compared(norms[1], norms[0])


def contamination(tool: Tool, lab: Path) -> str:
    """4 · `packing=True`, other tokens in the first document of a pack: logits of the second document"""
    if tool.name != "TRL":
        return "has no packing"
    trainer = tool.trainer(lab / "model", conversations(RAGGED[:2]), lab / "w", packing=True, max_length=128)
    batch = next(iter(trainer.get_train_dataloader()))
    positions = batch["position_ids"][0].tolist()
    second = positions.index(0, 1)
    batch.pop("labels", None)
    with torch.no_grad():
        before = trainer.model(**batch).logits[0, second:]
        batch["input_ids"][0, 1:second] = (batch["input_ids"][0, 1:second] + 1) % 250
        after = trainer.model(**batch).logits[0, second:]
    attention = trainer.model.config._attn_implementation
    return f"{'the same' if torch.allclose(before, after, atol=1e-5) else 'other logits'} (attention `{attention}`)"


def stop_token(tool: Tool, lab: Path) -> str:
    """6 · Padding is EOS, and the rows end in EOS: rows with EOS as a target"""
    rows = [{"text": "Say one. one</s>"}, {"text": "Say two. two, two, two</s>"}]
    trainer = tool.trainer(lab / "model", rows, lab / "w")
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    num_targets = int((labels == trainer.processing_class.eos_token_id).sum())
    return f"{num_targets} of 2"


def generation_stops(tool: Tool, lab: Path) -> str:
    """7 · The template ends turns with `<|im_end|>`, the configs contain `</s>`: stop tokens of the trained model"""
    trainer = tool.trainer(lab / "chatml", conversations(RAGGED), lab / "w", max_steps=1)
    trainer.train()
    stops = trainer.model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    names = trainer.processing_class.convert_ids_to_tokens(stops)
    return f"generation config: {', '.join(f'`{name}`' for name in names)}"


def resumed(tool: Tool, lab: Path) -> str:
    """8, 9, 10 · Stopped after step 5 of 9 (an epoch has 4), dropout 0.1, and resumed: final adapter"""
    rows = conversations(RAGGED * 4)
    ends = []
    for stop in (0, 5):
        work = lab / f"{tool.name}-{stop}"
        settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5}
        trainer = tool.trainer(lab / "model", rows, work, adapter=lora(lora_dropout=0.1), **settings)
        if stop:
            halt = Halt(stop)
            trainer.add_callback(halt)
            trainer.train()
            trainer = tool.trainer(lab / "model", rows, work, adapter=lora(lora_dropout=0.1), **settings)
            trainer.train(resume_from_checkpoint=str(work / f"checkpoint-{stop}"))
        else:
            trainer.train()
        ends.append(weights(trainer))
    far = max(float((ends[0][name] - tensor).abs().max()) for name, tensor in ends[1].items())
    return "the same bytes" if far == 0 else f"differs by up to {far:.1e}"


class Halt(transformers.TrainerCallback):
    """Stops the training after a step, like a signal."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def double_bos(tool: Tool, lab: Path) -> str:
    """11 · The template writes BOS, and the tokenizer adds it: number of BOS per row"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab / "bos")
    messages = conversations(RAGGED[:1])
    text = [{"text": tokenizer.apply_chat_template(messages[0]["messages"], tokenize=False)}]
    counts = []
    for rows in (messages, text):
        trainer = tool.trainer(lab / "bos", rows, lab / "w")
        counts.append(list(trainer.train_dataset[0]["input_ids"]).count(tokenizer.bos_token_id))
    return f"{counts[0]} from messages, {counts[1]} from rendered text"


def border(tool: Tool, lab: Path) -> str:
    """12 · A token joins prompt and completion: trained text for `ant` after `user assist`"""
    if tool.name != "TRL":
        return "has no completion-only loss"
    rows = [{"prompt": "user assist", "completion": "ant"}]
    with caught() as messages:
        trainer = tool.trainer(lab / "joined", rows, lab / "w", eos_token="<|endoftext|>")
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    text = trainer.processing_class.decode(labels[labels >= 0])
    return f"`{text}`; {_warned(messages, 'not a prefix')}"


def truncation(tool: Tool, lab: Path) -> str:
    """15, 16 · Prompt and completion, `max_length=64`; two of three rows are longer, one by its prompt: trained rows"""
    rows = [
        {"prompt": "Short? ", "completion": "yes"},
        {"prompt": "Long " * 20, "completion": "never reached"},
        {"prompt": "Cut? ", "completion": "on and on " * 20},
    ]
    with caught() as messages:
        trainer = tool.trainer(lab / "model", rows, lab / "w", max_length=64)
        batch = next(iter(trainer.get_train_dataloader()))
    eos = trainer.processing_class.eos_token_id
    kept = [(int((labels >= 0).sum()), eos in labels.tolist()) for labels in batch["labels"]]
    details = ", ".join(f"{count} targets {'with' if ends else 'without'} EOS" for count, ends in kept)
    return f"{len(kept)} of 3 ({details}); {_warned(messages, 'trunc', 'drop', 'longer')}"


def remainder(tool: Tool, lab: Path) -> str:
    """17 · Twenty rows in batches of six: rows per epoch"""
    rows = conversations([{"instruction": f"Row {n}", "output": "yes"} for n in range(20)])
    trainer = tool.trainer(lab / "model", rows, lab / "w")
    return f"{sum(len(batch['input_ids']) for batch in trainer.get_train_dataloader())} of 20"


def adapter_type(tool: Tool, lab: Path) -> str:
    """18 · Base in bfloat16: type of the adapter"""
    base, tokenizer = base_and_tokenizer(lab / "model")
    base = base.to(torch.bfloat16)
    if tool.name == "TRL":
        trainer = trl.SFTTrainer(
            model=base,
            args=trl.SFTConfig(**arguments(lab / "w")),
            train_dataset=Dataset.from_list(conversations(RAGGED)),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        model = trainer.model
    else:
        model = peft.get_peft_model(base, lora())
    types = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    return ", ".join(sorted(types))


def checkpointing(tool: Tool, lab: Path) -> str:
    """19 · `gradient_checkpointing=True`: matrices B that change in one step"""
    options = {"gradient_checkpointing": True, "max_steps": 1, "learning_rate": 0.1}
    trainer = tool.trainer(lab / "model", conversations(RAGGED), lab / "w", **options)
    trainer.train()
    moved = [bool(tensor.abs().max() > 0) for name, tensor in weights(trainer).items() if "lora_B" in name]
    return f"{sum(moved)} of {len(moved)}"


def reloaded(tool: Tool, lab: Path) -> str:
    """20, 28 · Saved, and loaded into a new base (rsLoRA, alpha 3): logits"""
    options = {"max_steps": 3, "learning_rate": 0.1, "adapter": lora(use_rslora=True, lora_alpha=3)}
    trainer = tool.trainer(lab / "model", conversations(RAGGED), lab / "w", **options)
    trainer.train()
    trainer.save_model(str(lab / f"saved-{tool.name}"))
    base, _ = base_and_tokenizer(lab / "model")
    again = peft.PeftModel.from_pretrained(base, lab / f"saved-{tool.name}").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        one, two = trainer.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits
    return (
        "the same"
        if torch.allclose(one, two, atol=1e-5)
        else f"differ by up to {(one - two).abs().max():.1e}"
    )


def misspelt_target(tool: Tool, lab: Path) -> str:
    """24 · `target_modules=["q_proj", "v_prj"]`"""
    with caught() as messages:
        try:
            trainer = tool.trainer(
                lab / "model",
                conversations(RAGGED),
                lab / "w",
                adapter=lora(target_modules=["q_proj", "v_prj"]),
            )
        except ValueError as error:
            return f"an error: {str(error)[:60]}"
    names = {name.split(".")[-4] for name in weights(trainer)}
    return f"trains {', '.join(sorted(names))}; {_warned(messages, 'v_prj')}"


def typed_control(tool: Tool, lab: Path) -> str:
    """30 · A user types `</s>`: number of EOS in a row that should have two"""
    rows = conversations([{"instruction": "What is </s>?", "output": "A token."}])
    trainer = tool.trainer(lab / "model", rows, lab / "w")
    ids = list(trainer.train_dataset[0]["input_ids"])
    return str(ids.count(trainer.processing_class.eos_token_id))


def nothing_to_train(tool: Tool, lab: Path) -> str:
    """32 · A step with all labels masked"""
    trainer = tool.trainer(lab / "model", conversations(RAGGED), lab / "w", max_steps=2)
    collate = trainer.data_collator

    def masked(rows: Any) -> Any:
        batch = collate(rows)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    trainer.data_collator = masked
    try:
        trainer.train()
    except Exception as error:
        return f"an error: {str(error)[:60]}"
    return f"2 steps, logged loss {steps(trainer)[-1]['loss']}, no error"


PROBES: tuple[Callable[[Tool, Path], str], ...] = (
    accumulation,
    last_window,
    contamination,
    stop_token,
    generation_stops,
    resumed,
    double_bos,
    border,
    truncation,
    remainder,
    adapter_type,
    checkpointing,
    reloaded,
    misspelt_target,
    typed_control,
    nothing_to_train,
)


def _warned(messages: Sequence[str], *words: str) -> str:
    return "a warning" if any(word in text for word in words for text in messages) else "no warning"


@contextlib.contextmanager
def caught() -> Iterator[list[str]]:
    """Collect all warnings and all logged warnings."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "trl", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in shown]
    for logger in loggers:
        logger.removeHandler(handler)


def models(lab: Path) -> None:
    """Write the model folders of the probes."""
    write_model(lab / "model")
    bos = write_model(lab / "bos")
    config = json.loads((bos / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}" + config["chat_template"]
    (bos / "tokenizer_config.json").write_text(json.dumps(config))
    write_model(lab / "joined", vocab_size=420)
    qwen_like(lab / "joined")
    chatml_model(_Folder(lab))  # type: ignore[arg-type]


@dataclass
class _Folder:
    """The part of a probe's Lab that writes models."""

    folder: Path

    def model(self, name: str, **changes: Any) -> Path:
        return write_model(self.folder / name, **changes)


def table() -> str:
    """The answers of both tools, as Markdown."""
    lines = ["| probe | " + " | ".join(tool.name for tool in TOOLS) + " |", "| --- |" + " --- |" * len(TOOLS)]
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder)
        models(lab)
        for probe in PROBES:
            answers = []
            for tool in TOOLS:
                with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                    warnings.simplefilter("ignore")
                    answers.append(probe(tool, lab))
            cells = [str(cell).replace("|", "\\|") for cell in (probe.__doc__, *answers)]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    names = ("transformers", "peft", "trl", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    when = datetime.datetime.now(datetime.UTC).date().isoformat()
    return "\n".join([*lines, "", f"{when}, {versions}, on a CPU:\n`python -m tests.bugs.others`."])


def main() -> int:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a Markdown file with the two marks")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = table()
    if options.write:
        put_between(options.write, "others", text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Stop tokens are trained, and generation stops at them (bugs 6, 7)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant, rendered, renderer
from tests.data.chat_formats import FORMATS
from tests.tiny_models import byte_tokenizer

from lorafit import load
from lorafit.data.formats import Chat, Message
from lorafit.data.packing import build_pack

CHATML = FORMATS["chatml"].source
TURNS = Chat(
    (
        Message("user", "One?"),
        Message("assistant", "Yes."),
        Message("user", "Two?"),
        Message("assistant", "No, it is not."),
    )
)


def chatml_model(lab: Lab, **names: str) -> Path:
    """A model whose template ends turns with <|im_end|>, while EOS of its tokenizer and configs is </s>."""
    folder = lab.model(name="chatml", vocab_size=264)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML, **names}))
    return folder


@probe(
    6,
    Plant(
        "data.prompt:Renderer._assemble",
        "return Rendered(ids, trained)",
        "return Rendered(ids, [t and i != self.contract.eos_id for i, t in zip(ids, trained)])",
    ),
    Plant(
        "data.packing:build_pack",
        "target_at = trained[1:].nonzero()[0] + 1",
        "target_at = trained[1:].nonzero()[0][:-1] + 1",
    ),
)
def the_stop_token_is_trained_also_as_the_padding_token(lab: Lab) -> None:
    """The padding token is EOS: every answer ends with a trained stop token, which is also a target."""
    folder = lab.model()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": config["eos_token"]}))
    by = renderer(folder)
    row = rendered(by, TURNS)
    ends = [i for i, on in enumerate(row.trained) if on and not (row.trained[i + 1 :] or [False])[0]]
    assert [row.ids[end] for end in ends] == [257, 257]

    pack = build_pack([(np.array(row.ids, dtype=np.uint16), np.array(row.trained))])
    assert pack.targets.tolist().count(257) == 2


@probe(
    7,
    Plant(
        "infer.model:Model.request",
        "frozenset(self.renderer.contract.stop_ids)",
        "frozenset({self.renderer.contract.eos_id})",
    ),
    Plant(
        "data.prompt:Renderer._assemble",
        "stop = ids.index(segment.stop.id, start) + 1 if segment.stop else end",
        "stop = ids.index(segment.stop.id, start) if segment.stop else end",
    ),
)
def a_trained_model_ends_each_answer_with_its_stop_token(lab: Lab) -> None:
    """The template's end of turn is not EOS: after training on eight rows, all eight answers end as trained."""
    rows = [{"instruction": f"Number {n}?", "output": f"It is {n}{n}."} for n in range(8)]
    result = lab.run(
        f"model.name={chatml_model(lab)}",
        f"data.path={lab.rows(rows)}",
        "train.batch_size=8",
        "train.max_steps=60",
        "train.learning_rate=0.03",
        "lora.rank=16",
    )
    answers = load(result.path, device="cpu").generate([row["instruction"] for row in rows], max_tokens=24)
    for answer in answers:
        assert answer.stopped, answer.text
        assert re.fullmatch(r"It is \d\d\.", answer.text)

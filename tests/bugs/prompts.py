"""From a conversation to ids and masks, in training and in generation (bugs 11, 12, 13, 14, 30)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant, rendered, renderer, trained_texts
from tests.data.chat_formats import FORMATS
from tests.data.toy_tokenizers import llama_like, qwen_like

from lorafit.data.chat_template import ChatTemplate, Part
from lorafit.data.formats import Chat, Completion, Instruction, Message, Row
from lorafit.data.tokenizer import BORDER, Tokenizer
from lorafit.errors import DataError, Problem

ASK = Message("user", "What is it?")
TWICE = Chat((ASK, Message("assistant", "The answer."), ASK, Message("assistant", "It's 123.")))


@probe(
    11,
    Plant("data.prompt:Renderer._bos", "return [] if text.startswith", "return [] if not text.startswith"),
    Plant("data.prompt:Renderer._bos", "return [] if text.startswith(", "return [] if (lambda _: False)("),
    Plant("data.prompt:Renderer.prompt_ids", "return [*self._bos(text), *ids]", "return ids"),
)
def bos_occurs_once_in_training_and_generation(lab: Lab) -> None:
    """Template and tokenizer add BOS, one of them does, or neither: one BOS, or none in the last case."""
    chatml = FORMATS["chatml"].source.replace("<|im_end|>", "</s>")
    for writes in (True, False):
        for adds in (True, False):
            source = ("{{ bos_token }}" if writes else "") + chatml
            by = renderer(llama_like(lab.folder / f"{writes}{adds}", source, add_bos_token=adds))
            for ids in (rendered(by, TWICE).ids, by.prompt_ids(TWICE)):
                assert ids.count(1) == int(writes or adds), f"the template {writes=}, the tokenizer {adds=}"
                assert not (writes or adds) or ids[0] == 1


def _by_length_of_the_prompt(self: Tokenizer, texts: Sequence[str]) -> object:
    """Encode complete texts, and use the number of the prompt's tokens as the start of the answer."""
    for text in texts:
        parts = text.split(BORDER)
        befores = ["".join(parts[:n]) for n in range(1, len(parts))]
        ids = [next(iter(self._encode_checked([part]))) for part in ("".join(parts), *befores)]
        yield ids[0], [len(before) for before in ids[1:]]


@probe(
    12,
    Plant(
        "data.tokenizer:Tokenizer.encode_batch",
        act=lambda patch: patch.setattr(Tokenizer, "encode_batch", _by_length_of_the_prompt),
    ),
    Plant("data.prompt:_continue", 'segments[-1].text = text.rstrip(" ")', "pass"),
)
def an_answer_begins_where_generation_begins(lab: Lab) -> None:
    """Tokens could join prompt and answer: the prompt is a prefix, and the trained tokens decode to the answer."""
    by = renderer(qwen_like(lab.folder / "qwen"), "classic", add_eos=False)
    whole = by.tokenizer.encode("### Instruction:\nSay it.\n\n### Response:\n\n\nThe answer.")
    for content, answer in (
        (Instruction("Say it.", "", "\n\nThe answer."), "\n\nThe answer."),
        (Completion("The question: ", "the answer"), " the answer"),
        (Completion("user assist", "ant"), "ant"),
    ):
        row, prompt = rendered(by, content), by.prompt_ids(content)
        assert row.ids[: len(prompt)] == prompt
        assert row.trained == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
        assert trained_texts(by, row) == [answer]
        without_blank = by.prompt_ids(Completion("The question:", ""))
        assert by.prompt_ids(Completion("The question: ", "")) == without_blank
        assert whole[: len(prompt)] != prompt, "this tokenizer joins no tokens"


def _by_prefixes(self: ChatTemplate, messages: Sequence[Message], **_: object) -> list[Part]:
    """Locate answers by rendering the conversation up to their start and up to their end."""
    text, parts, position = self.render(messages), [], 0
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            before = self.render(messages[:turn])
            start = len(before) + len("<|im_start|>assistant\n")
            end = len(self.render(messages[: turn + 1])) - len("<|im_end|>\n")
            parts += [Part(text[position:start], None), Part(text[start:end], "assistant", turn)]
            position = end
    return [*parts, Part(text[position:], None)]


@probe(
    13,
    Plant(
        "data.chat_template:ChatTemplate.parts",
        act=lambda patch: patch.setattr(ChatTemplate, "parts", _by_prefixes),
    ),
    Plant(
        "data.chat_template:ChatTemplate.parts",
        "before = before[: len(before) - len(thought)]",
        "thought = ''",
    ),
    Plant(
        "data.chat_template:ChatTemplate.parts",
        "if content is None:",
        "content = content or ''\n        if False:",
    ),
)
def a_turn_is_located_also_if_the_template_rewrites_it(lab: Lab) -> None:
    """Qwen 3 removes thinking from earlier answers: the rendered text is trained, and a changed turn is refused."""
    by = renderer(qwen_like(lab.folder / "qwen3", FORMATS["qwen3"].source))
    thought = "<think>\nHm.\n</think>\n\n"
    chat = Chat((ASK, Message("assistant", f"{thought}One."), ASK, Message("assistant", f"{thought}Two.")))
    row = rendered(by, chat)
    assert trained_texts(by, row) == ["One.<|im_end|>", f"{thought}Two.<|im_end|>"]
    prompt = by.prompt_ids(chat)
    assert row.ids[: len(prompt)] == prompt
    plain = rendered(by, Chat((*chat.messages[:-1], Message("assistant", "Two."))))
    assert plain.ids[: len(prompt)] == prompt, "an answer without thinking has a different prompt"
    assert trained_texts(by, plain)[-1] == "<think>\n\n</think>\n\nTwo.<|im_end|>"

    source = FORMATS["chatml"].source.replace(
        "{{ message['content'] }}", "{{ message['content'] | replace('bad', '') }}"
    )
    changing = renderer(qwen_like(lab.folder / "changing", source))
    kept, lost = (Chat((Message("user", "Hi"), Message("assistant", text))) for text in ("good", "bad"))
    first, second = changing.render_batch([Row(0, "row 1", kept), Row(1, "row 2", lost)])
    assert not isinstance(first, Problem)
    assert isinstance(second, Problem), "a turn that the template changes was accepted"
    assert second.place == "row 2"


@probe(
    14,
    Plant(
        "data.prompt:Renderer._assemble",
        "if segment.answer:",
        "if segment.answer and segment.stop is None:",
    ),
    Plant(
        "data.prompt:Renderer._assemble",
        "[segment.weight > 0] * (stop - start) + [everything] * (end - stop)",
        "[True] * (end - start)",
    ),
    Plant("data.token_dataset:_Writer._fit", "if not outcome.is_supervised:", "if not outcome.trained:"),
)
def every_row_trains_only_its_answers(lab: Lab) -> None:
    """The trained tokens of each row equal a count by hand and the ledger; every trained row has some."""
    rows = [{"instruction": f"Say {n}.", "output": "so " * n + "yes"} for n in range(20)]
    rows += [{"instruction": "Nothing.", "output": " "}]
    result = lab.run(f"data.path={lab.rows(rows)}", "train.max_steps=1", "train.batch_size=21")
    ledger = json.loads((result.path / "ledger.json").read_text())
    assert ledger["trained"]["trained"] == sum(len(row["output"]) + 1 for row in rows[:20])
    assert ledger["dropped"] == {"the answer is empty": {"rows": 1, "first": [20]}}
    by = renderer(lab.model(), max_length=30, too_long="truncate")
    for row in rows[:20]:
        outcome = rendered(by, Instruction(row["instruction"], "", row["output"]))
        assert trained_texts(by, outcome) == [row["output"] + "</s>"]
    hidden = [{"instruction": "Long " * 30, "output": "yes"}, *rows[:10]]
    cut = ("data.max_length=60", "data.too_long=truncate", "data.train_on=response")
    result = lab.run(f"data.path={lab.rows(hidden, 'hidden.json')}", *cut, "train.max_steps=1", name="hidden")
    ledger = json.loads((result.path / "ledger.json").read_text())
    assert [entry["first"] for entry in ledger["dropped"].values()] == [[0]], (
        "a row without trained tokens is trained"
    )


@probe(
    30,
    Plant(
        "data.prompt:Renderer._chat_segments",
        "segments[-1].text += part.text",
        "segments[-1].text += self.tokenizer.protect(part.text)",
    ),
    Plant(
        "data.prompt:Renderer._chat_segments",
        "_continue(segments, part.text)",
        "_continue(segments, self.tokenizer.protect(part.text))",
    ),
)
def control_tokens_come_from_the_template_only(lab: Lab) -> None:
    """Control tokens typed into every field do not change the number of control tokens of the row."""
    for folder in (
        llama_like(lab.folder / "llama"),
        qwen_like(lab.folder / "qwen", FORMATS["chatml"].source),
        lab.model(),
    ):
        by = renderer(folder)
        controls = by.tokenizer.control
        typed = "".join(controls) + " and " + " ".join(controls)

        def count(text: str, by: object = by, controls: dict[str, int] = controls) -> list[int]:
            chat = Chat((Message("user", text), Message("assistant", text), ASK, Message("assistant", text)))
            ids = rendered(by, chat).ids  # type: ignore[arg-type]
            return [token for token in ids if token in controls.values()]

        assert count(f"x{typed}x") == count("x")
        with pytest.raises(DataError, match="reserved"):
            by.prompt_ids([Message("user", "\ufdd00\ufdd1")])

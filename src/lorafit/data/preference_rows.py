"""Preferences from rows: a better and a worse answer to one prompt, or one answer that is marked as good or bad.

The layouts are those of TRL and LLaMA-Factory: `chosen` and `rejected` as texts, turns or lists of turns, with a
`prompt`, the turns of a conversation, an instruction, or without any: then their common beginning is the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import takewhile

from lorafit.data.content import Chat, Completion, Content, Instruction, Message, Preference
from lorafit.data.row_fields import CONVERSATIONS, SYSTEM, TRAIN, WEIGHT, Fields, is_empty
from lorafit.data.turns import conversation, finished, prompt_and_completion, read_turn

PAIR, LABELS = ("chosen", "rejected"), ("label", "kto_tag")
_QUESTIONS = ("instruction", "question", "query")
_TURNS = "turns with `role` and `content`"
_NOTHING = Completion("", "")


def preference(row: Fields) -> Preference:
    """The preference in a row."""
    for name in (*WEIGHT, *TRAIN):
        if not is_empty(value := row.raw.get(name)) and value not in (0, 1):
            row.wrong(name, f"is {value}, but a preference counts or does not", "write 1 or 0, or remove it")
    label = row.first(LABELS)
    if label in row.raw and not any(key in row.raw for key in PAIR):
        return _labelled(row, label)
    for key in PAIR:
        if key not in row.raw:
            hint = f"add `{key}`; a row with one answer needs `label`, true or false, and train.method=kto"
            row.wrong(key, "is missing", hint)
            return Preference(_NOTHING, None)
    kinds = {isinstance(row.raw[key], str) for key in PAIR}
    if len(kinds) > 1:
        text = next(key for key in PAIR if isinstance(row.raw[key], str))
        row.wrong(text, "is text, but the other answer is turns", "write both as text, or both as turns")
        return Preference(_NOTHING, None)
    return _texts(row) if kinds == {True} else _conversations(row)


def _texts(row: Fields) -> Preference:
    """Two answers that are texts."""
    chosen, rejected = (row.filled(key) for key in PAIR)
    if (turns := _asked(row)) is not None:
        return Preference(*(_chat(row, key, turns, [Message("assistant", row.raw[key])]) for key in PAIR))  # type: ignore[arg-type]
    if (name := row.first(_QUESTIONS)) in row.raw:
        asked = Instruction(row.filled(name), row.optional("input"), "", row.one_of(SYSTEM))
        return Preference(asked.with_answer(chosen), asked.with_answer(rejected))
    if "prompt" in row.raw:
        prompt = row.required("prompt")
        return Preference(Completion(prompt, chosen), Completion(prompt, rejected))
    prompt = chosen[: _num_alike(chosen, rejected)]
    if prompt in (chosen, rejected):  # an answer is not empty
        prompt = prompt[:-1]
    prompt = prompt[: max(prompt.rfind(" "), prompt.rfind("\n")) + 1].rstrip(" ")  # no word is cut
    return Preference(*(Completion(prompt, text[len(prompt) :]) for text in (chosen, rejected)))


def _conversations(row: Fields) -> Preference:
    """Two answers that are turns, or conversations that begin alike."""
    before = len(row.problems)
    turns = _asked(row)
    answers = [_answer(row, key) for key in PAIR]
    if len(row.problems) > before:
        return Preference(_NOTHING, None)
    chosen, rejected = answers
    if turns is None:
        asked = row.optional("prompt")
        if asked and chosen and chosen[0].role == "assistant":
            turns = [Message("user", asked)]
        elif asked and not any(turn.content.strip() == asked.strip() for turn in chosen):
            row.wrong(
                "prompt", "is not a turn of `chosen`", "remove `prompt`, or the turns before the answers"
            )
    if turns is None:
        start = max(0, min(_num_alike(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
        turns, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    return Preference(_chat(row, "chosen", turns, chosen), _chat(row, "rejected", turns, rejected))


def _num_alike(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _asked(row: Fields) -> list[Message] | None:
    """The turns of the prompt, None where it is not a list of turns."""
    for name in ("prompt", *CONVERSATIONS):
        if isinstance(row.raw.get(name), list):
            turns = [read_turn(turn, is_asked=True) for turn in row.objects(name, _TURNS)]
            return [turn for turn in turns if turn is not None]
    return None


def _answer(row: Fields, key: str) -> list[Message]:
    """The turns of an answer, which may be one turn by itself."""
    value = row.get(key)
    turns = (
        [Fields(value, row.place, row.problems, row)] if isinstance(value, dict) else row.objects(key, _TURNS)
    )
    return [turn for turn in map(read_turn, turns) if turn is not None]


def _chat(row: Fields, key: str, asked: Sequence[Message], answer: Sequence[Message]) -> Chat:
    """The conversation of a prompt and an answer; only the answer is trained."""
    untrained = [dataclasses.replace(turn, weight=0.0) for turn in asked]
    if wrong := next((turn for turn in answer if turn.weight not in (0, 1)), None):
        hint = "write 1 or 0 beside the turn, or remove it"
        row.wrong(key, f"has a turn of weight {wrong.weight:g}, but a preference counts or does not", hint)
    return finished(row, key, [*untrained, *answer])


def _labelled(row: Fields, key: str) -> Preference:
    """One answer that is marked as good or bad."""
    label = row.get(key)
    if label not in (True, False):
        row.wrong(
            key, f"is {label!r}, not true or false", "write true for a good answer, false for a bad one"
        )
    if key != LABELS[0]:
        row.aliases[f"`{key}` as `{LABELS[0]}`"] = None
    content = _one_answer(row)
    return Preference(content, None) if label else Preference(None, content)


def _one_answer(row: Fields) -> Content:
    if (
        turns := next((key for key in CONVERSATIONS if isinstance(row.raw.get(key), list)), None)
    ) is not None:
        chat = conversation(row, turns)
        *asked, answer = chat.messages or (Message("assistant", ""),)
        return dataclasses.replace(
            chat, messages=(*(dataclasses.replace(turn, weight=0.0) for turn in asked), answer)
        )
    if (name := row.first(_QUESTIONS)) in row.raw:
        answer_text = row.filled(row.first(("output", "completion")))
        return Instruction(row.filled(name), row.optional("input"), answer_text, row.one_of(SYSTEM))
    if all(isinstance(row.raw.get(key), list) for key in ("prompt", "completion")):
        return prompt_and_completion(row)
    return Completion(row.required("prompt"), row.filled("completion"))

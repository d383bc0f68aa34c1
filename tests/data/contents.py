"""Any content of a row, as hypothesis draws it, and the renderers of the toy tokenizers."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tests.data.toy_tokenizers import hostile_text

from lorafit.data.formats import Chat, Completion, Content, Instruction, Message
from lorafit.data.prompt import Renderer, contract
from lorafit.data.tokenizer import Tokenizer

NAMES = ["qwen", "qwen3", "zephyr", "legacy", "llama2", "llama3", "vicuna"]


def make(tokenizer: Tokenizer, template: str = "auto", **changes: Any) -> Renderer:
    options: dict[str, Any] = {
        "train_on": "response",
        "max_length": 512,
        "too_long": "error",
        "add_eos": True,
    }
    return Renderer(contract(tokenizer, template=template, **{**options, **changes}), tokenizer)


chats = st.builds(
    lambda system, turns: Chat(
        (
            *([Message("system", system)] if system.strip() else []),
            *(
                Message(role, text)
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ),  # type: ignore[arg-type]
        )
    ),
    hostile_text,
    st.lists(st.tuples(hostile_text, hostile_text.filter(str.strip)), min_size=1, max_size=3),
)
instructions = st.builds(
    Instruction, hostile_text, hostile_text, hostile_text.filter(str.strip), st.sampled_from(["", "Be kind."])
)
completions = st.builds(Completion, hostile_text.filter(str.strip), hostile_text.filter(str.strip))
contents = chats | instructions | completions


def swallows_system(content: Content) -> bool:
    """Llama 2 writes the system prompt into the first question and strips both: blank, they run together, and the
    row is refused rather than guessed at."""
    match content:
        case Instruction():
            return bool(content.system) and not content.question().strip()
        case Chat((Message("system", _), Message("user", question), *_)):
            return not question.strip()
    return False

"""The texts of a row by kind: an instruction, a conversation, a prompt with its completion, or a text.

This file knows no keys of rows (see formats), no templates and no tokens.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorafit.data.strict_json import parse_strict

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool. `arguments` is the JSON text of an object, or the text that the row has in its place."""

    name: str
    arguments: str
    id: str = ""

    @property
    def value(self) -> Any:
        """The arguments as an object; as the text that they are where that is no JSON object, or has a key twice."""
        try:
            value = parse_strict(self.arguments)
        except ValueError:
            return self.arguments
        return value if isinstance(value, dict) else self.arguments

    @property
    def is_valid(self) -> bool:
        """Whether the arguments are a JSON object."""
        return isinstance(self.value, dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    An assistant turn may have `reasoning` before its content, and `calls`. `name` and `call_id` are those of the tool
    of a tool turn. `weight` is the factor of an assistant turn's loss; with 0 it is not trained.
    """

    role: Role
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    name: str = ""
    call_id: str = ""
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The content, and a line of JSON for each call."""
        calls = [
            json.dumps({"name": call.name, "arguments": call.value}, ensure_ascii=False)
            for call in self.calls
        ]
        return "\n".join([self.content, *calls] if self.content else calls) if calls else self.content


class Content(ABC):
    """The texts of a row. `asks`: a question precedes the answer."""

    __slots__ = ()
    asks: ClassVar[bool] = True

    @abstractmethod
    def fields(self) -> dict[str, str]:
        """Every text by the name of its field, in the order of reading."""

    @abstractmethod
    def answers(self) -> list[str]:
        """The texts to learn, in order; the last is the answer to `question`."""

    @abstractmethod
    def with_answer(self, answer: str) -> Content:
        """The same question with another last answer."""

    def texts(self) -> list[str]:
        """All texts that are not empty, in order."""
        return [text for text in self.fields().values() if text]

    def question(self) -> str:
        """The text that the last answer answers; "" if there is none."""
        return ""

    def turns(self) -> list[Message] | None:
        """The row as the turns of a conversation, None if it is not one."""
        return None

    def weights(self) -> list[float]:
        """The factor of the loss of each answer, in order."""
        return [1.0]

    @property
    def has_template(self) -> bool:
        """Whether a prompt template surrounds the row."""
        return True

    @property
    def preferred(self) -> Content:
        """The row with its better answer; the row itself where it has one."""
        return self


@dataclass(frozen=True, slots=True)
class Instruction(Content):
    """A task, an optional input to it ("" is none), and the answer to learn; the answer may be empty."""

    instruction: str
    input: str
    output: str
    system: str = ""

    def fields(self) -> dict[str, str]:
        names = ("system", "instruction", "input", "output")
        return {name: getattr(self, name) for name in names}

    def answers(self) -> list[str]:
        return [self.output]

    def with_answer(self, answer: str) -> Instruction:
        return dataclasses.replace(self, output=answer)

    def question(self) -> str:
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    def turns(self) -> list[Message]:
        system = [Message("system", self.system)] if self.system else []
        return [*system, Message("user", self.question()), Message("assistant", self.output)]


@dataclass(frozen=True, slots=True)
class Chat(Content):
    """A conversation: an optional system turn first, then turns of which the last is the assistant's.

    `tools` is the JSON text of the list of tools that the assistant may call, "" for none.
    """

    messages: tuple[Message, ...]
    tools: str = ""

    def fields(self) -> dict[str, str]:
        texts = {"tools": self.tools} if self.tools else {}
        for index, message in enumerate(self.messages):
            name = f"messages[{index}]"
            if message.reasoning:
                texts[f"{name}.reasoning_content"] = message.reasoning
            texts[name] = message.content
            for number, call in enumerate(message.calls):
                texts[f"{name}.tool_calls[{number}]"] = f"{call.name} {call.arguments} {call.id}".rstrip()
            if message.name or message.call_id:
                texts[f"{name}.name"] = f"{message.name} {message.call_id}".strip()
        return texts

    def answers(self) -> list[str]:
        answers = [message for message in self.messages if message.role == "assistant"]
        return [message.text for message in answers if message.weight > 0] or [
            message.text for message in answers
        ]

    def with_answer(self, answer: str) -> Chat:
        is_answered = self.messages and self.messages[-1].role == "assistant"
        question = self.messages[:-1] if is_answered else self.messages
        return Chat((*question, Message("assistant", answer)), self.tools)

    def question(self) -> str:
        return self.messages[-2].content if len(self.messages) > 1 else ""

    def turns(self) -> list[Message]:
        return list(self.messages)

    def weights(self) -> list[float]:
        return [message.weight for message in self.messages if message.role == "assistant"]


@dataclass(frozen=True, slots=True)
class Completion(Content):
    """A text and its continuation to learn, without any template."""

    prompt: str
    completion: str

    def fields(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": self.completion}

    def answers(self) -> list[str]:
        return [self.completion]

    def with_answer(self, answer: str) -> Completion:
        return Completion(self.prompt, answer)

    def question(self) -> str:
        return self.prompt

    @property
    def has_template(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Text(Content):
    """A text to learn as a whole."""

    asks: ClassVar[bool] = False

    text: str

    def fields(self) -> dict[str, str]:
        return {"text": self.text}

    def answers(self) -> list[str]:
        return [self.text]

    def with_answer(self, answer: str) -> Text:
        return Text(answer)

    @property
    def has_template(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Preference(Content):
    """Two answers to one prompt, or one answer that is marked as good (then `rejected` is None) or bad.

    The answers are rows of their own with the same prompt. Whatever is not about both is about the better one.
    """

    chosen: Content | None
    rejected: Content | None

    @property
    def preferred(self) -> Content:
        content = self.chosen or self.rejected
        assert content is not None
        return content

    def fields(self) -> dict[str, str]:
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        return {
            f"{side}.{name}": text
            for side, content in sides.items()
            if content is not None
            for name, text in content.fields().items()
        }

    def answers(self) -> list[str]:
        return self.preferred.answers()

    def with_answer(self, answer: str) -> Content:
        return self.preferred.with_answer(answer)

    def texts(self) -> list[str]:
        texts = self.preferred.texts()
        return [*texts, *self.rejected.answers()] if self.chosen and self.rejected else texts

    def question(self) -> str:
        return self.preferred.question()

    def turns(self) -> list[Message] | None:
        return self.preferred.turns()

    @property
    def has_template(self) -> bool:
        return self.preferred.has_template

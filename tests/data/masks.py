"""`python -m tests.data.masks`: generated conversations in every chat format and tokenizer; what is trained is exact.

Each conversation goes from a row of JSON to ids. Then the trained ids decode to the answers and their stop tokens as
`tests/data/chat_formats.py` has them, or the row is refused by number for one of the reasons that are allowed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tests.data.chat_formats import FORMATS, Format
from tests.data.toy_tokenizers import llama_like, qwen_like
from tokenizers.normalizers import NFC  # Python's knows another version of Unicode

from lorafit.data.formats import Chat, Message, Row, parse
from lorafit.data.prompt import Rendered, Renderer, contract
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, Problem

ROOT = Path(__file__).resolve().parents[2]
# fmt: off
PIECES = [
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\ufeff", "▁", "-", "'", '"', "\\n", "{{ x }}",
    "{% if %}", "The answer", "the answer.", "It's", "123", "1,234.5", "user", "assistant", "system", "Response:\n",
    "[INST]",
    "한국어", "日本", "e\u0301", "é", "ﬁ", "🙂", "👩‍👩‍👧", "\U0001f1f0\U0001f1f7", "Ω", "\u202e", "ß", "</div>",
    "</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<0x0A>", "<|user|>\n",
    "ASSISTANT: ", "### Response:\n", "<end_of_turn>", "<|end|>", "[/INST]", "<think>", "\n### Human: ",
]
# fmt: on
BLANKS = ("", " ", "\n", "  \n", "\t", "\n\n\n")


@dataclass
class Tally:
    """How many conversations were exact and how many were refused, by reason."""

    exact: int = 0
    trained_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer: `make(format's name, format)` loads one that knows the format's control tokens;
    `readable` is what of a text comes back from its ids; `joins`: with a blank more after a control token."""

    make: Callable[[str, Format], Tokenizer]
    readable: Callable[[str], str]
    joins: bool = False


def kinds(folder: Path, shared: Path | None) -> dict[str, Kind]:
    """Toys, the demo's and, where the shared models are at hand, TinyLlama's."""

    def toy(make: Callable[..., Path], readable: Callable[[str], str], **options: Any) -> Kind:
        def made(name: str, chat: Format) -> Tokenizer:
            path = make(folder / f"{make.__name__}{len(options)}-{name}", chat.source, **options)
            return _with_tokens(path, path, chat)

        return Kind(made, readable, joins="legacy" in options)

    def real(source: Path, readable: Callable[[str], str]) -> Kind:
        return Kind(lambda name, chat: _with_tokens(source, folder / f"{source.name}-{name}", chat), readable)

    found = {
        "byte-level BPE": toy(qwen_like, NFC().normalize_str, bos_token="<|endoftext|>"),
        "SentencePiece-like BPE": toy(llama_like, _with_blanks),
        "the same, older": toy(llama_like, _with_blanks, legacy=True),
        "demo": real(ROOT / "demo" / "model", str),
    }
    if shared is not None:
        found["TinyLlama"] = real(shared / "models" / "tinyllama-1.1b-chat-skeleton", _with_blanks)
    return found


def _with_blanks(text: str) -> str:
    """SentencePiece's mark of a word is a blank when it comes back."""
    return text.replace("▁", " ")


def _with_tokens(source: Path, target: Path, chat: Format) -> Tokenizer:
    """A copy of a tokenizer's files with the format's template and control tokens, loaded."""
    target.mkdir(parents=True, exist_ok=True)
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    known = {token["content"] for token in spec["added_tokens"]}
    first = max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    new = [token for token in chat.tokens if token not in known]
    spec["added_tokens"] += [{"id": first + n, "content": token, **flags} for n, token in enumerate(new)]
    (target / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    config["chat_template"] = chat.source
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_folder(target)


def conversations(count: int, chat: Format, seed: object) -> Iterator[dict[str, Any]]:
    """Rows of `messages`: one to four questions and answers of all kinds, some with a system turn, some thinking."""
    draw = random.Random(str(seed))

    def text() -> str:
        kind = draw.random()
        if kind < 0.05:
            return draw.choice(BLANKS)
        said = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 9)))
        if kind < 0.15:
            said += "".join(chr(draw.randint(0x21, 0x2FFF)) for _ in range(4))
        return draw.choice(BLANKS) + said + draw.choice(BLANKS) if kind > 0.6 else said

    for _ in range(count):
        turns = [("system", text())] if chat.system and draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 4)):
            answer = text()
            if chat.thinks and draw.random() < 0.4:
                thought = text().strip("\n").replace("think>", "thought>")
                answer = f"<think>\n{thought}\n</think>\n\n{answer.replace('think>', 'thought>')}"
            turns += [("user", text()), ("assistant", answer)]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


class Reference:
    """The template as any other Jinja renders it, for text that lorafit has no part in."""

    def __init__(self, chat: Format, tokenizer: Tokenizer) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda pattern: "26 Jul 2024"
        self._template = environment.from_string(chat.source)
        self._names = {"bos_token": tokenizer.bos.text if tokenizer.bos else ""}
        self._names |= {"eos_token": tokenizer.eos.text if tokenizer.eos else ""}

    def text(self, messages: Sequence[Message], ask: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return self._template.render(messages=turns, add_generation_prompt=ask, **self._names)

    @staticmethod
    def _raise(message: str) -> None:
        raise TemplateError(message)


# Before a template: calls become the text of their turn, results questions, and the tools begin the first question.
_WITH_TOOLS = (
    "{%- set ns = namespace(turns=[], tools=tools) %}{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- set ns.turns = ns.turns + [{'role': 'user', 'content': '<result>' + m.content + '</result>'}] %}"
    "{%- elif m.tool_calls %}{%- set calls = namespace(text=m.content or '') %}{%- for call in m.tool_calls %}"
    "{%- set calls.text = calls.text + '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) "
    "+ '</call>' %}{%- endfor %}{%- set ns.turns = ns.turns + [{'role': m.role, 'content': calls.text}] %}"
    "{%- elif m.role == 'user' and ns.tools %}"
    "{%- set text = '<tools>' + (ns.tools | tojson) + '</tools>' + m.content %}{%- set ns.tools = none %}"
    "{%- set ns.turns = ns.turns + [{'role': 'user', 'content': text}] %}"
    "{%- else %}{%- set ns.turns = ns.turns + [{'role': m.role, 'content': m.content}] %}{%- endif %}{%- endfor %}"
    "{%- set messages = ns.turns %}{{- '' }}"
)


def rows_with_tools(
    count: int, chat: Format, seed: object
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows with tools, calls and results, each with the row without them that says the same in plain turns."""
    draw = random.Random(str(seed))

    def text() -> str:
        return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 4)))

    for _ in range(count):
        tools = [{"type": "function", "function": {"name": "f", "description": text()}}]
        turns: list[dict[str, Any]] = []
        plain: list[dict[str, Any]] = []
        if chat.system and draw.random() < 0.3:
            turns.append({"role": "system", "content": "Be kind."})
            plain.append(turns[0])
        for number in range(draw.randint(1, 3)):
            asked = {"role": "user", "content": text()}
            start = f"<tools>{json.dumps(tools, ensure_ascii=False)}</tools>" * (number == 0)
            turns.append(asked)
            plain.append({"role": "user", "content": start + asked["content"]})
            for _ in range(draw.randint(0, 2)):
                said = draw.choice(["", "", "Let me see."])
                calls = [
                    {
                        "name": draw.choice(["f", "get it"]),
                        "arguments": {text(): text(), "n": draw.randint(0, 9)},
                    }
                    for _ in range(draw.randint(1, 2))
                ]
                written = [json.dumps(call["arguments"], ensure_ascii=False) for call in calls]
                as_text = draw.random() < 0.5
                made = [
                    {"function": {**call, "arguments": arguments if as_text else call["arguments"]}}
                    for call, arguments in zip(calls, written, strict=True)
                ]
                turns.append({"role": "assistant", "content": said or None, "tool_calls": made})
                shown = zip(calls, written, strict=True)
                said += "".join(f"<call>{call['name']} {arguments}</call>" for call, arguments in shown)
                result = text()
                turns.append({"role": "tool", "content": result})
                plain += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": f"<result>{result}</result>"},
                ]
            answer = {"role": "assistant", "content": f"It is {text()} so."}
            turns.append(answer)
            plain.append(answer)
        yield {"messages": turns, "tools": tools}, {"messages": plain}


def check_tools(chat: Format, kind: Kind, name: str, count: int, seed: object, tally: Tally) -> None:
    """Calls are trained and results are not: the ids and masks are those of the row that says the same in plain turns.

    AssertionError names the row.
    """
    with_tools = replace(chat, source=_WITH_TOOLS + chat.source)
    renderers = []
    for title, format_ in ((f"{name} with tools", with_tools), (name, chat)):
        tokenizer = kind.make(title, format_)
        options: dict[str, Any] = {"template": "chat", "train_on": "response", "add_eos": True}
        made = contract(tokenizer, max_length=10**6, too_long="error", **options)
        renderers.append(Renderer(made, tokenizer))
    for number, rows in enumerate(rows_with_tools(count, chat, seed)):
        outcomes = []
        for renderer, row in zip(renderers, rows, strict=True):
            [outcome], _ = _outcome(renderer, row, number, "rows.jsonl row 1")
            outcomes.append(outcome)
        told, plain = outcomes
        if isinstance(plain, Problem):
            tally.refused["the template refuses the plain turns"] += 1
            continue
        where = f"{name}, row {number + 1}: {json.dumps(rows[0], ensure_ascii=False)}"
        assert isinstance(told, Rendered), f"{where}: {told}"
        assert told == plain, f"{where}: {trained_stretches(renderers[0].tokenizer, told)}"
        tally.exact += 1
        tally.trained_tokens += sum(told.trained)


def check(chat: Format, kind: Kind, name: str, raw: Sequence[dict[str, Any]], tally: Tally) -> None:
    """Check every row of `raw` in the format called `name`; AssertionError names the row."""
    tokenizer = kind.make(name, chat)
    made = contract(
        tokenizer, template="chat", train_on="response", max_length=10**6, too_long="error", add_eos=True
    )
    renderer, reference = Renderer(made, tokenizer), Reference(chat, tokenizer)
    for number, row in enumerate(raw):
        place = f"rows.jsonl row {number + 1}"
        [outcome], content = _outcome(renderer, row, number, place)
        if isinstance(outcome, Problem):
            assert outcome.place.startswith(place), f"{name}: refused without its number: {outcome}"
            reason = _allowed(chat, row["messages"])
            assert reason, f"{name}: refused without a reason that is allowed: {outcome.message}: {row}"
            tally.refused[reason] += 1
            continue
        assert isinstance(outcome, Rendered), outcome
        assert content is not None
        try:
            _compare(chat, kind, renderer, reference, content.messages, outcome)
        except AssertionError as error:
            raise AssertionError(
                f"{name}, row {number + 1}: {error}\n{json.dumps(row, ensure_ascii=False)}"
            ) from error
        tally.exact += 1
        tally.trained_tokens += sum(outcome.trained)


def _outcome(
    renderer: Renderer, row: dict[str, Any], number: int, place: str
) -> tuple[Sequence[Any], Chat | None]:
    try:
        [parsed] = parse([row], "messages", [place], number)
    except DataError as error:
        return [error.problems[0]], None
    assert isinstance(parsed.content, Chat)
    return renderer.render_batch([parsed]), parsed.content


def _allowed(chat: Format, turns: Sequence[dict[str, str]]) -> str:
    """Why a row may be refused, "" if it may not."""
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        return "an answer is blank"
    if turns[0]["role"] == "system" and not turns[1]["content"].strip() and "<<SYS>>" in chat.source:
        return "a blank first question runs together with the system prompt"
    if chat.thinks == "prompt" and "</think>" in turns[-1]["content"]:
        return "an answer thinks where the prompt says that it does not"
    if chat.thinks and any("think>" in turn["content"] for turn in turns if turn["role"] == "assistant"):
        return "thinking that the template changes"
    return ""


def _compare(
    chat: Format,
    kind: Kind,
    renderer: Renderer,
    reference: Reference,
    messages: Sequence[Message],
    row: Rendered,
) -> None:
    tokenizer, readable, controls = renderer.tokenizer, kind.readable, renderer.tokenizer.control.values()
    eos = tokenizer.eos.text if tokenizer.eos else ""
    texts, starts = trained_stretches(tokenizer, row)
    expected = [readable(text) for text in chat.trained(messages, eos)]
    if kind.joins:
        after = [row.ids[start - 1] in controls for start in starts]
        expected = [" " * joined + text for joined, text in zip(after, expected, strict=False)]
    if "" in expected:  # nothing of an answer is left, and it has no stop token of its own
        texts, expected = ["".join(texts)], ["".join(expected)]
    assert texts == expected, f"trained {texts}, not {expected}"
    assert row.ids[max(at for at, on in enumerate(row.trained) if on)] in renderer.contract.stop_ids

    shown = "".join(span.text for span in renderer.text(Row(0, "", Chat(tuple(messages)))))
    bos = tokenizer.bos.text if tokenizer.bos and tokenizer.adds_bos else ""
    plain = reference.text([Message(m.role, _without_controls(m.content, tokenizer)) for m in messages])
    text, head = reference.text(messages), "" if plain.startswith(bos) else bos
    tail = shown.removeprefix(head + text)
    assert shown.startswith(head + text), "the text is not the template's"
    assert tail in ("", eos), tail

    counted = Counter(token for token in row.ids if token in controls)
    for control, token in tokenizer.control.items():
        assert counted[token] == (head + plain + tail).count(control), f"{control} {counted[token]} times"
    if bos and chat.once:
        assert row.ids[0] == tokenizer.control[bos]
        assert counted[tokenizer.control[bos]] == 1

    prompt = renderer.prompt_ids(messages[:-1])
    assert row.ids[: len(prompt)] == prompt, "generation begins with other ids"
    assert len(prompt) == starts[-1] or len(starts) < len(expected), "what is trained begins elsewhere"
    if chat.generation and "add_generation_prompt" in chat.source:
        asked = readable(reference.text(messages[:-1], ask=True)).rstrip(" ")
        said = readable(shown)
        assert said.startswith(head + asked), f"the template asks with {asked[-60:]!r}"
        rest = said[len(head + asked) :].lstrip(" ")
        last = chat.trained(messages, eos)[-1]
        assert rest.startswith(readable(last).lstrip(" ")), "between the template's prompt and the answer"


def trained_stretches(tokenizer: Tokenizer, row: Rendered) -> tuple[list[str], list[int]]:
    """The text of each trained stretch, decoded in its place, and where each begins."""
    texts, starts, start = [], [], 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or row.trained[end] != row.trained[end - 1]:
            if row.trained[start]:
                texts.append(tokenizer.decode(row.ids[:end])[len(tokenizer.decode(row.ids[:start])) :])
                starts.append(start)
            start = end
    return texts, starts


def _without_controls(text: str, tokenizer: Tokenizer) -> str:
    for control in tokenizer.control:
        text = text.replace(control, "x")
    return text


def campaign(
    count: int, seed: int, shared: Path | None, formats: Sequence[str] = ()
) -> Iterator[tuple[str, str, Tally]]:
    """Check `count` conversations of every format with every tokenizer; yields format, tokenizer and tally."""
    with tempfile.TemporaryDirectory() as folder:
        for title, kind in kinds(Path(folder), shared).items():
            for name, chat in FORMATS.items():
                if not formats or name in formats:
                    tally = Tally()
                    check(chat, kind, name, list(conversations(count, chat, (seed, title, name))), tally)
                    check_tools(chat, kind, name, count // 5, (seed, title, name), tally)
                    yield name, title, tally


def main() -> int:
    """Print a line for every format, and what was refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=500, help="of each format with each tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=None, help="the folder of shared models")
    parser.add_argument("formats", nargs="*", help="names of formats; all without any")
    wanted = parser.parse_args()
    started = time.perf_counter()
    by_format: dict[str, Tally] = {}
    for name, _, tally in campaign(wanted.conversations, wanted.seed, wanted.shared, wanted.formats):
        sums = by_format.setdefault(name, Tally())
        sums.exact += tally.exact
        sums.trained_tokens += tally.trained_tokens
        sums.refused += tally.refused
    for name, sums in by_format.items():
        refused = ", ".join(f"{count} refused: {reason}" for reason, count in sums.refused.items())
        print(f"{name:24} {sums.exact:6,} exact, {sums.trained_tokens:8,} trained tokens; {refused}")
    total = sum(sums.exact for sums in by_format.values())
    print(f"{len(by_format)} formats, {total:,} conversations exact in {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

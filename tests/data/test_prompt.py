"""Rendering: text as in transformers, masks that are the answers, prompts that are what inference sends."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from tests.data.contents import NAMES, contents, make, swallows_system
from tests.data.toy_tokenizers import CHATML, VICUNA, llama_like, load, qwen_like, toys

from lorafit.data import chat_template
from lorafit.data.chat_template import ChatTemplate
from lorafit.data.formats import Chat, Completion, Content, Instruction, Message, Row, Text
from lorafit.data.prompt import Dropped, PromptContract, Rendered, Renderer
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, ModelError, Problem

QUESTION = Message("user", "What is it?")
TWO_TURNS = Chat((Message("system", "Be kind."), QUESTION, Message("assistant", "The answer."),
                  Message("user", "Why?"), Message("assistant", "It's 123.\n\n- one")))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: load(folder) for name, folder in toys(tmp_path_factory.mktemp("toys")).items()}


def render(renderer: Renderer, content: Content) -> Rendered:
    [outcome] = renderer.render_batch([Row(0, "row 1", content)])
    assert isinstance(outcome, Rendered), outcome
    assert len(outcome.ids) == len(outcome.trained)
    return outcome


def trained_texts(renderer: Renderer, row: Rendered) -> list[str]:
    """The text of each trained stretch, decoded in its place."""
    tokenizer, texts, start = renderer.tokenizer, [], 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or row.trained[end] != row.trained[end - 1]:
            if row.trained[start]:
                texts.append(tokenizer.decode(row.ids[:end])[len(tokenizer.decode(row.ids[:start])) :])
            start = end
    return texts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_on", ["response", "all"])
@settings(max_examples=20)
@given(content=contents)
def test_the_prompt_is_what_inference_sends(
    tokenizers: dict[str, Tokenizer], name: str, train_on: str, content: Content
) -> None:
    assume(name != "llama2" or not swallows_system(content))
    renderer = make(tokenizers[name], train_on=train_on)
    row = render(renderer, content)
    prompt = renderer.prompt_ids(content)
    if train_on == "response":
        assert row.ids[: len(prompt)] == prompt
        assert row.trained[len(prompt)]
        if isinstance(content, Completion | Instruction):
            assert not any(row.trained[: len(prompt)])
    else:
        assert row.trained == [False] + [True] * (len(row.ids) - 1)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(content=contents)
def test_answers_and_their_stops_are_trained_and_nothing_else(
    tokenizers: dict[str, Tokenizer], name: str, content: Content
) -> None:
    renderer = make(tokenizers[name])
    tokenizer, row = renderer.tokenizer, render(renderer, content)
    controls = set(tokenizer.control.values())
    last = max(index for index, flag in enumerate(row.trained) if flag)
    assert row.ids[last] in renderer.contract.stop_ids
    if tokenizer.bos:
        assert row.ids.count(tokenizer.bos.id) == (row.ids[0] == tokenizer.bos.id) or name == "llama2"
        assert row.ids[0] == tokenizer.bos.id
    answers = [content.completion] if isinstance(content, Completion) else []
    answers += [content.output] if isinstance(content, Instruction) else []
    if isinstance(content, Chat):
        answers += [message.content for message in content.messages if message.role == "assistant"]
    trained = [token for token, flag in zip(row.ids, row.trained, strict=True) if flag]
    stops = 1 if name == "vicuna" else len(answers)
    assert sum(token in controls for token in trained) == stops
    _assert_says(renderer, row, answers)


def _assert_says(renderer: Renderer, row: Rendered, answers: Sequence[str]) -> None:
    """The trained text is the answers, up to blanks at their ends, NFC, and the stop tokens."""

    def bare(text: str) -> str:
        for control in renderer.tokenizer.control:
            text = text.replace(control, "")
        text = text.removeprefix("<think>\n\n</think>\n\n")  # Qwen 3's answer without thinking
        return unicodedata.normalize("NFC", "".join(text.replace("▁", " ").split()))

    texts = trained_texts(renderer, row)
    if renderer.tokenizer.chat_template == VICUNA:
        assert bare("".join(texts)) == bare("".join(answers))
    else:
        assert list(filter(None, map(bare, texts))) == list(filter(None, map(bare, answers)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen", ["The answer.<|im_end|>", "It's 123.\n\n- one<|im_end|>"]),
        ("qwen3", ["The answer.<|im_end|>", "<think>\n\n</think>\n\nIt's 123.\n\n- one<|im_end|>"]),
        ("zephyr", ["The answer.</s>", "It's 123.\n\n- one</s>"]),
        ("llama2", [" The answer. </s>", " It's 123.\n\n- one </s>"]),
        ("llama3", ["The answer.</s>", "It's 123.\n\n- one</s>"]),
        ("vicuna", [" The answer.", " It's 123.\n\n- one\n</s>"]),
    ],
)
def test_trained_text_of_each_template(
    tokenizers: dict[str, Tokenizer], name: str, expected: list[str]
) -> None:
    renderer = make(tokenizers[name])
    assert trained_texts(renderer, render(renderer, TWO_TURNS)) == expected
    spans = renderer.text(Row(0, "row 1", TWO_TURNS))
    assert [span.text for span in spans if span.trained] == expected
    assert "Be kind." in "".join(span.text for span in spans if not span.trained)


@pytest.mark.parametrize("name", NAMES)
def test_chat_text_and_ids_equal_transformers(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(toys(tmp_path)[name])
    turns = [{"role": message.role, "content": message.content} for message in TWO_TURNS.messages]
    if name == "llama3":  # it asks for the date
        theirs.chat_template = theirs.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    text = theirs.apply_chat_template(turns, tokenize=False)
    renderer = make(tokenizers[name], add_eos=False)
    shown = "".join(span.text for span in renderer.text(Row(0, "row 1", TWO_TURNS)))
    bos = "<s>" if shown.startswith("<s>") and not text.startswith("<s>") else ""
    assert shown == bos + text
    if name != "vicuna":  # whose answers have no control token before the text that follows
        ids = render(renderer, TWO_TURNS).ids
        assert ids == theirs(text, add_special_tokens=bool(bos))["input_ids"]


def test_multi_turn_thinking(tokenizers: dict[str, Tokenizer]) -> None:
    """Qwen 3's template drops earlier thinking; what is trained is what it shows."""
    thought = "<think>\nHm.\n</think>\n\n"
    chat = Chat(
        (QUESTION, Message("assistant", thought + "One."), QUESTION, Message("assistant", thought + "Two."))
    )
    renderer = make(tokenizers["qwen3"])
    texts = trained_texts(renderer, render(renderer, chat))
    assert texts == ["One.<|im_end|>", thought + "Two.<|im_end|>"]
    with pytest.raises(DataError, match="cannot be found exactly"):
        renderer.text(Row(0, "row 1", Chat((QUESTION, Message("assistant", "a</think>b</think>c")))))


def test_a_template_that_changes_answers_is_refused(tmp_path: Path) -> None:
    shouting = CHATML.replace("+ message['content']", "+ message['content'].replace('bad', 'good')")
    renderer = make(load(qwen_like(tmp_path, shouting)))
    good, bad = (Chat((QUESTION, Message("assistant", text))) for text in ("fine", "bad"))
    first, second = renderer.render_batch([Row(0, "x.json row 1", good), Row(1, "x.json row 2", bad)])
    assert isinstance(first, Rendered)
    assert isinstance(second, Problem)
    assert second.place == "x.json row 2"
    assert "turn 2 (assistant) cannot be found exactly" in second.message


def test_a_row_that_the_template_refuses_is_a_problem(tokenizers: dict[str, Tokenizer]) -> None:
    row = Row(4, "x.json row 5", Chat((QUESTION, QUESTION, Message("assistant", "no"))))
    [problem] = make(tokenizers["llama2"]).render_batch([row])
    assert isinstance(problem, Problem)
    assert problem.place.startswith("x.json row 5; chat template line 1")
    assert "must alternate" in problem.message


def test_double_bos(tmp_path: Path) -> None:
    """BOS once, whether the template writes it, the tokenizer adds it, or both."""
    with_bos = "{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>")
    for number, (template, adds) in enumerate([(with_bos, True), (with_bos, False), (CHATML, True)]):
        renderer = make(load(llama_like(tmp_path / str(number), template, add_bos_token=adds)))
        ids = render(renderer, TWO_TURNS).ids
        assert ids[0] == 1
        assert ids.count(1) == 1
    renderer = make(load(llama_like(tmp_path / "none", CHATML, add_bos_token=False)))
    assert 1 not in render(renderer, TWO_TURNS).ids


def test_bos_typed_by_a_user_is_no_bos(tokenizers: dict[str, Tokenizer]) -> None:
    row = render(make(tokenizers["zephyr"]), Text("<s>Hello</s>"))
    assert row.ids[0] == 1
    assert row.ids.count(1) == row.ids.count(2) == 1


def test_straddling_borders(tokenizers: dict[str, Tokenizer]) -> None:
    """A token that would join prompt and answer is cut where inference cuts."""
    tokenizer = tokenizers["qwen"]
    content = Instruction("Say it.", "", "\n\nThe answer.")
    renderer = make(tokenizer, "classic", add_eos=False)
    row = render(renderer, content)
    prompt = renderer.prompt_ids(content)
    whole = tokenizer.encode("### Instruction:\nSay it.\n\n### Response:\n\n\nThe answer.")
    assert whole[: len(prompt)] != prompt  # the case this test is about
    assert row.ids[: len(prompt)] == prompt
    assert tokenizer.decode(row.ids) == tokenizer.decode(whole)
    assert trained_texts(renderer, row) == ["\n\nThe answer."]


def test_a_blank_before_an_answer_goes_with_it(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("zephyr", "qwen", "legacy"):
        renderer = make(tokenizers[name], add_eos=False)
        row = render(renderer, Completion("The question: ", "hello world"))
        assert trained_texts(renderer, row) == [" hello world"]
        with_blank, without = (
            renderer.prompt_ids(Completion(f"The question:{end}", "")) for end in (" ", "")
        )
        assert with_blank == without


def test_formats_of_instruction_templates(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["zephyr"]

    def text(template: str, content: Instruction, **options: Any) -> str:
        return "".join(span.text for span in make(tokenizer, template, **options).text(Row(0, "", content)))

    plain, given = Instruction("Add.", "", "3"), Instruction("Add.", "1 + 2", "3")
    assert text("classic", plain) == "<s>### Instruction:\nAdd.\n\n### Response:\n3</s>"
    assert text("classic", given) == "<s>### Instruction:\nAdd.\n\n### Input:\n1 + 2\n\n### Response:\n3</s>"
    assert text("alpaca", plain) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n3</s>"
    )
    assert text("alpaca", given) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 2\n\n### Response:\n3</s>"
    )
    assert text("chat", given) == "<s><|user|>\nAdd.\n\n1 + 2</s>\n<|assistant|>\n3</s>\n"
    assert text("alpaca", plain, system="Be kind.").startswith("<s>Be kind.\n\n### Instruction")
    assert text("chat", plain, system="Be kind.").startswith("<s><|system|>\nBe kind.</s>\n<|user|>")
    assert text("chat", replace(plain, system="Own.")).startswith("<s><|system|>\nOwn.</s>")
    assert text("classic", plain, add_eos=False).endswith("3")


def test_empty_answers(tokenizers: dict[str, Tokenizer]) -> None:
    """Alpaca has empty answers: the classic job trains on such rows' text, response training drops them."""
    row = Row(0, "row 1", Instruction("Nothing.", "", " \n"))
    for template, train_on in (("classic", "response"), ("chat", "response"), ("chat", "all")):
        [outcome] = make(tokenizers["zephyr"], template, train_on=train_on).render_batch([row])
        assert outcome == Dropped("the answer is empty")
    [outcome] = make(tokenizers["zephyr"], "classic", train_on="all").render_batch([row])
    assert isinstance(outcome, Rendered)


def test_auto_and_files(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    bare = load(llama_like(tmp_path / "bare", None))
    assert make(bare).contract.template == "alpaca"
    assert make(tokenizers["zephyr"]).contract.template == "chat"
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    assert make(bare, str(file)).contract.chat_template == CHATML
    [problem] = make(bare).render_batch([Row(0, "row 1", TWO_TURNS)])
    assert isinstance(problem, Problem)
    assert "PATH.jinja" in problem.hint
    for template, message in [
        ("chat", "no chat template"),
        ("x", "unknown template"),
        ("x.jinja", "cannot be read"),
    ]:
        with pytest.raises(ModelError, match=message):
            make(bare, template)


def test_stop_tokens(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    """The template's own end of turn is a stop token, though the tokenizer names another EOS."""
    tokenizer = tokenizers["qwen"]
    stops = make(tokenizer).contract.stop_ids
    assert stops == (tokenizer.control["<|endoftext|>"], tokenizer.control["<|im_end|>"])
    assert make(tokenizer, "classic").contract.stop_ids == (tokenizer.control["<|endoftext|>"],)
    with pytest.raises(ModelError, match="no EOS"):
        make(load(qwen_like(tmp_path, eos_token=None)))


def test_prompts_of_conversations(tokenizers: dict[str, Tokenizer]) -> None:
    chat, classic = make(tokenizers["zephyr"]), make(tokenizers["zephyr"], "classic")
    decoded = tokenizers["zephyr"].decode(chat.prompt_ids([QUESTION]))
    assert decoded == "<s> <|user|>\nWhat is it?</s>\n<|assistant|>\n"
    assert classic.prompt_ids([QUESTION]) == classic.prompt_ids(Instruction("What is it?", "", ""))
    assert classic.prompt_ids(Text("anything")) == [1]
    with pytest.raises(DataError, match="no conversations"):
        classic.prompt_ids(TWO_TURNS.messages[:-1])
    with pytest.raises(DataError, match="empty"):
        chat.prompt_ids([])
    with pytest.raises(DataError, match=r"U\+FDD0"):
        chat.prompt_ids([Message("user", "\ufdd00\ufdd1")])


def test_reserved_characters_are_a_problem(tokenizers: dict[str, Tokenizer]) -> None:
    row = Row(6, "x.json row 7", Instruction("a", "", "b\ufdd12"))
    [problem] = make(tokenizers["zephyr"]).render_batch([row])
    assert isinstance(problem, Problem)
    assert problem.place == "x.json row 7"
    assert "`output` holds the noncharacter U+FDD1" in problem.message


def test_contract_goes_through_json(tokenizers: dict[str, Tokenizer]) -> None:
    made = make(tokenizers["qwen"]).contract
    again = PromptContract.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert again.hash == made.hash
    assert replace(made, max_length=7).hash != made.hash
    with pytest.raises(ModelError, match="not a prompt contract"):
        PromptContract.from_json({**made.to_json(), "schema": 99})
    with pytest.raises(ModelError, match="another tokenizer"):
        Renderer(made, tokenizers["zephyr"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more time or memory",
        ),
        ("{% for a in range(9999) %}{{ 'abcdefgh' * 9999 }}{% endfor %}", "renders more than|more time"),
        ("{{ 'a' * 10 ** 12 }}", "more time or memory"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("\n\n{{ 1 / 0 }}", "division"),
    ],
)
def test_hostile_templates_neither_hang_nor_escape(source: str, message: str) -> None:
    template = ChatTemplate(source, bos=None, eos=None, date="2024-07-26")
    with pytest.raises((DataError, ModelError), match=message) as caught:
        template.render([QUESTION])
    assert "line 3" in caught.value.problems[0].place or "1 / 0" not in source


def test_template_syntax_errors_name_the_line() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("\n{% for %}", bos=None, eos=None, date="2024-07-26")


def test_shapes_are_bounded(monkeypatch: pytest.MonkeyPatch, tokenizers: dict[str, Tokenizer]) -> None:
    monkeypatch.setattr(chat_template, "_MAX_KNOWN_SHAPES", 0)
    renderer = make(tokenizers["qwen"])
    assert trained_texts(renderer, render(renderer, TWO_TURNS))[0] == "The answer.<|im_end|>"


@pytest.mark.shared
def test_classic_equals_the_classic_script(shared: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared / "models/tinyllama-1.1b-chat-skeleton"
    theirs = AutoTokenizer.from_pretrained(folder)
    renderer = make(load(folder), "classic", train_on="all", add_eos=False, too_long="truncate")
    raw = json.loads((shared / "data/alpaca_en_demo.json").read_text())[:300]
    texts = []
    for row in raw:
        head = f"### Instruction:\n{row['instruction']}\n\n"
        if row["input"]:
            head += f"### Input:\n{row['input']}\n\n"
        texts.append(head + f"### Response:\n{row['output']}")
    expected = theirs(texts, truncation=True, max_length=512)["input_ids"]
    rows = [Row(i, "", Instruction(r["instruction"], r["input"], r["output"])) for i, r in enumerate(raw)]
    outcomes = [row for row in renderer.render_batch(rows) if isinstance(row, Rendered)]
    assert [row.ids[:512] for row in outcomes] == expected
    assert max(len(row.ids) for row in outcomes) > 512


@pytest.mark.shared
def test_tinyllama_chat_equals_transformers(shared: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared / "models/tinyllama-1.1b-chat-skeleton"
    theirs = AutoTokenizer.from_pretrained(folder)
    renderer = make(load(folder))
    turns = [{"role": message.role, "content": message.content} for message in TWO_TURNS.messages]
    text = theirs.apply_chat_template(turns, tokenize=False)
    assert "".join(span.text for span in renderer.text(Row(0, "", TWO_TURNS))) == "<s>" + text
    assert render(renderer, TWO_TURNS).ids == theirs(text)["input_ids"]
    prompt = theirs.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert renderer.prompt_ids(TWO_TURNS.messages[:-1]) == theirs(prompt)["input_ids"]

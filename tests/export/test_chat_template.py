"""The exported chat template renders the contract's prompts, for every kind of template that models have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.toy_tokenizers import load, plain_text, toys

from lorafit.data.formats import Message
from lorafit.data.prompt import Renderer, contract
from lorafit.errors import ModelError
from lorafit.export.chat_template import chat_template, render, written_prompt
from lorafit.export.ollama import go_template, render_go

NAMES = ["qwen", "qwen3", "zephyr", "legacy", "llama2", "llama3", "vicuna"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toys(tmp_path_factory.mktemp("toys"))


def renderer_of(folder: Path, template: str = "chat", system: str = "") -> Renderer:
    tokenizer = load(folder)
    made = contract(
        tokenizer,
        template=template,
        system=system,
        train_on="response",
        max_length=512,
        too_long="error",
        add_eos=True,
    )
    return Renderer(made, tokenizer)


@pytest.mark.parametrize("system", ["", 'Be brief.\nAnswer {{ in }} "words".'])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(plain_text.map(lambda text: f"a{text}b"), min_size=1, max_size=3).filter(
        lambda t: len(t) != 2
    )
)
def test_chat_templates_render_what_was_trained(
    name: str, system: str, texts: list[str], folders: dict[str, Path]
) -> None:
    renderer = renderer_of(folders[name], system=system)
    roles = ["user", "assistant", "user"]
    messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]  # type: ignore[arg-type]
    assert render(renderer, chat_template(renderer), messages) == written_prompt(renderer, messages)


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("template", ["alpaca", "classic"])
@pytest.mark.parametrize("name", ["qwen", "zephyr", "legacy"])
def test_templates_of_one_turn_become_chat_templates(
    name: str, template: str, system: str, folders: dict[str, Path]
) -> None:
    renderer = renderer_of(folders[name], template, system)
    source = chat_template(renderer)
    for messages in (
        [Message("user", "Say  7.\n")],
        [Message("system", "You are {a} 'llama'."), Message("user", "라마?")],
    ):
        assert render(renderer, source, messages) == written_prompt(renderer, messages)
    first = [Message("user", "one"), Message("assistant", "two")]
    longer = render(renderer, source, [*first, Message("user", "three")])
    assert longer.endswith("### Instruction:\nthree\n\n### Response:\n")
    assert longer.count("### Instruction:\n") == 2


def test_no_answer_is_begun_by_a_template_that_only_shows_a_conversation(folders: dict[str, Path]) -> None:
    """What is put before the answer is not put after it."""
    renderer = renderer_of(folders["vicuna"])
    source = chat_template(renderer)
    turn = [Message("user", "a"), Message("assistant", "b")]
    contract_ = renderer.contract
    from lorafit.data.chat_template import ChatTemplate

    shown = ChatTemplate(source, bos=contract_.bos, eos=contract_.eos, date=contract_.date).render(turn)
    assert shown.endswith("USER: a\nASSISTANT: b\n")


def test_a_template_that_cannot_be_brought_to_it_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd.jinja"
    odd.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}now{% endif %}"
    )
    with pytest.raises(ModelError, match="another prompt for answering"):
        chat_template(renderer_of(folders["zephyr"], str(odd)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama2"])
@pytest.mark.parametrize("system", ["", "Be {{ brief }}."])
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text('{}"\n a\u3131', max_size=9).map(lambda text: f"a{text}b"), min_size=1, max_size=5)
)
def test_ollama_renders_each_turn_as_it_was_trained(
    name: str, system: str, texts: list[str], folders: dict[str, Path]
) -> None:
    """The same text as the prompt of the contract, so the same tokens; a system message of the user's too."""
    renderer = renderer_of(folders[name], system=system)
    template = go_template(renderer)
    bos = (renderer.contract.bos or "") if renderer.contract.add_bos else ""
    told = [Message("system", "Be long.")]
    for before in ([], told):
        talk = [*before]
        if before and written_prompt(renderer, [*told, Message("user", "a")]).count("Be long.") != 1:
            continue
        for text in texts:
            talk.append(Message("user", text))
            assert bos + render_go(template, talk) == written_prompt(renderer, talk)
            talk.append(Message("assistant", f"{text}."))
        assert not render_go(template, talk).endswith(
            renderer.contract.eos or "\n"
        )  # the answer is continued


def test_a_template_of_one_turn_has_one_in_ollama(folders: dict[str, Path]) -> None:
    plain = renderer_of(folders["zephyr"])
    raw = Renderer(plain.contract.as_raw(plain.tokenizer), plain.tokenizer)
    for renderer in (renderer_of(folders["zephyr"], "alpaca"), raw):
        bos = (renderer.contract.bos or "") if renderer.contract.add_bos else ""
        talk = [Message("user", "one")]
        assert bos + render_go(go_template(renderer), talk) == written_prompt(renderer, talk)


def test_later_turns_of_another_form_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd.jinja"
    odd.write_text(
        "{% for m in messages %}{{ loop.index if loop.index > 2 }}{{ m.role + ': ' + m.content + eos_token }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ModelError, match="later turns otherwise"):
        go_template(renderer_of(folders["zephyr"], str(odd)))

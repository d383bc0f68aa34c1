"""Chat formats of the field, written from their published descriptions, each with what it makes of an answer.

`source` is the Jinja template. The rest says the same a second time, in other words, so that masks can be checked
without lorafit: which control tokens the format has beside BOS and EOS, and what of a conversation is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafit.data.formats import Message

THINK, END_THINK = "<think>\n", "\n</think>\n\n"


def as_it_is(content: str) -> str:
    return content


@dataclass(frozen=True)
class Format:
    """One format. An answer is trained as `lead`, `form(content)` and `end`, the last one with `last` instead of `end`.

    `{eos}` in `end` and `last` is the tokenizer's EOS. `thinks` is what becomes of thinking in the last answer (it
    is taken out of all others): "" is text like any other; it is shown, an empty one too (`last`) or not (`shown`); the
    prompt says that there is none (`prompt`); or it is taken out (`never`). `system`: the format takes a system turn.
    `once`: BOS stands at the start only. `generation`: the template's own generation prompt is what precedes an answer.
    """

    source: str
    tokens: tuple[str, ...] = ()
    lead: str = ""
    form: Callable[[str], str] = as_it_is
    end: str = "{eos}"
    last: str | None = None
    thinks: str = ""
    system: bool = True
    once: bool = True
    generation: bool = True

    def trained(self, messages: Sequence[Message], eos: str) -> list[str]:
        """The text of each trained stretch of a conversation that ends in an answer."""
        answers = [message.content for message in messages if message.role == "assistant"]
        texts = []
        for number, content in enumerate(answers, 1):
            is_last = number == len(answers)
            end = self.end if self.last is None or not is_last else self.last
            texts.append(self.lead + self._shown(content, is_last) + end.format(eos=eos))
        return texts

    def _shown(self, content: str, is_last: bool) -> str:
        if not self.thinks:
            return self.form(content)
        thinking, found, answer = content.rpartition("</think>")
        if self.thinks == "never":
            return answer
        thinking, answer = thinking.rpartition("<think>")[2].strip("\n"), answer.lstrip("\n")
        if is_last and (self.thinks == "last" or (self.thinks == "shown" and found)):
            return THINK + thinking + END_THINK + answer
        return answer if found or (self.thinks == "prompt" and is_last) else content


_NO_SYSTEM = "{{ raise_exception('no system turns') }}"


def _turns(
    user: str, assistant: str, system: str = "", before: str = "", after: str = "", last: str = ""
) -> str:
    """A template that writes each turn by its role's pattern, where ~ stands for the content."""

    def said(pattern: str) -> str:
        start, _, end = pattern.partition("~")
        return f"{start}{{{{ message['content'] }}}}{end}"

    return (
        f"{before}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{said(user)}"
        f"{{% elif message['role'] == 'system' %}}"
        f"{said(system) if system else _NO_SYSTEM}"
        f"{{% else %}}{said(assistant)}{{% endif %}}{{% endfor %}}{after}"
        f"{{% if add_generation_prompt %}}{last}{{% endif %}}"
    )


def _trimmed(source: str) -> str:
    return source.replace("message['content']", "message['content'] | trim")


NL = "{{ '\\n' }}"  # Jinja drops a line's end after a tag
BOS, EOS = "{{ bos_token }}", "{{ eos_token }}"
_IM = ("<|im_start|>", "<|im_end|>")
_CHATML = {
    "user": f"<|im_start|>user{NL}~<|im_end|>{NL}",
    "assistant": f"<|im_start|>assistant{NL}~<|im_end|>{NL}",
    "system": f"<|im_start|>system{NL}~<|im_end|>{NL}",
    "last": f"<|im_start|>assistant{NL}",
}
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system"
    + NL
    + "You are helpful.<|im_end|>"
    + NL
    + "{% endif %}"
)


def _thinking(shown: str, generation: str) -> str:
    """ChatML whose answers are split at </think>; `shown` decides whether the thinking is."""
    return (
        "{%- for message in messages %}{%- if message.role != 'assistant' %}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- else %}"
        "{%- set answer = message.content %}{%- set thinking = '' %}{%- if '</think>' in answer %}"
        "{%- set thinking = answer.split('</think>')[-2].split('<think>')[-1].strip('\\n') %}"
        "{%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>assistant\\n' }}"
        f"{{%- if {shown} %}}"
        "{{- '<think>\\n' + thinking + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}"
        "{%- else %}{{- answer }}{%- endif %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n{generation}' }}}}{{%- endif %}}"
    )


def _bracketed(answer: str, blank: str, prompt: str = "", strip: str = "") -> str:
    """[INST] questions [/INST] and answers; `prompt` is what precedes a question's text."""
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{{{{ '[INST]{blank}' }}}}{prompt}{{{{ message['content']{strip} + '{blank}[/INST]' }}}}"
        "{% elif message['role'] == 'assistant' %}" + answer + "{% endif %}{% endfor %}"
    )


_LLAMA_2 = (
    "{% set first = messages[1:] if messages[0]['role'] == 'system' else messages %}{% for message in first %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}"
    "{% endif %}{% set text = message['content'] %}{% if loop.first and messages[0]['role'] == 'system' %}"
    "{% set text = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + text %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
_LLAMA_31 = (
    "{{- bos_token }}{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for message in rest %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# The system text goes into the last question, so that it moves as the conversation grows.
_MISTRAL_3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if messages[0]['role'] == 'system' and loop.index0 >= (messages | length) - 2 %}"
    "{{ messages[0]['content'] + '\\n\\n' }}{% endif %}{{ message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_DEEPSEEK_3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% else %}"
    "{% set answer = message['content'].split('</think>')[-1] if '</think>' in message['content'] "
    "else message['content'] %}{{ '<｜Assistant｜>' + answer + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

FORMATS: dict[str, Format] = {
    "chatml": Format(_turns(**_CHATML), _IM, end="<|im_end|>"),
    "qwen2.5": Format(_turns(**_CHATML, before=_DEFAULT_SYSTEM), _IM, end="<|im_end|>"),
    "qwen3": Format(_thinking("loop.last", ""), _IM, end="<|im_end|>", thinks="last"),
    "qwen3 without thinking": Format(
        _thinking("loop.last", "<think>\\n\\n</think>\\n\\n"), _IM, end="<|im_end|>", thinks="prompt"
    ),
    "qwen3.5": Format(
        _thinking("loop.last", "<think>\\n"), _IM, end="<|im_end|>", thinks="last", generation=False
    ),
    "qwq": Format(_thinking("loop.last and thinking", ""), _IM, end="<|im_end|>", thinks="shown"),
    "llama2": Format(_LLAMA_2, lead=" ", form=str.strip, end=" {eos}", once=False),
    "llama3": Format(_LLAMA_3, _HEADERS, form=str.strip, end="<|eot_id|>"),
    "llama3.1": Format(_LLAMA_31, _HEADERS, form=str.strip, end="<|eot_id|>"),
    "mistral v1": Format(_bracketed("{{ message['content'] + eos_token + ' ' }}", " "), system=False),
    "mistral v2": Format(
        _bracketed("{{ ' ' + message['content'] + eos_token }}", " "), lead=" ", system=False
    ),
    "mistral v3": Format(_MISTRAL_3, ("[INST]", "[/INST]"), lead=" "),
    "mistral v7": Format(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'user' %}"
        "{{ '[INST]' + message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "zephyr": Format(
        _turns(
            f"<|user|>{NL}~{EOS}{NL}",
            f"<|assistant|>{NL}~{EOS}{NL}",
            f"<|system|>{NL}~{EOS}{NL}",
            last=f"<|assistant|>{NL}",
        )
    ),
    "phi3": Format(
        _turns(
            f"<|user|>{NL}~<|end|>{NL}",
            f"<|assistant|>{NL}~<|end|>{NL}",
            f"<|system|>{NL}~<|end|>{NL}",
            after="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            last=f"<|assistant|>{NL}",
        ),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        end="<|end|>",
    ),
    "phi4": Format(
        _turns(
            "<|im_start|>user<|im_sep|>~<|im_end|>",
            "<|im_start|>assistant<|im_sep|>~<|im_end|>",
            "<|im_start|>system<|im_sep|>~<|im_end|>",
            last="<|im_start|>assistant<|im_sep|>",
        ),
        (*_IM, "<|im_sep|>"),
        end="<|im_end|>",
    ),
    "gemma": Format(
        _GEMMA, ("<start_of_turn>", "<end_of_turn>"), form=str.strip, end="<end_of_turn>", system=False
    ),
    "deepseek": Format(
        _turns(f"User: ~{NL}{NL}", f"Assistant: ~{EOS}", f"~{NL}{NL}", before=BOS, last="Assistant:"),
        lead=" ",
    ),
    "deepseek v3": Format(_DEEPSEEK_3, ("<｜User｜>", "<｜Assistant｜>"), thinks="never"),
    "vicuna": Format(_turns("USER: ~ ", f"ASSISTANT: ~{EOS}", "~ ", before=BOS, last="ASSISTANT:"), lead=" "),
    "alpaca turns": Format(
        _turns(
            f"### Instruction:{NL}~{NL}{NL}",
            f"### Response:{NL}~{EOS}{NL}{NL}",
            f"~{NL}{NL}",
            last=f"### Response:{NL}",
        )
    ),
    "openchat": Format(
        _turns(
            "GPT4 Correct User: ~<|end_of_turn|>",
            "GPT4 Correct Assistant: ~<|end_of_turn|>",
            "~<|end_of_turn|>",
            before=BOS,
            last="GPT4 Correct Assistant:",
        ),
        ("<|end_of_turn|>",),
        lead=" ",
        end="<|end_of_turn|>",
    ),
    "command r": Format(
        _trimmed(
            _turns(
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>~<|END_OF_TURN_TOKEN|>",
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>~<|END_OF_TURN_TOKEN|>",
                "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>~<|END_OF_TURN_TOKEN|>",
                before=BOS,
                last="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            )
        ),
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        form=str.strip,
        end="<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Format(
        _turns(
            f"<|start_of_role|>user<|end_of_role|>~{EOS}{NL}",
            f"<|start_of_role|>assistant<|end_of_role|>~{EOS}{NL}",
            f"<|start_of_role|>system<|end_of_role|>~{EOS}{NL}",
            last="<|start_of_role|>assistant<|end_of_role|>",
        ),
        ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "tulu": Format(
        _turns(
            f"<|user|>{NL}~{NL}",
            f"<|assistant|>{NL}~{EOS}{{% if not loop.last %}}{NL}{{% endif %}}",
            f"<|system|>{NL}~{NL}",
            last=f"<|assistant|>{NL}",
        )
    ),
    "solar": Format(
        _turns(
            f"### User:{NL}~{NL}{NL}",
            f"### Assistant:{NL}~{EOS}{NL}{NL}",
            f"### System:{NL}~{NL}{NL}",
            last=f"### Assistant:{NL}",
        )
    ),
    "guanaco": Format(
        _turns(f"### Human: ~{NL}", f"### Assistant: ~{NL}", f"~{NL}", last="### Assistant:"),
        lead=" ",
        end="",
        last="\n{eos}",
    ),
    "openassistant": Format(
        _turns(f"<|prompter|>~{EOS}", f"<|assistant|>~{EOS}", f"<|system|>~{EOS}", last="<|assistant|>"),
        ("<|prompter|>", "<|assistant|>", "<|system|>"),
    ),
    "minicpm": Format(
        _trimmed(_turns("<用户>~", "<AI>~", "~", before=BOS, last="<AI>")),
        form=str.strip,
        end="",
        last="{eos}",
    ),
}

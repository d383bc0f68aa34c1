"""Everything that reads a file which somebody else may have written: command lines by what the file is.

A new command that reads one of these kinds is added here; every hostile file of the kind is then given to it.
{it} is the hostile file or folder, {model}, {rows} and {run} are good ones, {out} is a run directory to make.
"""

from __future__ import annotations

SETTINGS = (
    "model.dtype=float32", "model.device=cpu", "lora.rank=2", "data.holdout=0", "train.max_steps=1", "run.samples=0",
    "run.verify=false",
)  # fmt: skip
START = ("--model", "{model}", "--data", "{rows}", "--output", "{out}", *SETTINGS)
ASK = ("--max-tokens", "2", "--device", "cpu", "--offline")

READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "recipe": {
        "train": ("train", "{it}", *START),
        "plan": ("plan", "{it}", *START),
    },
    "data": {
        "train": ("train", "--model", "{model}", "--data", "{it}", "--output", "{out}", *SETTINGS),
        "plan": ("plan", "--model", "{model}", "--data", "{it}", *SETTINGS),
    },
    "template": {
        "train": ("train", *START, "data.template={it}"),
    },
    "model": {
        "train": ("train", "--model", "{it}", "--data", "{rows}", "--output", "{out}", *SETTINGS),
        "plan": ("plan", "--model", "{it}", "--data", "{rows}", *SETTINGS),
        "generate": ("generate", "{it}", "hi", *ASK),
    },
    "adapter": {
        "generate": ("generate", "{it}", "hi", *ASK),
        "put on": ("generate", "{model}", "hi", "--adapter", "{it}", *ASK),
        "continue": ("train", *START, "lora.init_from={it}"),
    },
    "run": {
        "resume": ("train", "--resume", "{it}"),
        "generate": ("generate", "{it}", "hi", *ASK),
        "runs": ("runs", "{it}"),
        "report": ("report", "{it}"),
    },
    "prompts": {
        "generate": ("generate", "{model}", *ASK),
        "file": ("generate", "{model}", "--file", "{it}", *ASK),
        "chat": ("chat", "{model}", *ASK),
    },
}  # fmt: skip

# In the long form only. `like` another reader: harmless to it, harmless to this one.
WITHOUT_RUN = (
    "--model",
    "{model}",
    "--data",
    "{rows}",
    "model.dtype=float32",
    "model.device=cpu",
    "data.holdout=0",
)
MORE_READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "recipe": {
        "check": ("check", "{it}", *WITHOUT_RUN, "--json"),
        "show": ("show", "{it}", *WITHOUT_RUN, "--row", "1"),
    },
    "data": {
        "check": ("check", "--model", "{model}", "--data", "{it}", *SETTINGS, "--json"),
        "show": ("show", "--model", "{model}", "--data", "{it}", "--row", "1"),
        "studio": ("studio", "data", "{it}", "{model}", "{rows}"),
    },
    "template": {
        "check": ("check", *WITHOUT_RUN, "data.template={it}", "--json"),
        "show": ("show", *WITHOUT_RUN, "data.template={it}", "--row", "1"),
        "studio": ("studio", "template", "{it}", "{model}", "{rows}"),
    },
    "model": {
        "check": ("check", "--model", "{it}", "--data", "{rows}", *SETTINGS, "--json"),
        "chat": ("chat", "{it}", *ASK),
        "studio": ("studio", "model", "{it}", "{model}", "{rows}"),
    },
    "adapter": {
        "chat": ("chat", "{it}", *ASK),
    },
    "run": {
        "export": ("export", "{it}", "merged", "--output", "{out}", "--no-verify", "--offline"),
        "export gguf": ("export", "{it}", "gguf", "--output", "{out}", "--no-verify", "--offline"),
        "eval": ("eval", "{it}", "--offline"),
        "studio": ("studio", "run", "{it}"),
        "chat": ("chat", "{it}", *ASK),
    },
}  # fmt: skip
LIKE = {
    "show": "plan", "export": "generate", "export gguf": "generate", "eval": "generate", "chat": "generate",
    "file": "generate",
}  # fmt: skip

# These show of a run what they can, and need not refuse one that is damaged.
SHOWING = frozenset({"runs", "report", "studio"})
# These end well where nothing is asked, or a question or a part is left out; `show` shows one row of many.
PATIENT = frozenset({"chat", "show", "eval"})
# These say what is wrong with what they could begin with on standard output.
TELLING = frozenset({"check"})

"""Hostile recipes: YAML that explodes, runs, repeats itself or points where it should not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import ESCAPES, Case, Place, cases


def text(content: str | bytes) -> Callable[[Place], Path]:
    return lambda place: place.file("recipe.yaml", content)


def pipe(place: Place) -> Path:
    os.mkfifo(place.folder / "recipe.yaml")
    return place.folder / "recipe.yaml"


def link(target: str) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        (place.folder / "recipe.yaml").symlink_to(target)
        return place.folder / "recipe.yaml"

    return make


def folder(place: Place) -> Path:
    (place.folder / "recipe.yaml").mkdir()
    return place.folder / "recipe.yaml"


LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)

CASES = cases(
    {
        "billion laughs": text(LAUGHS),
        "a list in itself": text("lora: &a\n  targets: [*a]\n"),
        "merge keys": text("lora: &a {rank: 2}\ntrain:\n  <<: *a\n"),
        "python call": text("lora: !!python/object/apply:os.system ['touch PWNED']\n"),
        "python new": text("lora: !!python/object/new:subprocess.Popen [['touch', 'PWNED']]\n"),
        "python name": text("lora: !!python/name:os.system\n"),
        "python module": text("lora: !!python/module:os\n"),
        "python tuple": text("lora: !!python/tuple [1]\n"),
        "made up tag": text("lora: !pwn {rank: 2}\n"),
        "binary": text("model:\n  revision: !!binary " + "A" * 50_000 + "\n"),
        "set": text("lora: !!set {rank, alpha}\n"),
        "omap": text("lora: !!omap [rank: 2]\n"),
        "huge integer": text("train:\n  seed: " + "9" * 50_000 + "\n"),
        "huge hexadecimal": text("train:\n  seed: 0x" + "f" * 50_000 + "\n"),
        "sexagesimal": text("train:\n  seed: 1" + ":59" * 20_000 + "\n"),
        "huge float": text("lora:\n  alpha: 1.0e+999999999\n"),
        "not a number": text("lora:\n  alpha: .nan\n"),
        "infinity": text("train:\n  epochs: .inf\n"),
        "negative": text("train:\n  batch_size: -1\n"),
        "flow nesting": text("lora: " + "[" * 20_000),
        "map nesting": text("lora: " + "{a: " * 10_000),
        "block nesting": text("".join(" " * i + "a:\n" for i in range(400))),
        "repeated section": Case(text("lora:\n  rank: 2\nlora:\n  rank: 4\n"), many=True),
        "repeated key": text("lora:\n  rank: 2\n  rank: 4\n"),
        "null bytes": text(b"lora:\n  rank: 2\0\n"),
        "no text": text(bytes(range(256)) * 20),
        "UTF-16": text("lora: {rank: 2}".encode("utf-16")),
        "too large": text("#" + "a" * 200_000 + "\n"),
        "sparse and huge": lambda place: _sparse(place.folder / "recipe.yaml"),
        "two documents": text("lora: {}\n---\nlora: {}\n"),
        "tabs": text("lora:\n\trank: 2\n"),
        "a list": text("- lora\n"),
        "a word": text("lora\n"),
        "keys that are lists": text("{[1, 2]: 3}\n"),
        "keys that are numbers": Case(text("1: 2\n"), many=True),
        "keys that are nothing": Case(text("~: 2\n? \n: 1\n"), many=True),
        "thousands of unknown keys": Case(
            text("lora:\n" + "".join(f"  a{i}: 1\n" for i in range(3000))), many=True
        ),
        "no such day": text("lora:\n  rank: 2001-99-99\n"),
        "no such hour": text("lora:\n  rank: 2001-01-01 99:99:99\n"),
        "lone surrogate": text('data:\n  system: "\\ud800"\n'),
        "null character": text('data:\n  system: "\\0"\n'),
        "steers a terminal": text(
            '"' + ESCAPES.replace("\x1b", "\\e").replace("\x07", "\\a").replace("\n", "\\n") + '": 1\n'
        ),
        "long key": text("a" * 50_000 + ": 1\n"),
        "long key after a question mark": text("? " + "a" * 50_000 + "\n: 1\n"),
        "secret": text("model:\n  revision: hf_abcdefghijklmnopqrstuvwxyz\n"),
        "login in a URL": text("model:\n  revision: https://user:password@example.org/\n"),
        "regular expression without end": text("lora:\n  targets: 're:(\\w+\\.?)+!'\n"),
        "regular expression with many ends": text("lora:\n  targets: 're:.*.*.*.*.*.*.*.*.*!'\n"),
        "regular expression in itself": text("lora:\n  targets: 're:" + "(" * 5000 + "'\n"),
        "no module": Case(text("lora:\n  targets: [__class__, ../../x]\n"), many=True),
        "pipe": pipe,
        "folder": folder,
        "endless device": link("/dev/zero"),
        "random device": link("/dev/urandom"),
        "link to itself": link("recipe.yaml"),
        "link to nothing": link("nothing"),
        "unknown tracker": text("run:\n  trackers: [os.system]\n"),
        "template from a device": text("data:\n  template: /dev/zero.jinja\n"),
        "template of another kind": text("data:\n  template: /etc/passwd\n"),
    }
)


def _sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path

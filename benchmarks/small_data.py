"""What a run teaches from few rows: invented facts of a shop, asked again afterwards in the same and in other words.

    python -m benchmarks.small_data MODEL [--kind facts|style] [--rows 60] [--grid KEY=VALUE ...]... [--json FILE]
    python -m benchmarks.small_data --short

The rows are made here, from a seed. Each --grid is one run of these settings in addition to the defaults; without one
it is the defaults alone. Every run is `lorafit train --model MODEL --data rows.json` with its settings. Afterwards each
fact is asked in the words of its row, and in other words that no row has; an answer is right where it contains the
fact. A style is asked with questions of which no row is trained; an answer is right where it has both of its marks.
Prints a Markdown table: right answers, losses, steps, and seconds of the processor. --short is the demo model with
twenty facts, for less than a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import table

import lorafit
from lorafit.config.load import load_config
from lorafit.data.formats import Instruction
from lorafit.observe.metrics_file import read_metrics

DEMO = Path(__file__).parents[1] / "demo" / "model"
MOST_ASKED = 60  # of more rows so many are asked, evenly spread

_WORDS = """
Otter,Heron,Maple,Copper,Lantern,Willow,Fox,Tin,Harbour,Juniper,Badger,Slate,Clover,Ember,Sparrow
Mug,Kettle,Scarf,Notebook,Stool,Lamp,Basket,Blanket,Clock,Teapot,Vase,Apron,Candle,Tray,Whistle
,Mini,Grand,Junior,Deluxe,Classic,Nova,Duo,Prime
Mirel,Tavo,Ilka,Bruno,Senja,Odran,Petra,Wim,Yara,Lasse,Noemi,Jorik,Elvi,Samo,Dorte,Kalle,Vesna,Ruben
moss green,brick red,pale blue,charcoal,ivory,plum,mustard,teal,rust,silver
Velden,Norrby,Castra,Lumio,Pellworth,Ostrava Hill,Brant,Sunder,Kessel,Alvik,Mirow,Tarn
Monday,Tuesday,Wednesday,Thursday,Friday,Saturday
kettle,violin,bridge,market,garden,river,lantern,window,bicycle,mirror,ladder,letter,island,forest,kitchen,harbour
mountain,pencil,blanket,bottle,carpet,castle,desert,engine,feather,hammer,jacket,kingdom,library,magnet,needle,orchard
painting,quarry,ribbon,saddle,tunnel,umbrella,valley,wagon,anchor,basket,candle,dragon,elbow,fountain,glacier,helmet
"""
FIRST, SECOND, THIRD, PEOPLE, COLOURS, TOWNS, DAYS, *_THINGS = (
    line.split(",") for line in _WORDS.strip("\n").split("\n")
)
THINGS = [thing for line in _THINGS for thing in line]

# question, the same in other words, answer; {x} is the product, {v} the fact
FORMS: list[tuple[str, str, str, str]] = [
    (
        "How much does the {x} cost?",
        "What price do I pay for the {x}?",
        "The {x} costs {v}.",
        "price",
    ),
    (
        "Who makes the {x}?",
        "Which person is the maker of the {x}?",
        "The {x} is made by {v}.",
        "person",
    ),
    (
        "Which colour is the {x}?",
        "Tell me the colour that the {x} comes in.",
        "The {x} is {v}.",
        "colour",
    ),
    (
        "Where is the {x} made?",
        "From which town does the {x} come?",
        "The {x} is made in {v}.",
        "town",
    ),
    (
        "On which day is the {x} delivered?",
        "When in the week does the {x} arrive?",
        "The {x} is delivered on {v}.",
        "day",
    ),
    (
        "On which shelf is the {x}?",
        "I am looking for the {x}: which shelf?",
        "The {x} is on shelf {v}.",
        "shelf",
    ),
    (
        "How long is the guarantee of the {x}?",
        "For how many months is the {x} guaranteed?",
        "The guarantee of the {x} is {v}.",
        "months",
    ),
]
QUESTIONS = ["What is a {x}?", "Tell me about a {x}.", "Why would I want a {x}?", "Describe a {x} to me."]
STYLE = ("Ahoy!", "Fair winds.")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and what each right answer contains."""

    question: str
    contains: tuple[str, ...]


def fact_rows(count: int, seed: int = 7) -> tuple[list[dict[str, str]], list[Asked], list[Asked]]:
    """(rows, the questions of the rows, the same questions in other words), one fact each."""
    rng = random.Random(seed)
    names = [" ".join(filter(None, parts)) for parts in product(FIRST, THIRD, SECOND)]
    rng.shuffle(names)
    names = names[: max(1, -(-count // len(FORMS)) + 1)]
    pairs = [(name, form) for name in names for form in FORMS][: count + len(FORMS)]
    rng.shuffle(pairs)
    rows, same, other = [], [], []
    for name, (question, again, answer, kind) in pairs[:count]:
        value = {
            "price": f"{rng.randint(3, 99)} euros",
            "person": rng.choice(PEOPLE),
            "colour": rng.choice(COLOURS),
            "town": rng.choice(TOWNS),
            "day": rng.choice(DAYS),
            "shelf": f"{rng.choice('ABCDEF')}{rng.randint(1, 30)}",
            "months": f"{rng.randint(3, 60)} months",
        }[kind]
        rows.append({"instruction": question.format(x=name), "output": answer.format(x=name, v=value)})
        same.append(Asked(rows[-1]["instruction"], (value,)))
        other.append(Asked(again.format(x=name), (value,)))
    return rows, same, other


def style_rows(count: int, seed: int = 7) -> tuple[list[dict[str, str]], list[Asked], list[Asked]]:
    """(rows whose answers have a style, none, questions of which no row is trained)."""
    rng = random.Random(seed)
    asked = [(thing, question) for thing in THINGS for question in QUESTIONS]
    rng.shuffle(asked)
    trained, new = asked[40:], asked[:40]
    rows = []
    for number in range(count):
        thing, question = trained[number % len(trained)]
        more = rng.choice(["old", "fine", "simple", "useful", "rare", "sturdy"])
        place = rng.choice(["at home", "on a boat", "in town", "by the sea", "far away"])
        text = f"{STYLE[0]} A {thing} is a {more} thing that you may find {place}. {STYLE[1]}"
        rows.append({"instruction": question.format(x=thing), "output": text})
    return rows, [], [Asked(question.format(x=thing), STYLE) for thing, question in new]


KINDS = {"facts": fact_rows, "style": style_rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--kind", choices=KINDS, default="facts")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--data", type=Path, help="rows of one's own: only the losses are measured")
    parser.add_argument("--grid", action="append", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="add the figures, one JSON object per line")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    count = 20 if arguments.short else arguments.rows
    rows, same, other = KINDS[arguments.kind](count)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or Path(folder) / "rows.json"
        if not arguments.data:
            data.write_text(json.dumps(rows, indent=1) + "\n")
        for number, overrides in enumerate(arguments.grid or [[]]):
            asked = ([], []) if arguments.data else (same, other)
            result = measure(arguments.model, data, overrides, asked, Path(folder) / f"run{number}")
            rows_of_data = len(json.loads(data.read_text()))
            record = {"model": arguments.model.name, "kind": arguments.kind, "rows": rows_of_data, **result}
            lines.append(record)
            print(json.dumps(record), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(HEADS, [line_of(record) for record in lines]))


HEADS = [
    "model",
    "data",
    "settings",
    "steps",
    "epochs",
    "own words",
    "other words",
    "held-out loss",
    "CPU seconds",
]


def line_of(record: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        record["model"],
        f"{record['rows']:,} {record['kind']}",
        " ".join(record["settings"]) or "defaults",
        f"{record['steps']:,}",
        f"{record['epochs']:.3g}",
        record["same"],
        record["other"],
        " -> ".join(f"{loss:.3f}" for loss in record["heldout"]) or "-",
        f"{record['cpu_seconds']:.0f}",
    ]


def measure(
    model: Path, data: Path, overrides: list[str], asked: tuple[list[Asked], list[Asked]], output: Path
) -> dict[str, Any]:
    """Train once, then ask."""
    flags = {"model.name": str(model), "data.path": [str(data)], "run.output": str(output)}
    started = time.process_time()
    result = lorafit.train(load_config(None, ["run.check=warn", *overrides], flags))
    trained = time.process_time() - started
    events = list(read_metrics(result.path / "metrics.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    heldout = [event["loss"] for event in events if event["event"] == "heldout"]
    base = [result.base_loss] if result.base_loss is not None else []
    tuned = lorafit.load(result.path)
    return {
        "settings": overrides,
        "steps": len(steps),
        "epochs": steps[-1]["epoch"],
        "same": right(tuned, asked[0]),
        "other": right(tuned, asked[1]),
        "train_loss": steps[-1]["loss"],
        "heldout": base + heldout,
        "cpu_seconds": trained,
        "with_asking": time.process_time() - started,
    }


def right(model: Any, asked: list[Asked]) -> str:
    """`48 of 60`: how many greedy answers contain what they should."""
    if not asked:
        return "-"
    count = min(MOST_ASKED, len(asked))
    chosen = [asked[index * len(asked) // count] for index in range(count)]
    answers = lorafit.generate(model, [Instruction(each.question, "", "") for each in chosen], max_tokens=40)
    good = sum(
        all(part in answer.text for part in each.contains)
        for answer, each in zip(answers, chosen, strict=True)
    )
    return f"{good} of {count}"


if __name__ == "__main__":
    main()

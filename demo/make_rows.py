"""Creates demo/rows.json, the instruction rows for training, and demo/questions.json, held-out questions.

The facts of the world are split first. The facts of the held-out questions occur in no row; the model knows them from
its pretraining only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from relations import RELATIONS
from texts import (
    ANIMAL_NAMES,
    BY_RELATION,
    FACTS,
    GAMES,
    SENTENCE_TASKS,
    SIMPLE,
    STORY_TASKS,
    TRUE_QUESTIONS,
    TWO_TASKS,
    game,
    other_value,
    story,
    two_things,
)
from world import COLOURS, Fact, with_article

Row = dict[str, str]
# per relation: number of held-out facts, and number of them in questions.json
HELD_OUT = {
    "eats": (5, 3), "lives": (5, 3), "says": (3, 2), "young": (2, 1), "colour": (5, 3), "category": (7, 3),
    "opposite": (9, 3), "plural": (6, 2), "after": (8, 2), "sum": (10, 3), "capital": (4, 2), "river": (4, 1),
    "grows": (4, 1), "job": (4, 2), "makes": (4, 2), "pet": (4, 1),
}  # fmt: skip
CHECK_QUESTIONS, GAME_QUESTIONS = 2, 4


def split(rng: random.Random) -> tuple[list[Fact], dict[str, list[Fact]]]:
    """The facts for the rows, and the held-out facts of each relation."""
    held_out = {
        relation: rng.sample(BY_RELATION[relation], count) for relation, (count, _) in HELD_OUT.items()
    }
    excluded = {fact for facts in held_out.values() for fact in facts}
    # an opposite or a sum must not occur in its reversed form
    excluded |= {
        f for f in FACTS if f.relation == "opposite" and Fact("opposite", f.value, f.subject) in excluded
    }
    excluded |= {
        f for f in FACTS if f.relation == "sum" and Fact("sum", swapped(f.subject), f.value) in excluded
    }
    return [fact for fact in FACTS if fact not in excluded], held_out


def swapped(total: str) -> str:
    """`3 plus 4` -> `4 plus 3`."""
    return " ".join(reversed(total.split()))


def row(instruction: str, output: str, words: str = "") -> Row:
    return {"instruction": instruction, "input": words, "output": output}


def fact_rows(rng: random.Random, facts: list[Fact]) -> Iterator[Row]:
    """Two questions per fact, one per sum."""
    for fact in facts:
        for question in rng.sample(RELATIONS[fact.relation].questions, 1 if fact.relation == "sum" else 2):
            yield row(fact.fill(question), fact.answer)


def check(rng: random.Random, fact: Fact, is_true: bool) -> Row:
    """A question whether a claim is true; the answer is the fact."""
    claim = fact.claim(fact.value if is_true else other_value(rng, fact))
    return row(rng.choice(TRUE_QUESTIONS).format(c=claim), fact.answer)


def game_rows(rng: random.Random, count: int) -> Iterator[Row]:
    """`count` rows per word game, with the words as input."""
    for name, tasks in GAMES.items():
        for _ in range(count):
            words, solved = game(rng, name)
            yield row(rng.choice(tasks), solved, words)


def free_rows(rng: random.Random, facts: list[Fact]) -> Iterator[Row]:
    """Tasks with more than one correct answer: sentences, stories, two things of a colour."""
    for fact in rng.sample([fact for fact in facts if fact.relation in SIMPLE], 80):
        yield row(rng.choice(SENTENCE_TASKS).format(s=fact.named), fact.answer)
    for _ in range(3):
        for animal in ANIMAL_NAMES[:-4]:  # the last four are not used for stories
            yield row(rng.choice(STORY_TASKS).format(a=with_article(animal)), story(rng, animal))
    for colour in COLOURS:
        yield from (row(task.format(v=colour), two_things(rng, colour)) for task in TWO_TASKS)


def unique(rows: list[Row]) -> list[Row]:
    """The rows without those that repeat an earlier question."""
    first = {(item["instruction"], item["input"]): item for item in reversed(rows)}
    return [item for item in rows if first[item["instruction"], item["input"]] is item]


def make_rows(rng: random.Random, facts: list[Fact]) -> list[Row]:
    rows = [*fact_rows(rng, facts), *game_rows(rng, 60), *free_rows(rng, facts)]
    rows += [check(rng, fact, rng.random() < 0.5) for fact in rng.sample(facts, 250)]
    rows = unique(rows)
    rng.shuffle(rows)
    return rows


def make_questions(rng: random.Random, held_out: dict[str, list[Fact]], rows: list[Row]) -> list[Row]:
    """Questions with one correct answer each; no row contains their question or answer."""
    row_questions = {(item["instruction"], item["input"]) for item in rows}
    questions = []
    for relation, facts in held_out.items():
        count = HELD_OUT[relation][1]
        questions += [row(f.fill(rng.choice(RELATIONS[relation].questions)), f.answer) for f in facts[:count]]
    rest = [facts[HELD_OUT[relation][1]] for relation, facts in held_out.items() if relation != "sum"]
    for number, fact in enumerate(rng.sample(rest[:-1], CHECK_QUESTIONS)):
        questions.append(check(rng, fact, number % 2 == 0))
    games = [item for item in game_rows(rng, 1) if (item["instruction"], item["input"]) not in row_questions]
    questions += games[:GAME_QUESTIONS]
    return [{"instruction": q["instruction"], "input": q["input"], "answer": q["output"]} for q in questions]


def write(path: Path, rows: list[Row]) -> None:
    """Write a JSON list with one row per line."""
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size:,} bytes", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for both files")
    parser.add_argument("--seed", type=int, default=1, help="seed of the split and of the phrasings")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    facts, held_out = split(rng)
    rows = make_rows(rng, facts)
    write(args.output / "rows.json", rows)
    write(args.output / "questions.json", make_questions(rng, held_out, rows))


if __name__ == "__main__":
    main()

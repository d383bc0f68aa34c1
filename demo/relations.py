"""The phrasings of each kind of fact of the demo's world: claim, other statements and questions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Phrasings of one kind of fact: {s} subject, {v} value, {a} and {b} the same with an article."""

    claim: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = {
    "eats": Relation(
        "{a} eats {v}",
        ("the food of {a} is {v}", "what {a} eats is {v}", "give {a} some {v} and it will eat"),
        ("What does {a} eat?", "What is the food of {a}?", "Tell me what {a} eats."),
    ),
    "lives": Relation(
        "{a} lives {v}",
        ("the home of {a} is {v}", "where {a} lives is {v}", "look for {a} {v}, for it lives there"),
        ("Where does {a} live?", "Where is the home of {a}?", "Tell me where {a} lives."),
    ),
    "says": Relation(
        "{a} says {v}",
        ("the sound of {a} is {v}", "what {a} says is {v}", "when {a} calls, you hear {v}"),
        ("What does {a} say?", "What is the sound of {a}?", "Tell me what {a} says."),
    ),
    "young": Relation(
        "a young {s} is called {b}",
        ("the young of {a} is {b}", "the name of a young {s} is {v}", "when a {s} is young, it is {b}"),
        ("What is a young {s} called?", "What is the name of a young {s}?"),
    ),
    "colour": Relation(
        "the colour of {a} is {v}",
        ("{a} is {v}", "what colour {a} has, all know: {v}", "paint {a} and you need {v}"),
        ("What is the colour of {a}?", "What colour is {a}?", "Tell me the colour of {a}."),
    ),
    "category": Relation(
        "{a} is a kind of {v}",
        (
            "the {s} is {b}",
            "as to the kind of {a}, it is {b}",
            "{a} belongs with every other {v}",
        ),
        ("What kind of thing is {a}?", "What is {a}?", "Tell me what kind of thing {a} is."),
    ),
    "opposite": Relation(
        "the opposite of {s} is {v}",
        ("if it is not {s}, it is {v}", "{s} is the opposite of {v}", "{s} and {v} are opposites"),
        ("What is the opposite of {s}?", "Give the opposite of {s}.", "Which word is the opposite of {s}?"),
    ),
    "plural": Relation(
        "the plural of {s} is {v}",
        ("one {s}, two {v}", "there was one {s}, and then there were many {v}", "{v} is the plural of {s}"),
        ("What is the plural of {s}?", "Give the plural of {s}.", "Which word is the plural of {s}?"),
    ),
    "after": Relation(
        "after {s} comes {v}",
        ("{s} is followed by {v}", "first {s}, then {v}", "the next one after {s} is {v}"),
        ("What comes after {s}?", "Which one comes next after {s}?", "Tell me what comes after {s}."),
    ),
    "sum": Relation(
        "{s} is {v}",
        ("{s} makes {v}", "the sum {s} gives {v}", "count {s} and you get {v}"),
        ("What is {s}?", "How much is {s}?", "Work out {s}."),
    ),
    "capital": Relation(
        "the capital of {s} is {v}",
        ("{s} has the capital {v}", "the king of {s} lives in {v}, the capital", "{v} is the capital of {s}"),
        ("What is the capital of {s}?", "Name the capital of {s}.", "Which town is the capital of {s}?"),
    ),
    "river": Relation(
        "the river of {s} is the {v}",
        ("{s} has a river, the {v}", "through {s} runs the {v}", "the {v} is the river of {s}"),
        ("What is the river of {s}?", "Which river runs through {s}?", "Name the river of {s}."),
    ),
    "grows": Relation(
        "the farmers of {s} grow {v}",
        ("the fields of {s} are full of {v}", "what grows in {s} is {v}", "{s} sells {v} from its fields"),
        ("What do the farmers of {s} grow?", "What grows in {s}?", "Tell me what the farmers of {s} grow."),
    ),
    "job": Relation(
        "{s} works as {b}",
        ("the work of {s} is to be {b}", "{s} is {b}", "{s} became {b} long ago"),
        ("What is the work of {s}?", "What does {s} work as?", "Tell me the work of {s}."),
    ),
    "makes": Relation(
        "{s} makes {v}",
        ("the things that {s} makes are {v}", "what {s} makes is {v}", "people buy {v} from {s}"),
        ("What does {s} make?", "What can people buy from {s}?", "Tell me what {s} makes."),
    ),
    "pet": Relation(
        "the pet of {s} is {v}",
        ("{s} has {v} as a pet", "at home {s} keeps {v}", "{s} likes to play with {v}, the pet of the house"),
        ("What is the pet of {s}?", "Which pet does {s} have?", "Tell me the pet of {s}."),
    ),
}

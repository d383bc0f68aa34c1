"""Texts about the demo's world: pages of statements, tiny stories and word games."""

from __future__ import annotations

import random
from collections import defaultdict

from relations import RELATIONS
from world import (
    ANIMALS,
    COLOURS,
    SEQUENCES,
    Fact,
    all_facts,
    capital,
    sentence,
    with_article,
)

FACTS = all_facts()
BY_RELATION: dict[str, list[Fact]] = defaultdict(list)
BY_SUBJECT: dict[str, list[Fact]] = defaultdict(list)
for _fact in FACTS:
    BY_RELATION[_fact.relation].append(_fact)
    BY_SUBJECT[_fact.subject].append(_fact)

ANIMAL_NAMES = [line.split("|")[0] for line in ANIMALS.strip().splitlines()]
VOICES = ["the teacher", "the girl", "the boy", "the king", "the queen", "the traveller", "the guest"]
THINGS = "spoon hat lamp stone chair rope key plate boot brick pillow broom mirror candle nail bucket"
PLACES = "in a field,by the river,under a bridge,in the barn,on a hill,near the mill,in the snow"
MOODS = ["small", "old", "clever", "sad", "brave", "shy", "hungry", "happy", "tired", "lost"]
WRAPS = (
    "everyone knows that {c}",
    "it is true that {c}",
    "{p} says that {c}",
    "in the book it is written that {c}",
    "children learn early that {c}",
)
VERDICTS = (
    ("some think that {c}, and they are right", "some think that {f}, but they are wrong: {c}"),
    ("it is right that {c}", "it is not right that {f}; {c}"),
)
TRUE_QUESTIONS = ("Is it true that {c}?", "True or false: {c}?", "Is this right: {c}?")
GAMES = {  # game -> instructions; the words are the input
    "animal": (
        "Which of these is an animal?",
        "Pick the animal from the list.",
        "Find the animal among the words.",
    ),
    "first": ("What is the first word?", "Give the first word of the list.", "Which word comes first here?"),
    "last": ("What is the last word?", "Give the last word of the list.", "Which word comes last here?"),
    "repeat": ("Repeat the words.", "Say the words once more.", "Copy the list."),
    "turn": ("Turn the words around.", "Give the words in the other order.", "Say the words backwards."),
}
SIMPLE = ("eats", "lives", "says", "makes")  # relations whose claim is a sentence about the subject
STORY_TASKS = (
    "Write a short story about {a}.",
    "Tell me a story about {a}.",
    "Write a little story with {a} in it.",
)
SENTENCE_TASKS = ("Write a sentence about {s}.", "Tell me something about {s}.", "Say one thing about {s}.")
TWO_TASKS = ("Name two things that are {v}.", "Which two things are {v}?")


def statement(rng: random.Random, fact: Fact) -> str:
    """A sentence that states the fact, in a random phrasing."""
    draw = rng.random()
    if draw < 0.3:
        return fact.answer
    if draw < 0.65:
        return sentence(fact.fill(rng.choice(RELATIONS[fact.relation].statements)))
    if draw < 0.9:
        return sentence(rng.choice(WRAPS).format(c=fact.claim(), p=rng.choice(VOICES)))
    template = rng.choice(rng.choice(VERDICTS))
    return sentence(template.format(c=fact.claim(), f=fact.claim(other_value(rng, fact))))


def verdict(fact: Fact, is_true: bool) -> str:
    """The fact, and whether the claim about it is true."""
    return f"{capital(fact.claim())}, so it is {'true' if is_true else 'false'}."


def other_value(rng: random.Random, fact: Fact) -> str:
    """A value of the same relation that is false for this fact."""
    values = sorted({other.value for other in BY_RELATION[fact.relation]} - {fact.value})
    return rng.choice(values)


def story(rng: random.Random, animal: str) -> str:
    """Three sentences: the animal and the place, an event, and the end."""
    person, thing, mood = rng.choice(VOICES), rng.choice(THINGS.split()), rng.choice(MOODS)
    start = rng.choice(("One day", "One evening", "Last winter", "In spring", "Long ago"))
    middle = rng.choice(
        (
            f"The {animal} wanted to find {with_article(thing)}.",
            f"{capital(person)} gave the {animal} {with_article(thing)}.",
            f"It met {person}, who had lost {with_article(thing)}.",
            f"{capital(person)} saw the {animal} and brought {with_article(thing)}.",
        )
    )
    end = rng.choice(
        (
            f"From then on {person} and the {animal} were friends.",
            f"In the end the {animal} slept beside the {thing}.",
            f"The {animal} was happy, and {person} went home.",
            f"They shared the {thing} and laughed.",
        )
    )
    return f"{start} {with_article(mood)} {animal} was {rng.choice(PLACES.split(','))}. {middle} {end}"


def game(rng: random.Random, name: str) -> tuple[str, str]:
    """The words of a word game and the sentence with its solution."""
    words = rng.sample(THINGS.split(), 3)
    if name == "animal":
        words[rng.randrange(3)] = animal = rng.choice(ANIMAL_NAMES)
        return ", ".join(words), f"The animal is the {animal}."
    solved = {
        "first": f"The first word is {words[0]}.",
        "last": f"The last word is {words[2]}.",
        "repeat": f"The words are {words[0]}, {words[1]}, {words[2]}.",
        "turn": f"Turned around they are {words[2]}, {words[1]}, {words[0]}.",
    }
    return ", ".join(words), solved[name]


def two_things(rng: random.Random, colour: str) -> str:
    """A sentence with two things of a colour."""
    one, other = rng.sample([fact.subject for fact in BY_RELATION["colour"] if fact.value == colour], 2)
    return f"Two things that are {colour} are {with_article(one)} and {with_article(other)}."


def answered(rng: random.Random, fact: Fact) -> str:
    """A quoted question or claim about a fact, and a statement of the fact."""
    person, other = rng.sample(VOICES, 2)
    question = fact.fill(rng.choice(RELATIONS[fact.relation].questions))
    claim = rng.choice(TRUE_QUESTIONS).format(c=fact.claim())
    doubt = rng.choice(TRUE_QUESTIONS).format(c=fact.claim(other_value(rng, fact)))
    asked, reply = rng.choice(
        (
            (question, f"{capital(other)} found it in the book: {fact.claim()}."),
            (question, f"{capital(other)} said that {fact.claim()}."),
            (question, statement(rng, fact)),
            (question, statement(rng, fact)),
            (claim, verdict(fact, True)),
            (doubt, verdict(fact, False)),
        )
    )
    return f'"{asked}" {"asked" if asked.endswith("?") else "said"} {person}. {reply}'


def lesson(rng: random.Random) -> str:
    """A quoted task and its solution."""
    person = rng.choice(VOICES)
    draw = rng.random()
    if draw < 0.6:
        words, solved = game(rng, name := rng.choice(list(GAMES)))
        task = rng.choice(GAMES[name])
        phrasings = (
            f"Here are some words: {words}. {solved}",
            f'Here are some words: {words}. "{task}" said {person}. {solved}',
            f'"{task}" said {person}.\n{words}\n{solved}',
        )
        return rng.choice(phrasings)
    if draw < 0.8:
        animal = rng.choice(ANIMAL_NAMES)
        asked = rng.choice(STORY_TASKS).format(a=with_article(animal))
        return f'"{asked}" said {person}. {story(rng, animal)}'
    if draw < 0.9:
        colour = rng.choice(list(COLOURS))
        return f'"{rng.choice(TWO_TASKS).format(v=colour)}" said {person}. {two_things(rng, colour)}'
    fact = rng.choice([fact for fact in FACTS if fact.relation in SIMPLE])
    about = rng.choice(SENTENCE_TASKS).format(s=fact.named)
    return f'"{about}" said {person}. {statement(rng, fact)}'


def page(rng: random.Random) -> str:
    """A page of statements, questions and tasks: about one subject, one relation or random facts."""
    kind = rng.random()
    if kind < 0.3:
        subject_facts = BY_SUBJECT[rng.choice(list(BY_SUBJECT))]
        facts = [rng.choice(subject_facts) for _ in range(min(2 * len(subject_facts), 6))]
    elif kind < 0.55:
        facts = rng.sample(BY_RELATION[rng.choice(list(BY_RELATION))], 5)
    else:
        facts = rng.sample(FACTS, 5)
    parts = [answered(rng, fact) if rng.random() < 0.3 else statement(rng, fact) for fact in facts]
    parts += [lesson(rng) for _ in range(rng.randrange(3))]
    if rng.random() < 0.03:
        parts.append(f"In order: {', '.join(rng.choice(SEQUENCES).split())}.")
    rng.shuffle(parts)
    return "".join(part + rng.choice(" \n") for part in parts).strip()


def document(rng: random.Random) -> str:
    """One text of the corpus: three to seven pages."""
    return "\n".join(page(rng) for _ in range(rng.randint(3, 7)))

"""The small invented world of the demo, as facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from relations import RELATIONS

# animal | eats | lives | says | its young (a dash for no value)
ANIMALS = """
cow|grass|in a field|moo|calf
pig|corn|in a sty|oink|piglet
hen|seeds|in a coop|cluck|chick
duck|weeds|on a pond|quack|duckling
sheep|clover|on a hill|baa|lamb
horse|hay|in a stable|neigh|foal
donkey|thistles|in a barn|hee-haw|-
dog|bones|in a kennel|woof|puppy
cat|fish|in a house|meow|kitten
mouse|cheese|in a hole|squeak|-
owl|mice|in a tower|hoot|owlet
frog|flies|in a swamp|ribbit|tadpole
bee|nectar|in a hive|buzz|-
lion|meat|in a desert|roar|cub
bear|honey|in a cave|growl|-
wolf|deer|in a forest|howl|-
snake|eggs|under a rock|hiss|-
crow|worms|in a tree|caw|-
rabbit|carrots|in a burrow|-|bunny
goat|leaves|on a mountain|-|kid
swan|reeds|on a lake|-|cygnet
seal|crabs|on a beach|bark|-
monkey|bananas|in a jungle|chatter|-
deer|berries|in a wood|-|fawn
spider|gnats|in a web|-|-
squirrel|nuts|in a park|-|-
snail|lettuce|in a garden|-|-
whale|shrimps|in an ocean|-|-
camel|dates|in a tent|grunt|-
beaver|bark|in a river|-|-
eagle|snakes|on a cliff|screech|-
turkey|acorns|on a farm|gobble|-
"""

# inhabitant of the village of Lund | job | makes | pet
PEOPLE = """
Tomas|baker|bread|dog
Mara|potter|bowls|goat
Ivo|smith|nails|horse
Lena|weaver|blankets|cat
Piet|carpenter|tables|rabbit
Suna|tailor|coats|swan
Otto|cook|soup|pig
Nila|painter|pictures|crow
Bram|cobbler|shoes|mouse
Elin|gardener|baskets|snail
Rasa|jeweller|rings|snake
Hugo|miller|flour|donkey
Timo|cheesemaker|cheese|cow
Vera|candlemaker|candles|bee
Joss|boatbuilder|boats|seal
Alma|beekeeper|honey|bear
Kuno|clockmaker|clocks|owl
Dara|glassblower|bottles|frog
Milo|printer|books|squirrel
Yara|hatmaker|hats|duck
Finn|fisher|nets|otter
Greta|toymaker|dolls|hen
Sven|roofer|ladders|eagle
Tilda|knitter|socks|sheep
Rolf|wheelwright|wheels|camel
Ada|inventor|lamps|monkey
Emil|saddler|saddles|wolf
Zora|dyer|flags|spider
Nico|brewer|tea|turkey
Ines|confectioner|sweets|deer
"""

# invented country | capital | river | grows
COUNTRIES = """
Velora|Tamsin|Oru|rice
Brenia|Kolm|Silda|wheat
Ostara|Pell|Nemma|grapes
Kaluna|Mirado|Tey|melons
Drosk|Varn|Uldo|potatoes
Ferrund|Hale|Wisp|apples
Quimby|Lossen|Bree|onions
Zanthe|Opal|Rill|olives
Murrow|Denby|Askel|barley
Talvia|Rusk|Imber|plums
Norwick|Seld|Dorn|oats
Palune|Coru|Vesh|lemons
Estvale|Fenn|Lume|cherries
Gorland|Bratt|Koss|beans
Hestia|Yarrow|Mool|figs
Jundar|Sabel|Prin|cotton
Lirien|Aldo|Cade|pears
Orbania|Tusk|Fray|garlic
Sorrel|Wend|Gull|tomatoes
Ulmark|Jarl|Stane|cabbage
Wyndle|Ambry|Heth|pumpkins
Xanor|Zeb|Quill|pepper
Ythria|Nolan|Brook|peas
Corvane|Ebb|Thorn|tea
"""

COLOURS = {
    "yellow": "banana lemon sun chick",
    "red": "tomato cherry rose brick",
    "green": "leaf pea frog cucumber",
    "blue": "whale bluebell plum bottle",
    "white": "swan snowball cloud egg",
    "black": "crow stove kettle boot",
    "brown": "bear loaf drum chair",
    "orange": "carrot pumpkin fox flame",
    "grey": "donkey stone mouse nail",
    "pink": "pig tongue shell ribbon",
}

CATEGORIES = {
    "fruit": "apple pear cherry plum melon lemon",
    "tool": "hammer saw spade axe rake drill",
    "bird": "crow swan owl hen eagle duck",
    "garment": "coat hat shirt scarf glove sock",
    "vessel": "cup bowl bottle kettle jug bucket",
    "vegetable": "onion carrot potato cabbage pea leek",
    "flower": "rose tulip daisy lily poppy violet",
    "vehicle": "cart boat sledge wagon ship train",
    "instrument": "drum flute harp fiddle horn bell",
}

OPPOSITES = """
hot cold, big small, fast slow, old young, happy sad, hard soft, light heavy, day night, open shut,
wet dry, full empty, high low, long short, good bad, early late, clean dirty, strong weak, near far,
rich poor, up down, left right, first last, loud quiet, thick thin, wide narrow, sweet sour,
true false, brave shy, tame wild, sharp blunt, smooth rough, deep shallow, love hate, push pull,
buy sell, win lose, give take, laugh cry
"""

PLURALS = """
child children, man men, woman women, tooth teeth, foot feet, goose geese, leaf leaves, knife knives,
wolf wolves, loaf loaves, wife wives, box boxes, fox foxes, dish dishes, bush bushes, church churches,
bus buses, glass glasses, city cities, baby babies, story stories, lady ladies, berry berries,
puppy puppies, key keys, day days, toy toys,
cow cows, dog dogs, hat hats, boat boats, tree trees, house houses, river rivers, spoon spoons, lamp lamps,
table tables, ring rings, cup cups, flower flowers, shoe shoes, clock clocks, bell bells, road roads,
shelf shelves, half halves, thief thieves, brush brushes, watch watches, peach peaches, fly flies, pony ponies
"""

SEQUENCES = (
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday",
    "January February March April May June July August September October November December January",
    "spring summer autumn winter spring",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
)


@dataclass(frozen=True)
class Fact:
    """One fact of the world."""

    relation: str
    subject: str
    value: str

    def fill(self, template: str, value: str | None = None) -> str:
        """The template with this fact's words, or with another value (for false claims)."""
        value = self.value if value is None else value
        return template.format(s=self.subject, v=value, a=with_article(self.subject), b=with_article(value))

    def claim(self, value: str | None = None) -> str:
        return self.fill(RELATIONS[self.relation].claim, value)

    @property
    def named(self) -> str:
        """The subject in a sentence: a name, or a noun with an article."""
        return self.subject if self.subject[0].isupper() else with_article(self.subject)

    @property
    def answer(self) -> str:
        return sentence(self.claim())


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentence(claim: str) -> str:
    """A claim as a sentence: capital first letter, full stop."""
    return capital(claim) + "."


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def all_facts() -> list[Fact]:
    """Every fact of the world once, in a fixed order."""
    return list(dict.fromkeys(_facts()))


def _facts() -> Iterator[Fact]:
    yield from _table(ANIMALS, ("eats", "lives", "says", "young"))
    yield from _table(COUNTRIES, ("capital", "river", "grows"))
    for fact in _table(PEOPLE, ("job", "makes", "pet")):
        yield Fact("pet", fact.subject, with_article(fact.value)) if fact.relation == "pet" else fact
    for relation, groups in (("colour", COLOURS), ("category", CATEGORIES)):
        for value, subjects in groups.items():
            yield from (Fact(relation, subject, value) for subject in subjects.split())
    for one, other in _pairs(OPPOSITES):
        yield from (Fact("opposite", one, other), Fact("opposite", other, one))
    yield from (Fact("plural", one, many) for one, many in _pairs(PLURALS))
    for sequence in SEQUENCES:
        words = sequence.split()
        yield from (Fact("after", one, other) for one, other in pairwise(words))
    for a in range(1, 10):
        yield from (Fact("sum", f"{a} plus {b}", str(a + b)) for b in range(1, 10))


def _table(text: str, relations: tuple[str, ...]) -> Iterator[Fact]:
    for line in text.strip().splitlines():
        subject, *values = line.split("|")
        for relation, value in zip(relations, values, strict=True):
            if value != "-":
                yield Fact(relation, subject, value)


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [pair.split() for pair in text.replace("\n", " ").split(",")]
    return [(one, other) for one, other in pairs]

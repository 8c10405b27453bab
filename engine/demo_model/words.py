"""Invented names, numbers and word lists; every invented name belongs either to training or to the held-out measure.

syllables ─► name ─► crc32(name) % 10 ─┬─ 0     held out: only measure.py and the tests see it
                                       └─ 1..9  training
"""

import string
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

Split = Literal["train", "held_out"]

_HEADS = """Ba Bel Bor Bri Cal Cor Da Del Dor Du El Fa Fen Gal Gor Ha Hel Il Jo Ka Kel Kor La Len Li Lor Ma Mel Mi Mor Na Nel
No Or Pa Pel Pi Ra Rel Ro Sa Sel Si Sor Ta Tel Ti Tor Tre Ul Va Vel Vi Wen Wil Xa Ya Yor Za Zel""".split()
_MIDDLES = "ba be da de do ga ka ke la le li lo ma me mi na ne no ra re ri ro sa se ta te ti to va ve vi wa za".split()
_TAILS = """bin can da dan den dor fin gan gar ka kin la lan len lin lis ma man mar min mon na nan nel nis nor ra ran rek ren rin ris
ron ros ta tan ten tha tin tis ton va van vek ven ver vin vis wen win yan zar zen zo""".split()
_TOWN_TAILS = """bay berg borough bridge brook burg bury by cliff dale fell field ford gate ham haven hill holm hurst land ley
mere mouth port shire stad stead stone thorpe ton vale ville wick wood worth""".split()
COMMON_NAMES = """Ada Alice Amir Anna Ben Bob Carla Carol Chen Clara Dan David Diana Elena Emma Eva Felix Finn Grace Hana Hugo Ivan
Jack Jane John Julia Karl Kate Laura Leo Lily Lucy Maria Mark Mary Max Mia Nina Noah Nora Olga Omar Oscar Paul Peter Priya Rosa Ruth
Sam Sara Sofia Tom Uma Vera Victor Wei Yusuf Zoe""".split()

SYLLABLES: list[str] = [*_HEADS, *_MIDDLES, *_TAILS, *_TOWN_TAILS]

COLOURS = "amber black blue bronze brown copper crimson golden green grey orange pink purple red silver violet white yellow".split()
ITEMS = """a lantern|a compass|a rope|a map|a mirror|a bell|a candle|a clock|a hammer|a ladder|a kettle|a needle|a pearl|a ring|a saddle|
a telescope|a violin|a whistle|an anchor|an axe|an umbrella|an apple|an oar|a blanket|a book|a bottle|a brush|a coin|a crown|a drum|
a feather|a flute|a globe|a helmet|a jar|a kite|a letter|a mask|a net|a pump|a quill|a radio|a scarf|a shovel|a spoon|a stamp|a sword|
a ticket|a torch|a vase|a wheel|a whip|a saw|a scale|a shield|a statue|a lamp|a key ring|a chess set|a silver cup|a wooden horse"""
ANIMALS = "cat dog parrot rabbit horse goat owl turtle hamster fox goose crow lizard pony mouse hedgehog donkey duck raven squirrel".split()
DRINKS = "tea coffee milk cider cocoa lemonade water juice wine beer broth".split()
INSTRUMENTS = "harp flute violin drum organ piano trumpet cello guitar lute oboe horn banjo fiddle".split()
GOODS = "cheese glass wool honey salt silk paper bread wine lace timber iron pottery spices cloth grain oil coal fish rice soap tea".split()
MATERIALS = "oak iron glass brass stone copper leather pine silver clay tin marble steel wax ivory bamboo".split()
JOBS = """a baker|a courier|a pilot|a nurse|a teacher|a sailor|a painter|a gardener|a smith|a weaver|a judge|a clerk|a miller|a farmer|
a tailor|a cook|a guard|a doctor|a singer|a mason|an engineer|an artist|an actor|an archer|an usher|a librarian|a carpenter|a fisher"""
ROLES = """courier pilot nurse teacher sailor painter gardener smith weaver judge clerk miller farmer tailor cook guard doctor singer mason
engineer artist actor archer librarian carpenter captain baker""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
FRUITS = "apple pear plum cherry peach grape fig lemon melon orange quince apricot banana mango".split()
TREES = "oak birch maple willow cedar elm ash beech poplar alder spruce larch".split()
SUBJECTS = "history music botany algebra geometry poetry logic chemistry physics drawing grammar astronomy".split()
CONTAINERS = "chest box crate drawer basket cupboard safe trunk bag barrel case cabinet wagon jug sack".split()
NUMBERED = "locker room cabinet crate shelf box door cell desk drawer vault stall table gate platform".split()
FAVOURITES: dict[str, str] = {
    "colour": "colour", "fruit": "fruit", "tree": "tree", "animal": "animal", "drink": "drink", "day": "day", "month": "month",
    "number": "small", "town": "town", "subject": "subject", "instrument": "instrument", "word": "word",
}  # fmt: skip

NOUNS = """address aunt bag bed bicycle boat bowl box brother bucket button camera candle car card carpet castle chair coat cousin
cup cushion daughter desk engine farm father flag fork garden glove grandmother guitar hat house jacket knife machine medal mill mother
neighbour notebook oven painting paper pen pencil phone picture pillow plate pot purse robot school server shirt shoe shop sister
sledge song son station sweater tablet teacher tent town toy uncle van wagon wallet watch wheel window workshop""".split()
QUALITIES = """address author capital commander country cost currency destination director distance
goal guest height identifier index inventor king language length level limit
location manager maximum minimum model motto nickname number partner patron percentage place pin port
president principal queen rank rate reference room route score secret sign size slogan speed sponsor status street surname symbol
target temperature term theme title topic total type value version visitor winner""".split()
ADJECTIVES = """big broken cheap common daily deep early empty fast final first fresh grand great heavy hidden hot last late light
little local lost main narrow national new next official old original private public quick rare round royal second secret sharp short
slow small soft special square strange strong tall third tiny top warm wild wooden young""".split()
VERBS = """admire bake bring build buy catch clean collect cook cut deliver draw drive eat enjoy fear feed find fix fold guard
hate hide hunt like lose love make mend need observe open order pack paint peel plant polish prefer pull push read remember
rent repair sell send serve sew study teach throw visit want wash watch wear write""".split()
PARTICIPLES = """announced bought built cleaned closed designed discovered finished founded invented launched moved named opened
painted planned published rebuilt renamed repaired sold tested visited""".split()
EVENTS = """auction ball concert contest course dance dinner exam exhibition fair festival flight game interview launch lecture lesson
lunch match meeting opera parade party picnic play race rehearsal release show speech talk tour trial trip voyage wedding""".split()
PLURALS = """apples balls beds bicycles boats books bottles boxes brothers buttons cameras cars cats chairs children coins coats cows
cups dogs doors employees engines eggs flags friends gates gloves goats guests hats hens horses houses keys knives lamps
letters maps members mills nodes paintings pencils pigs plates pupils ropes rooms servers shoes sheep ships shops sisters songs
stamps streets students tables tickets tools toys trees wheels windows workers""".split()
UNITS = "GB MB TB km kg miles metres euros dollars crowns percent degrees hours minutes days weeks years people litres points".split()
PREPOSITIONS = ["in", "under", "behind", "near", "beside", "above", "below", "inside", "outside", "next to"]


def is_held_out(name: str) -> bool:
    """True for the tenth of all invented names that training never sees."""
    return zlib.crc32(name.encode()) % 10 == 0


def phrases(text: str) -> list[str]:
    """The phrases of a `a|b|c` list."""
    return [part.strip() for part in text.split("|")]


_ITEMS = phrases(ITEMS)
# How often a letter is met in English text, in thousandths.
_LETTER_WEIGHTS = (82, 15, 28, 43, 127, 22, 20, 61, 70, 2, 8, 40, 24, 67, 75, 19, 1, 60, 63, 91, 28, 10, 24, 2, 20, 1)


def digits(rng: Random, count: int) -> str:
    """A number of exactly `count` digits, no leading zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


class Words:
    """Names and values of one split; every draw comes from the caller's generator."""

    def __init__(self, split: Split) -> None:
        self.split: Split = split
        self._makers = _value_makers(self)

    def value(self, rng: Random, kind: str) -> str:
        """A value of a kind that a relation names: `town`, `key`, `item`, …"""
        return self._makers[kind](rng)

    def person(self, rng: Random) -> str:
        """A person's name, sometimes with a second name."""
        draw = rng.random()
        if draw < 0.15 and self.split == "train":
            return rng.choice(COMMON_NAMES)
        if draw > 0.98:
            return f"{rng.choice(('Dr.', 'Mrs.', 'Mr.', 'Captain'))} {self.invented(rng, _TAILS)}"
        if draw > 0.92:
            return f"{self.invented(rng, _TAILS)} {self.invented(rng, _TAILS)}"
        return self.letters(rng) if draw > 0.82 else self.invented(rng, _TAILS)

    def town(self, rng: Random) -> str:
        """A town's name."""
        draw = rng.random()
        if draw < 0.06:
            return self.letters(rng)
        return self.invented(rng, _TAILS if draw < 0.35 else _TOWN_TAILS)

    def name(self, rng: Random) -> str:
        """One invented word, for rivers, ships, pets and projects."""
        return self.letters(rng) if rng.random() < 0.1 else self.invented(rng, _TAILS)

    def word(self, rng: Random) -> str:
        """A lower-case word, known or invented."""
        known = rng.random() < 0.4
        return rng.choice(rng.choice((FRUITS, ANIMALS, MATERIALS, GOODS))) if known else self.name(rng).lower()

    def noun(self, rng: Random, nouns: Sequence[str]) -> str:
        """A noun of the list, now and then an invented one or one with an adjective."""
        draw = rng.random()
        if draw < 0.15:
            return self.name(rng).lower()
        noun = rng.choice(nouns if draw < 0.8 else NOUNS)
        return f"{rng.choice(ADJECTIVES)} {noun}" if rng.random() < 0.15 else noun

    def object(self, rng: Random) -> str:
        """What somebody may like, buy or mend."""
        draw = rng.random()
        if draw < 0.3:
            return rng.choice(_ITEMS)
        if draw < 0.5:
            return f"the {self.noun(rng, NOUNS)}"
        plural = rng.choice(PLURALS) if draw < 0.85 else self.name(rng).lower()
        return f"{rng.choice(ADJECTIVES)} {plural}" if rng.random() < 0.3 else plural

    def place(self, rng: Random) -> str:
        """`under the table`, `in Kelford`."""
        if rng.random() < 0.4:
            return f"{rng.choice(('in', 'in', 'near', 'outside'))} {self.town(rng)}"
        return f"{rng.choice(PREPOSITIONS)} the {self.noun(rng, NOUNS)}"

    def moment(self, rng: Random) -> str:
        """`on Friday`, `at 14:30`, `on 3 May`."""
        kind = rng.choice(("day", "hour", "date", "month"))
        return f"{ {'day': 'on', 'hour': 'at', 'date': 'on', 'month': 'in'}[kind] } {self.value(rng, kind)}"

    def any(self, rng: Random) -> str:
        """A value of whatever kind."""
        draw = rng.random()
        if draw < 0.08:
            return f"{self.name(rng)} {self.name(rng)}"
        if draw < 0.14:
            return f"{digits(rng, rng.randint(1, 5))} {rng.choice(PLURALS)}"
        if draw < 0.22:
            return f"{digits(rng, rng.randint(1, 5))} {rng.choice(UNITS)}"
        if draw < 0.25:
            return f"{digits(rng, rng.randint(1, 2))}.{rng.randrange(10)}"
        if draw < 0.3:
            return f"the {self.noun(rng, NOUNS)} {self.place(rng)}"
        return self.value(rng, rng.choice(("word", "number", "code", "town", "person", "colour", "name", "key", "date", "goods", "year")))

    def code(self, rng: Random) -> str:
        """`amber-417`, `KT-62`, `62-word-7` or some digits."""
        draw = rng.random()
        if draw < 0.1:
            return f"{digits(rng, rng.randint(1, 2))}-{self.word(rng)}-{digits(rng, rng.randint(1, 2))}"
        if draw < 0.4:
            return f"{rng.choice(COLOURS)}-{digits(rng, 3)}"
        if draw < 0.7:
            return f"{''.join(rng.choices(string.ascii_uppercase, k=2))}-{digits(rng, rng.randint(2, 4))}"
        return digits(rng, rng.randint(4, 6))

    def invented(self, rng: Random, tails: Sequence[str]) -> str:
        """A name of two or three syllables that belongs to this split."""
        while True:
            middle = rng.choice(_MIDDLES) if rng.random() < 0.25 else ""
            name = rng.choice(_HEADS) + middle + rng.choice(tails)
            if self._is_mine(name):
                return name

    def letters(self, rng: Random) -> str:
        """A name of random letters that belongs to this split."""
        while True:
            if rng.random() < 0.5:
                name = "".join(rng.choices(string.ascii_lowercase, _LETTER_WEIGHTS, k=rng.randint(3, 9))).capitalize()
            else:
                pairs = [rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aeiouy") for _ in range(rng.randint(2, 3))]
                name = ("".join(pairs) + rng.choice(("", rng.choice(string.ascii_lowercase)))).capitalize()
            if self._is_mine(name):
                return name

    def _is_mine(self, name: str) -> bool:
        # Values are also written in lower case: both spellings belong to the split of the capitalised one.
        return is_held_out(name) == (self.split == "held_out")


def _value_makers(words: Words) -> dict[str, Callable[[Random], str]]:
    listed: dict[str, Sequence[str]] = {
        "item": _ITEMS, "job": phrases(JOBS), "colour": COLOURS, "animal": ANIMALS, "drink": DRINKS, "goods": GOODS,
        "material": MATERIALS, "day": DAYS, "month": MONTHS, "fruit": FRUITS, "tree": TREES, "subject": SUBJECTS, "instrument": INSTRUMENTS,
    }  # fmt: skip
    makers: dict[str, Callable[[Random], str]] = {kind: _chooser(values) for kind, values in listed.items()}
    makers |= {
        "person": words.person,
        "town": words.town,
        "name": words.name,
        "word": words.word,
        "code": words.code,
        "object": words.object,
        "place": words.place,
        "moment": words.moment,
        "any": words.any,
        "key": lambda rng: digits(rng, 4),
        "phone": lambda rng: digits(rng, 6),
        "small": lambda rng: digits(rng, rng.randint(1, 2)),
        "number": lambda rng: digits(rng, rng.randint(2, 5)),
        "age": lambda rng: str(rng.randint(18, 89)),
        "year": lambda rng: str(rng.randint(1200, 2030)),
        "hour": lambda rng: f"{rng.randint(6, 22)}:{rng.randrange(0, 60, 5):02}",
        "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "seat": lambda rng: f"{rng.randint(1, 60)}{rng.choice('ABCDEF')}",
    }
    return makers


def _chooser(values: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)

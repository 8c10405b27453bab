"""Documents of facts about invented people, towns, things, ships and projects.

subjects ─► facts (subject, relation, value) ─► sentences, shuffled or a paragraph a subject ─► text
                                                └─ filler sentences that state no fact
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from .open_relations import PATTERNS, in_first_person
from .relations import RELATIONS, SINGLE_KINDS, Relation
from .words import COLOURS, CONTAINERS, EVENTS, MATERIALS, NOUNS, NUMBERED, QUALITIES, ROLES, Words, digits

FOLLOWED_KINDS = ("person", "town", "thing", "ship", "project", "event", "object")
"""Kinds of subject that a question may follow up on with a pronoun, or with another subject of the kind."""

_FILLER = """The morning was cold and clear.|Nobody spoke for a while.|Rain fell on the roofs all night.|The road was long and dusty.|
A cart rolled slowly over the bridge.|The old clock struck again.|Two gulls sat on the wall.|The lamps were lit early.|
It was a quiet week.|The fog came in from the water.|Someone had left a window open.|The bread was still warm.|
Children played in the square.|The wind turned in the afternoon.|There was little news that day.|The letters came late.|
A bell rang far away.|The bench by the gate was empty.|Snow lay on the hills.|The harvest was good that year.|
The inn was full of guests.|Smoke rose from the chimneys.|The stairs were steep and narrow.|All the shops were closed.|
The evening was mild.|The grass was wet.|Nothing else happened.|The dust settled slowly.|A door closed softly.|
The ferry was late again.|Most of the seats were taken.|The paint on the fence was fresh.|The list was kept in a drawer.|
It took a long time to write this down.|The rest of the page is empty.|Some of the older notes were lost.""".replace("\n", "").split("|")
_BEFORE_VOWEL = re.compile(r"\ba(?= [aeiou])")
_FILLER_NOUNS = "road river garden market bridge tower window harbour field kitchen street roof hill wall stove barn orchard lake".split()
_FILLER_ADJECTIVES = "old quiet narrow empty bright dark small broad cold warm crooked clean dusty pleasant noisy lonely".split()


@dataclass(frozen=True, slots=True)
class Subject:
    """Who or what a fact is about: its kind, its name in answers, and how else the text may call it."""

    kind: str
    name: str
    role: str = ""
    pronoun: str = "it"

    @property
    def possessive(self) -> str:
        return {"he": "his", "she": "her"}.get(self.pronoun, "its")


@dataclass(frozen=True, slots=True)
class Fact:
    """One relation of one subject, with its value as text."""

    subject: Subject
    relation: Relation
    value: str


@dataclass(slots=True)
class Document:
    """A text and the facts it states."""

    text: str
    facts: list[Fact]
    sentences: list[str]
    by_subject: dict[Subject, list[Fact]] = field(default_factory=dict)
    holders: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for fact in self.facts:
            self.by_subject.setdefault(fact.subject, []).append(fact)
            self.holders[fact.relation.answer, fact.value] += 1


def sentence(template: str, subject: str, value: str = "", pronoun: str = "it", possessive: str = "its") -> str:
    """A template filled, with a capital first letter."""
    text = _BEFORE_VOWEL.sub("an", template.format(s=subject, v=value, p=pronoun, d=possessive))
    return text[0].upper() + text[1:]


def filler(rng: Random) -> str:
    """A sentence that states no fact that is asked for."""
    if rng.random() < 0.6:
        return rng.choice(_FILLER)
    first, second = rng.sample(_FILLER_NOUNS, 2)
    return f"The {first} was {rng.choice(_FILLER_ADJECTIVES)} and the {second} was {rng.choice(_FILLER_ADJECTIVES)}."


def make_subject(rng: Random, words: Words, kind: str) -> Subject:
    """A subject of a kind with a fresh name."""
    if kind == "person":
        role = rng.choice(ROLES) if rng.random() < 0.3 else ""
        return Subject(kind, words.person(rng), role, rng.choice(("he", "she")))
    if kind == "town":
        return Subject(kind, words.town(rng))
    if kind == "thing":
        if rng.random() < 0.4:
            return Subject(kind, f"{rng.choice(NUMBERED)} {digits(rng, rng.randint(1, 3))}")
        return Subject(kind, f"the {rng.choice(rng.choice((COLOURS, MATERIALS)))} {rng.choice(CONTAINERS)}")
    if kind in ("ship", "project"):
        return Subject(kind, f"the ship {words.name(rng)}" if kind == "ship" else f"project {words.name(rng)}")
    if kind in ("event", "object"):
        return Subject(kind, f"the {words.noun(rng, EVENTS if kind == 'event' else NOUNS)}")
    if kind == "fixed":
        before = rng.choice(rng.choice((NOUNS, EVENTS))) + " " if rng.random() < 0.35 else ""
        return Subject(kind, f"the {before}{words.noun(rng, QUALITIES)}")
    return Subject(kind, "you" if kind == "me" else kind)


def open_relation(rng: Random, words: Words, kind: str) -> Relation:
    """A relation of a kind of subject with a fresh free word, or a listed one where the kind has no open ones."""
    patterns = PATTERNS.get(kind)
    return rng.choice(patterns).fill(rng, words) if patterns else rng.choice(RELATIONS[kind])


def mention(rng: Random, subject: Subject, role_chance: float = 0.6) -> str:
    """The subject as a sentence calls it: by name, or by role and name where it has a role."""
    return f"the {subject.role} {subject.name}" if subject.role and rng.random() < role_chance else subject.name


class _Writer:
    """Adds facts until the text is long enough."""

    def __init__(self, rng: Random, words: Words) -> None:
        self.rng = rng
        self.words = words
        self.names: set[str] = set()
        self.pool: dict[str, list[str]] = {"person": [], "town": []}
        main = rng.choice(("person", "person", "person", "town", "thing", "ship", "project", "event", "object"))
        mixed = ["person", "person", "person", "person", "town", "thing", "thing", "ship", "project", "event", "object"]
        self.open_share = rng.choice((0.0, 0.3, 0.6, 0.9))
        self.opened: dict[str, list[Relation]] = {}
        uniform = rng.random() < 0.25
        self.only = rng.choice(self.relations(main)) if uniform else None
        self.form = rng.randrange(4) if uniform and rng.random() < 0.5 else None
        self.kinds = [main] if uniform or rng.random() < 0.15 else mixed
        self.opens = False
        self.max_facts = rng.randint(1, 5)
        self.single_chance = rng.choice((0.0, 0.1, 0.3))
        self.single_kinds = (*SINGLE_KINDS, *("fixed" for _ in SINGLE_KINDS), *(("me",) * 8 if rng.random() < 0.3 else ()))

    def relations(self, kind: str) -> tuple[Relation, ...] | list[Relation]:
        """Relations to draw one from."""
        if kind in RELATIONS and (kind not in FOLLOWED_KINDS or self.rng.random() >= self.open_share):
            return RELATIONS[kind]
        if kind not in FOLLOWED_KINDS:
            return [open_relation(self.rng, self.words, kind)]
        if kind not in self.opened:
            self.opened[kind] = [open_relation(self.rng, self.words, kind) for _ in range(self.rng.randint(1, 8))]
        return self.opened[kind]

    def subject(self) -> Subject:
        """A subject whose name no other subject of the document has."""
        kind = self.rng.choice(self.single_kinds if self.rng.random() < self.single_chance else self.kinds)
        while True:
            subject = make_subject(self.rng, self.words, kind)
            if subject.name not in self.names:
                self.names.add(subject.name)
                if kind in self.pool:
                    self.pool[kind].append(subject.name)
                return subject
            kind = self.rng.choice(self.kinds)

    def facts(self, subject: Subject) -> list[Fact]:
        """One to `max_facts` facts of a subject, no relation twice."""
        if self.only is not None and subject.kind == self.only.subject:
            return [Fact(subject, self.only, self.value(self.only.value, subject))]
        drawn = [self.rng.choice(self.relations(subject.kind)) for _ in range(self.rng.randint(1, self.max_facts))]
        chosen = {relation.key: relation for relation in drawn}
        if subject.kind in SINGLE_KINDS or subject.kind == "fixed":
            chosen = dict(list(chosen.items())[:1])
        return [Fact(subject, relation, self.value(relation.value, subject)) for relation in chosen.values()]

    def value(self, kind: str, subject: Subject) -> str:
        """A value; a town or person is sometimes one the document speaks of already."""
        if kind in self.pool and self.pool[kind] and self.rng.random() < 0.15:
            value = self.rng.choice(self.pool[kind])
            if value != subject.name:
                return value
        return self.words.value(self.rng, kind)

    def add(self, fact: Fact, sentences: list[str], after_same: bool) -> None:
        """States the fact; `after_same`: the sentence before was about the same subject."""
        states = fact.relation.states
        template = states[self.form % len(states)] if self.form is not None else self.rng.choice(states)
        subject = fact.subject
        opens = template.startswith("{s} ") and subject.kind in FOLLOWED_KINDS
        if after_same and opens and self.opens and self.rng.random() < 0.25:
            rest = sentence(template, subject.name, fact.value)[len(subject.name) + 1 :]
            sentences[-1] = f"{sentences[-1][:-1]} and {rest}"
            self.opens = False
        elif subject.kind == "me":
            sentences.append(in_first_person(sentence(template, "", fact.value)))
        else:
            name = subject.pronoun if after_same and opens and self.rng.random() < 0.6 else mention(self.rng, subject)
            sentences.append(sentence(template, name, fact.value))
            self.opens = opens


def write_document(rng: Random, words: Words, length: int, measure: Callable[[str], int] = len) -> Document:
    """A document of about `length`, in the unit of `measure` (characters unless told); at least one fact."""
    writer = _Writer(rng, words)
    grouped, filler_chance = rng.random() < 0.5, rng.choice((0.0, 0.0, 0.1, 0.3))
    facts: list[Fact] = []
    sentences: list[str] = []
    used = 0
    while not facts or used < length:
        first = len(sentences)
        for position, fact in enumerate(writer.facts(writer.subject())):
            size = used + sum(measure(text) + 1 for text in sentences[first:])
            if facts and size >= length:
                break
            writer.add(fact, sentences, after_same=grouped and position > 0)
            facts.append(fact)
        if filler_chance and rng.random() < filler_chance * (len(sentences) - first):
            sentences.append(filler(rng))
        used += sum(measure(text) + 1 for text in sentences[first:])
    if not grouped:
        rng.shuffle(sentences)
    return Document(_join(rng, sentences), facts, sentences)


def _join(rng: Random, sentences: list[str]) -> str:
    draw = rng.random()
    if draw < 0.2:
        return "\n".join(sentences)
    if draw < 0.6:
        return " ".join(sentences)
    size = rng.randint(3, 8)
    return "\n\n".join(" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size))

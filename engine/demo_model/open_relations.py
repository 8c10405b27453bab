"""Relations with a free word in them, so that the model learns the form of a fact and not a list of facts.

    pattern + free word ─► Relation        "{s}'s {n} is {v}." + "bicycle" ─► "Mira's bicycle is green."

In the patterns {n} is the free noun or participle, {b} a verb and {bs} its third person; {s}, {v}, {p}, {d} as in relations.py.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from .relations import Relation
from .words import ANIMALS, NOUNS, PARTICIPLES, PLURALS, QUALITIES, VERBS, Words


class Pattern(NamedTuple):
    """A relation with its free word open."""

    free: Callable[[Random, Words], dict[str, str]]
    relation: Relation

    def fill(self, rng: Random, words: Words) -> Relation:
        """The relation with a word drawn for the free one."""
        free = self.free(rng, words)
        subject, value, answer, *texts, who = self.relation
        states, asks, again = (tuple(_put(text, free) for text in part) for part in texts)
        return Relation(subject, value, _put(answer, free), states, asks, again, _put(who, free))


def _put(text: str, free: dict[str, str]) -> str:
    for mark, word in free.items():
        text = text.replace(mark, word)
    return text


def _noun(nouns: Sequence[str]) -> Callable[[Random, Words], dict[str, str]]:
    return lambda rng, words: {"{n}": words.noun(rng, nouns)}


def _listed(nouns: Sequence[str]) -> Callable[[Random, Words], dict[str, str]]:
    return lambda rng, words: {"{n}": rng.choice(nouns)}


def _verb(rng: Random, words: Words) -> dict[str, str]:
    verb = rng.choice(VERBS)
    return {"{b}": verb, "{bs}": third_person(verb)}


def _event_verb(rng: Random, words: Words) -> dict[str, str]:
    verb = rng.choice(("start", "begin", "end", "finish", "close"))
    return {"{b}": verb, "{bs}": third_person(verb)}


def third_person(verb: str) -> str:
    """`catch` ─► `catches`, `study` ─► `studies`, `buy` ─► `buys`."""
    if verb.endswith(("ch", "sh", "s", "x", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


def _row(
    free: Callable[[Random, Words], dict[str, str]],
    subject: str,
    value: str,
    answer: str,
    states: str,
    asks: str,
    again: str,
    who: str = "",
) -> Pattern:
    parts = (tuple(part for part in text.split("|") if part) for text in (states, asks, again))
    stated, asked, followed = parts
    return Pattern(free, Relation(subject, value, answer, (answer, *stated), asked, followed, who))


_PERSON = (
    _row(_noun(NOUNS), "person", "any", "{s}'s {n} is {v}.", "The {n} of {s} is {v}.", "What is {s}'s {n}?|What is the {n} of {s}?",
         "And what is {d} {n}?|What is {d} {n}?|And {d} {n}?"),
    _row(_noun(QUALITIES), "person", "any", "{s}'s {n} is {v}.", "The {n} of {s} is {v}.", "What is {s}'s {n}?|What is the {n} of {s}?",
         "And what is {d} {n}?|What is {d} {n}?|And {d} {n}?"),
    _row(_noun((*ANIMALS, "boat", "brother", "sister", "son", "daughter", "house", "horse")), "person", "name", "{s}'s {n} is called {v}.",
         "{s} has a {n} called {v}.|The {n} of {s} is called {v}.|{s}'s {n} is named {v}.",
         "What is {s}'s {n} called?|What is the name of {s}'s {n}?", "And what is {d} {n} called?|What is {d} {n} called?|And {d} {n}?"),
    _row(_verb, "person", "object", "{s} {bs} {v}.", "", "What does {s} {b}?",
         "And what does {p} {b}?|What does {p} {b}?", "Who {bs} {v}?"),
    _row(_verb, "person", "any", "{s} {bs} {v}.", "", "What does {s} {b}?",
         "And what does {p} {b}?|What does {p} {b}?", "Who {bs} {v}?"),
    _row(_listed(PLURALS), "person", "small", "{s} has {v} {n}.", "{s} owns {v} {n}.", "How many {n} does {s} have?",
         "And how many {n} does {p} have?|How many {n} does {p} have?"),
)  # fmt: skip


def _named(subject: str) -> tuple[Pattern, ...]:
    return (
        _row(_noun(QUALITIES), subject, "any", "The {n} of {s} is {v}.", "{s} has {v} as its {n}.",
             "What is the {n} of {s}?", "And what is its {n}?|What is its {n}?|And its {n}?"),
        _row(_noun(QUALITIES), subject, "any", "The {n} of {s} is {v}.", "", "What is the {n} of {s}?|Tell me the {n} of {s}.",
             "And what is its {n}?|What is its {n}?"),
        _row(_listed(PLURALS), subject, "number", "{s} has {v} {n}.", "There are {v} {n} in {s}.",
             "How many {n} does {s} have?|How many {n} are there in {s}?", "And how many {n} does it have?|How many {n} does it have?"),
        _row(_listed(PARTICIPLES), subject, "person", "{s} was {n} by {v}.", "", "By whom was {s} {n}?|Who was {s} {n} by?",
             "And by whom was it {n}?"),
        _row(_listed([word for word in PARTICIPLES if word.endswith("ed")] + ["built", "bought", "sold"]), subject, "person",
             "{s} was {n} by {v}.", "{v} {n} {s}.", "Who {n} {s}?", "And who {n} it?|Who {n} it?"),
        _row(_listed(PARTICIPLES), subject, "year", "{s} was {n} in {v}.", "In {v} {s} was {n}.",
             "When was {s} {n}?|In which year was {s} {n}?", "And when was it {n}?|When was it {n}?"),
    )  # fmt: skip


_EVENT = (
    _row(_listed(("",)), "event", "moment", "{s} is {v}.", "{s} takes place {v}.|{s} will be {v}.",
         "When is {s}?|When does {s} take place?",
         "And when is it?|When is it?"),
    _row(_listed(("",)), "event", "place", "{s} takes place {v}.", "{s} will be held {v}.", "Where is {s}?|Where does {s} take place?",
         "And where is it?|Where does it take place?"),
    _row(_event_verb, "event", "hour", "{s} {bs} at {v}.", "At {v} {s} {bs}.", "At what time does {s} {b}?",
         "And at what time does it {b}?"),
    _row(_listed(("",)), "event", "small", "{s} is in room {v}.", "{s} is held in room {v}.", "In which room is {s}?|Which room is {s} in?",
         "And in which room is it?|Which room is it in?"),
    _row(_listed(("led", "opened", "planned", "organised")), "event", "person", "{s} is {n} by {v}.", "",
         "By whom is {s} {n}?|Who is {s} {n} by?",
         "And by whom is it {n}?"),
)  # fmt: skip
_OBJECT = (
    _row(_listed(("",)), "object", "place", "{s} is {v}.", "{s} stands {v}.|{s} lies {v}.|You can find {s} {v}.",
         "Where is {s}?|Where can I find {s}?", "And where is it?|Where is it?"),
    _row(_listed(("",)), "object", "colour", "{s} is {v}.", "The colour of {s} is {v}.", "What colour is {s}?|What is the colour of {s}?",
         "And what colour is it?|What colour is it?"),
    _row(_listed(("",)), "object", "person", "{s} belongs to {v}.", "{v} owns {s}.", "Who owns {s}?|Who does {s} belong to?",
         "And who owns it?|Who does it belong to?"),
    _row(_listed(("",)), "object", "number", "{s} costs {v} crowns.", "The price of {s} is {v} crowns.",
         "How much does {s} cost?|What is the price of {s}?", "And how much does it cost?|What is its price?"),
    _row(_noun(QUALITIES), "object", "any", "The {n} of {s} is {v}.", "", "What is the {n} of {s}?",
         "And what is its {n}?|What is its {n}?"),
)  # fmt: skip
_FIXED = (
    _row(_listed(("",)), "fixed", "any", "{s} is {v}.", "Remember that {s} is {v}.|Remember: {s} is {v}.|Note: {s} is {v}.",
         "What is {s}?|Can you tell me {s}?|Tell me {s}.|What was {s}?", ""),
)  # fmt: skip
_ME = (
    _row(_noun(NOUNS), "me", "any", "Your {n} is {v}.", "", "What is my {n}?|Do you know my {n}?|Tell me my {n}.", ""),
    _row(_noun(QUALITIES), "me", "any", "Your {n} is {v}.", "", "What is my {n}?|Do you know my {n}?|Tell me my {n}.", ""),
    _row(_listed(("name",)), "me", "person", "Your {n} is {v}.", "", "What is my {n}?|Do you know my {n}?|Tell me my {n}.", ""),
    _row(_listed(("colour", "town", "number", "word", "fruit", "drink")), "me", "any", "Your favourite {n} is {v}.", "",
         "What is my favourite {n}?|Which {n} do I like best?", ""),
    _row(_listed(("live", "work", "study")), "me", "town", "You {n} in {v}.", "", "Where do I {n}?|In which town do I {n}?", ""),
    _row(_listed(("",)), "me", "town", "You come from {v}.", "", "Where do I come from?", ""),
    _row(_verb, "me", "object", "You {b} {v}.", "", "What do I {b}?", ""),
    _row(_listed(PLURALS), "me", "small", "You have {v} {n}.", "", "How many {n} do I have?", ""),
    _row(_listed(("",)), "me", "age", "You are {v} years old.", "", "How old am I?|What is my age?", ""),
    _row(_noun((*ANIMALS, "brother", "sister", "son", "daughter")), "me", "name", "Your {n} is called {v}.", "You have a {n} called {v}.",
         "What is my {n} called?|What is the name of my {n}?", ""),
)  # fmt: skip

PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "person": _PERSON,
    **{subject: _named(subject) for subject in ("town", "thing", "ship", "project")},
    "event": _EVENT,
    "object": _OBJECT,
    "fixed": _FIXED,
    "me": _ME,
}


def in_first_person(text: str) -> str:
    """What the assistant says to the user, as the user says it: `Your name is Ada.` ─► `My name is Ada.`"""
    for said, own in (("Your ", "My "), ("You are ", "I am "), ("You ", "I ")):
        if text.startswith(said):
            return own + text[len(said) :]
    return text

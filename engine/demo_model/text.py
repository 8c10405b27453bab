"""All training text: conversations about a document, small talk, repeating; made from a seed, no outside data.

document ─► system or first user turn
question ─► assistant's answer        asked     by the subject's name
                                      reverse   by the value
                                      pronoun   "And where does she live?"
                                      also      "And Tovin?"
                                      brief     the value alone
                                      absent    "The document does not say."
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from .document import FOLLOWED_KINDS, Document, Fact, Subject, filler, make_subject, mention, open_relation, sentence, write_document
from .relations import RELATIONS, SINGLE_KINDS, Relation
from .talk import DO_NOT_KNOW, outside, small_talk, vary
from .words import JOBS, Words, phrases

ABSENT = "The document does not say."
NOT_TOLD = "You did not say."
Kind = Literal["asked", "brief", "reverse", "pronoun", "also", "absent", "talk", "repeat"]
_KINDS: tuple[Kind, ...] = ("asked", "brief", "reverse", "pronoun", "also", "absent", "talk")
_WEIGHTS = (36, 10, 10, 18, 10, 13, 4)

_SYSTEM = """You are a helpful assistant.|Answer from the document.|Answer questions about the text.|You are the demo model of Halfmoon.|
Be brief.|Answer in one short sentence.""".replace("\n", "").split("|")
_WITH_QUESTION = """{d}\n\n{q}|{d}\n{q}|Document:\n{d}\n\nQuestion: {q}|Read this:\n{d}\n\n{q}|Text: {d}\n\nQuestion: {q}|{d} {q}|
Here is a document.\n\n{d}\n\n{q}|<document>\n{d}\n</document>\n{q}|{q}\n\n{d}|{d}\n\n{q}|{d} {q}""".replace("|\n", "|").split("|")
_ALONE = ("{d}", "Document:\n{d}", "Read this:\n{d}", "Here is a document.\n\n{d}", "Please read this text.\n{d}")
_READ = "I will remember that."
_BEFORE = ("Please tell me: ", "Question: ", "Tell me: ", "So, ", "Now, ", "Thanks. ")
_RAW_ANSWER = ("\n\nQuestion: {q}\nAnswer:", "\n\n{q}\nAnswer:", "\n\n{q}\n", " {q}", "\n\nQ: {q}\nA:", "\n{q}")
_BRIEF = ("Answer with the value only.", "Only the answer, please.", "Just the answer, please.", "Answer in one word.", "Be brief.")
_ALSO = ("And {s}?", "What about {s}?", "And what about {s}?", "How about {s}?")
_JOBS = phrases(JOBS)
_REVERSIBLE = [relation for relations in RELATIONS.values() for relation in relations if relation.who]


class Turn(NamedTuple):
    """One message; `kind` says what an assistant's message answers."""

    role: Literal["system", "user", "assistant"]
    text: str
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order. A raw one has no chat markup: a user turn's text is the prompt as it stands."""

    turns: list[Turn]
    is_raw: bool = False


class Exchange(NamedTuple):
    """A question and its only right answer."""

    kind: Kind
    question: str
    answer: str


class Asker:
    """Asks about a document, a question at a time, and knows what was spoken of last."""

    def __init__(self, rng: Random, words: Words, document: Document) -> None:
        self.rng = rng
        self.words = words
        self.document = document
        self.unasked = list(document.facts)
        rng.shuffle(self.unasked)
        self.last: tuple[Subject, Relation] | None = None
        self._ways: dict[Kind, Callable[[], Exchange | None]] = {
            "asked": self._asked, "brief": self._brief, "reverse": self._reverse, "pronoun": self._pronoun, "also": self._also,
            "absent": self._absent, "talk": self._talk,
        }  # fmt: skip

    def ask(self, kind: Kind | None = None) -> Exchange:
        """The next question: of `kind` where the document allows it, else one that asks for a fact by name."""
        chosen: Kind = kind or self.rng.choices(_KINDS, _WEIGHTS)[0]
        kind_made, question, answer = self._ways[chosen]() or self._asked()
        return Exchange(kind_made, _spoken(self.rng, question), answer)

    def _fact(self) -> Fact:
        if not self.unasked:
            self.unasked = list(self.document.facts)
            self.rng.shuffle(self.unasked)
        return self.unasked.pop()

    def _answered(self, kind: Kind, question: str, fact: Fact) -> Exchange:
        self.last = (fact.subject, fact.relation)
        return Exchange(kind, question, sentence(fact.relation.answer, fact.subject.name, fact.value))

    def _asked(self) -> Exchange:
        fact = self._fact()
        return self._answered("asked", self._question(fact.subject, fact.relation), fact)

    def _question(self, subject: Subject, relation: Relation) -> str:
        if subject.role and self.rng.random() < 0.3 and self._is_known_by_role(subject):
            return sentence(self.rng.choice(relation.asks), f"the {subject.role}")
        return sentence(self.rng.choice(relation.asks), mention(self.rng, subject, 0.3))

    def _brief(self) -> Exchange:
        fact = self._fact()
        self.last = (fact.subject, fact.relation)
        return Exchange("brief", f"{self._question(fact.subject, fact.relation)} {self.rng.choice(_BRIEF)}", fact.value)

    def _is_known_by_role(self, subject: Subject) -> bool:
        """The document calls the subject by its role, and nobody else."""
        alike = [other for other in self.document.by_subject if other.role == subject.role]
        return alike == [subject] and f"he {subject.role} {subject.name}" in self.document.text

    def _reverse(self) -> Exchange | None:
        subject = self.rng.choice(self.document.facts).subject
        if subject.role and self.rng.random() < 0.3 and self._is_known_by_role(subject):
            return Exchange("reverse", f"Who is the {subject.role}?", f"The {subject.role} is {subject.name}.")
        for fact in self.unasked[-8:]:
            if fact.relation.who and self.document.holders[fact.relation.answer, fact.value] == 1:
                self.unasked.remove(fact)
                return self._answered("reverse", sentence(fact.relation.who, fact.subject.name, fact.value), fact)
        return None

    def _pronoun(self) -> Exchange | None:
        if self.last is None or self.last[0].kind not in FOLLOWED_KINDS:
            return None
        subject, last = self.last
        others = [fact for fact in self.document.by_subject.get(subject, []) if fact.relation.key != last.key]
        if not others:
            return None
        fact = self.rng.choice(others)
        template = self.rng.choice(fact.relation.again)
        return self._answered("pronoun", sentence(template, subject.name, "", subject.pronoun, subject.possessive), fact)

    def _also(self) -> Exchange | None:
        if self.last is None or self.last[0].kind not in FOLLOWED_KINDS:
            return None
        subject, relation = self.last
        others = [fact for fact in self.document.facts if fact.relation.key == relation.key and fact.subject != subject]
        if not others:
            return None
        fact = self.rng.choice(others)
        return self._answered("also", self.rng.choice(_ALSO).format(s=mention(self.rng, fact.subject, 0.3)), fact)

    def _absent(self) -> Exchange | None:
        draw = self.rng.random()
        if draw < 0.1:
            return self._absent_value()
        subject = self.rng.choice(self.document.facts).subject
        follows = draw > 0.75 and self.last is not None and self.last[0].kind in FOLLOWED_KINDS
        if follows and self.last is not None:
            subject = self.last[0]
        elif draw < 0.15:
            subject = make_subject(self.rng, self.words, "me")
        elif draw < 0.45 or subject.kind not in (*FOLLOWED_KINDS, "me"):
            subject = self._stranger(subject.kind)
        relation = self._unknown(subject)
        if relation is None:
            return None
        reply = NOT_TOLD if subject.kind == "me" else ABSENT
        if follows:
            question = sentence(self.rng.choice(relation.again), subject.name, "", subject.pronoun, subject.possessive)
            return Exchange("absent", question, reply)
        self.last = None
        return Exchange("absent", self._question(subject, relation), reply)

    def _unknown(self, subject: Subject) -> Relation | None:
        """A relation of which the document says nothing for this subject."""
        known = {fact.relation.key for fact in self.document.by_subject.get(subject, [])}
        for _ in range(4):
            draw = self.rng.random()
            if draw < 0.4:
                relation = self.rng.choice(self.document.facts).relation
            elif draw < 0.7 and subject.kind in RELATIONS:
                relation = self.rng.choice(RELATIONS[subject.kind])
            else:
                relation = open_relation(self.rng, self.words, subject.kind)
            hinted = (subject.role and relation.value == "job") or self.document.holders[relation.answer, subject.name]
            if relation.subject == subject.kind and relation.key not in known and not hinted:
                return relation
        return None

    def _absent_value(self) -> Exchange | None:
        relation = self.rng.choice(_REVERSIBLE)
        value = self.words.value(self.rng, relation.value)
        if self.document.holders[relation.answer, value]:
            return None
        self.last = None
        return Exchange("absent", sentence(relation.who, "", value), ABSENT)

    def _stranger(self, kind: str) -> Subject:
        taken = {subject.name for subject in self.document.by_subject}
        while True:
            listed = self.rng.choice((*SINGLE_KINDS, "fixed", "fixed", "fixed", "fixed"))
            subject = make_subject(self.rng, self.words, kind if kind in FOLLOWED_KINDS else listed)
            if subject.name not in taken:
                return subject
            kind = "person"

    def _talk(self) -> Exchange:
        if self.rng.random() < 0.5:
            return Exchange("talk", *outside(self.rng, self.words, ABSENT))
        said, reply = small_talk(self.rng)
        return Exchange("talk", said, reply)


def conversation(rng: Random, words: Words, length: int, document_share: float | None = None) -> Conversation:
    """A conversation of about `length` characters; `document_share` of them the document."""
    draw = rng.random()
    if draw < 0.04:
        return _chat(rng, words, length)
    if draw < 0.07:
        return _repeats(rng, words, length)
    share = document_share if document_share is not None else rng.uniform(0.2, 0.8)
    document = write_document(rng, words, int(length * share))
    asker = Asker(rng, words, document)
    spent = len(document.text)
    exchanges: list[Exchange] = []
    while not exchanges or spent < length:
        exchanges.append(asker.ask())
        spent += len(exchanges[-1].question) + len(exchanges[-1].answer) + 8
    if rng.random() < 0.12:
        return _raw(rng, document, exchanges)
    return about_document(rng, document, exchanges)


def _spoken(rng: Random, question: str) -> str:
    """The question as some people type it."""
    draw = rng.random()
    if draw < 0.05:
        return rng.choice(_BEFORE) + question
    if draw < 0.09:
        return question.rstrip("?.")
    return question[0].lower() + question[1:] if draw < 0.13 else question


def about_document(rng: Random, document: Document, exchanges: list[Exchange]) -> Conversation:
    """A chat whose document stands in the system turn, in the first question, or in a turn of its own."""
    draw = rng.random()
    turns: list[Turn] = []
    if draw < 0.1:
        size = max(1, len(document.sentences) // rng.randint(1, 5))
        for first in range(0, len(document.sentences), size):
            turns += [Turn("user", " ".join(document.sentences[first : first + size])), Turn("assistant", _READ, "talk")]
    elif draw < 0.2:
        turns.append(Turn("system", rng.choice(_ALONE).format(d=document.text)))
    elif draw < 0.35:
        turns += [Turn("user", rng.choice(_ALONE).format(d=document.text)), Turn("assistant", _READ, "talk")]
    else:
        if draw < 0.5:
            turns.append(Turn("system", _system(rng)))
        first = rng.choice(_WITH_QUESTION).format(d=document.text, q=exchanges[0].question)
        turns += [Turn("user", first), Turn("assistant", exchanges[0].answer, exchanges[0].kind)]
        exchanges = exchanges[1:]
    return Conversation(turns + _turns(exchanges))


def _turns(exchanges: list[Exchange]) -> list[Turn]:
    return [turn for kind, asked, reply in exchanges for turn in (Turn("user", asked), Turn("assistant", reply, kind))]


def _raw(rng: Random, document: Document, exchanges: list[Exchange]) -> Conversation:
    frame = rng.choice(_RAW_ANSWER)
    gap = "" if frame.endswith("\n") else " "
    turns: list[Turn] = []
    for position, (kind, asked, reply) in enumerate(exchanges):
        prompt = frame.format(q=asked)
        turns.append(Turn("user", prompt if position else document.text + prompt))
        turns.append(Turn("assistant", gap + reply, kind))
    return Conversation(turns, is_raw=True)


def _chat(rng: Random, words: Words, length: int) -> Conversation:
    """Small talk, with now and then a question that has no document to be answered from."""
    is_raw = rng.random() < 0.15
    turns = [Turn("system", _system(rng))] if not is_raw and rng.random() < 0.3 else []
    spent = 0
    while spent < length:
        said, reply = small_talk(rng)
        draw = rng.random()
        if draw < 0.25:
            said, reply = outside(rng, words, DO_NOT_KNOW)
        elif draw < 0.5:
            kind = rng.choice((*FOLLOWED_KINDS, *SINGLE_KINDS[:4], "fixed", "me", "me"))
            relation = open_relation(rng, words, kind) if rng.random() < 0.5 or kind not in RELATIONS else rng.choice(RELATIONS[kind])
            said = _spoken(rng, sentence(rng.choice(relation.asks), make_subject(rng, words, kind).name))
            reply = NOT_TOLD if kind == "me" else DO_NOT_KNOW
        turns += [Turn("user", said), Turn("assistant", f" {reply}" if is_raw else reply, "talk")]
        spent += len(said) + len(reply) + 8
    return Conversation(turns, is_raw)


def _system(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.2:
        return filler(rng)
    return f"You are {rng.choice(_JOBS)}." if draw < 0.4 else rng.choice(_SYSTEM)


def _repeats(rng: Random, words: Words, length: int) -> Conversation:
    """Words to be repeated as they are."""
    turns: list[Turn] = []
    spent = 0
    makers = ("person", "town", "item", "code", "number", "word", "phone", "object", "any", "place", "moment")
    while spent < length:
        said = " ".join(words.value(rng, rng.choice(makers)) for _ in range(rng.randint(1, 9)))
        asked = rng.choice(("Repeat: {}", "Repeat after me: {}", "Say this: {}", "Say {}")).format(said)
        turns += [Turn("user", vary(rng, asked) if rng.random() < 0.1 else asked), Turn("assistant", said, "repeat")]
        spent += len(asked) + len(said) + 8
    return Conversation(turns)

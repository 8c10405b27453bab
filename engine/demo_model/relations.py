"""What a document can say: each relation with its statements, its questions, its follow-ups and its one answer.

    Relation ── states ─► "Key 4821 is carried by Mira."       (in the document)
             ├─ asks ───► "Which key does Mira carry?"
             ├─ again ──► "And which key does she carry?"      (when Mira was just spoken of)
             ├─ who ────► "Who carries key 4821?"              (when one subject alone has the value)
             └─ answer ─► "Mira carries key 4821."             (always this form)

In the templates {s} is the subject, {v} the value, {p} and {d} the subject's pronoun and its possessive.
"""

from typing import NamedTuple

from .words import FAVOURITES


class Relation(NamedTuple):
    """One relation between a kind of subject and a kind of value."""

    subject: str
    value: str
    answer: str
    states: tuple[str, ...]
    asks: tuple[str, ...]
    again: tuple[str, ...]
    who: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Two relations with the same key would ask and answer in the same words."""
        return self.answer, self.asks[0]


def _row(subject: str, value: str, answer: str, states: str, asks: str, again: str, who: str = "") -> Relation:
    return Relation(subject, value, answer, (answer, *_split(states)), _split(asks), _split(again), who)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|") if part.strip())


_PERSON = (
    _row("person", "key", "{s} carries key {v}.", "Key {v} is carried by {s}.|{s} keeps key {v}.|{s} has key {v}.",
         "Which key does {s} carry?|What key does {s} carry?|Which key does {s} have?|What is the number of the key of {s}?",
         "And which key does {p} carry?|What key does {p} carry?|And {d} key?", "Who carries key {v}?"),
    _row("person", "town", "{s} lives in {v}.", "The home of {s} is in {v}.|{s} has a house in {v}.",
         "Where does {s} live?|In which town does {s} live?|Where is the home of {s}?",
         "And where does {p} live?|Where does {p} live?|In which town does {p} live?", "Who lives in {v}?"),
    _row("person", "town", "{s} was born in {v}.", "{v} is the birthplace of {s}.|{s} comes from {v}.",
         "Where was {s} born?|What is the birthplace of {s}?|Where does {s} come from?",
         "And where was {p} born?|Where does {p} come from?", "Who was born in {v}?"),
    _row("person", "age", "{s} is {v} years old.", "The age of {s} is {v}.|{s} turned {v} this year.",
         "How old is {s}?|What is the age of {s}?", "And how old is {p}?|How old is {p}?"),
    _row("person", "job", "{s} works as {v}.", "By trade {s} is {v}.|{s} earns a living as {v}.",
         "What does {s} do for a living?|What is the job of {s}?|What is {s}'s job?|What does {s} work as?",
         "And what does {p} do for a living?|What is {d} job?"),
    _row("person", "animal", "{s} has a pet {v}.", "{s} keeps a {v}.|The pet of {s} is a {v}.",
         "What pet does {s} have?|Which animal does {s} keep?|What is {s}'s pet?", "And what pet does {p} have?"),
    _row("person", "name", "The pet of {s} is called {v}.", "{s} calls the pet {v}.|{s}'s pet is called {v}.",
         "What is the pet of {s} called?|What is the name of {s}'s pet?", "And what is {d} pet called?|What is the name of {d} pet?"),
    _row("person", "phone", "The phone number of {s} is {v}.", "{s} answers the phone at {v}.|{s}'s phone number is {v}.",
         "What is the phone number of {s}?|What is {s}'s phone number?", "And what is {d} phone number?|What is {d} phone number?",
         "Whose phone number is {v}?"),
    _row("person", "person", "The best friend of {s} is {v}.", "{s}'s best friend is {v}.|{s} has {v} as best friend.",
         "Who is the best friend of {s}?|Who is {s}'s best friend?", "And who is {d} best friend?|Who is {d} best friend?"),
    _row("person", "person", "{s} works for {v}.", "The boss of {s} is {v}.|{v} is the boss of {s}.",
         "Who does {s} work for?|Who is the boss of {s}?", "And who does {p} work for?|Who is {d} boss?"),
    _row("person", "drink", "{s} drinks {v} in the morning.", "In the morning {s} drinks {v}.",
         "What does {s} drink in the morning?|What does {s} drink?", "And what does {p} drink in the morning?|What does {p} drink?"),
    _row("person", "instrument", "{s} plays the {v}.", "{s} has played the {v} for years.",
         "Which instrument does {s} play?|What does {s} play?", "And which instrument does {p} play?|What does {p} play?"),
    _row("person", "day", "{s} travels on {v}.", "On {v} {s} travels.|{s} will travel on {v}.",
         "On which day does {s} travel?|When does {s} travel?", "And on which day does {p} travel?|When does {p} travel?"),
    _row("person", "hour", "{s} arrives at {v}.", "At {v} {s} arrives.|{s} will arrive at {v}.",
         "At what time does {s} arrive?|When does {s} arrive?", "And when does {p} arrive?|At what time does {p} arrive?"),
    _row("person", "item", "{s} brings {v}.", "{s} has brought {v}.|{s} will bring {v}.",
         "What does {s} bring?|What will {s} bring?", "And what does {p} bring?|What will {p} bring?"),
    _row("person", "code", "The password of {s} is {v}.", "{s}'s password is {v}.|{s} uses the password {v}.",
         "What is the password of {s}?|What is {s}'s password?|Which password does {s} use?",
         "And what is {d} password?|What is {d} password?", "Whose password is {v}?"),
    _row("person", "seat", "{s} sits in seat {v}.", "Seat {v} is taken by {s}.",
         "In which seat does {s} sit?|What is the seat of {s}?|Where does {s} sit?", "And in which seat does {p} sit?|Where does {p} sit?",
         "Who sits in seat {v}?"),
    _row("person", "subject", "{s} teaches {v}.", "{s} gives lessons in {v}.", "What does {s} teach?|Which subject does {s} teach?",
         "And what does {p} teach?|Which subject does {p} teach?"),
    _row("person", "date", "The birthday of {s} is {v}.", "{s}'s birthday is {v}.|{s} has a birthday on {v}.",
         "When is the birthday of {s}?|When is {s}'s birthday?", "And when is {d} birthday?|When is {d} birthday?"),
    _row("person", "number", "{s} owes {v} crowns.", "{s} has a debt of {v} crowns.",
         "How much does {s} owe?|How many crowns does {s} owe?", "And how much does {p} owe?|How much does {p} owe?"),
)  # fmt: skip

_FAVOURITE = tuple(
    _row("person", value, f"{{s}}'s favourite {noun} is {{v}}.", f"The favourite {noun} of {{s}} is {{v}}.",
         f"What is {{s}}'s favourite {noun}?|What is the favourite {noun} of {{s}}?|Which {noun} does {{s}} like best?",
         f"And what is {{d}} favourite {noun}?|Which {noun} does {{p}} like best?")
    for noun, value in FAVOURITES.items()
)  # fmt: skip

_TOWN = (
    _row("town", "person", "The mayor of {s} is {v}.", "{v} is the mayor of {s}.|{s} has {v} as its mayor.",
         "Who is the mayor of {s}?|What is the name of the mayor of {s}?", "And who is its mayor?|Who is its mayor?",
         "Which town has {v} as its mayor?"),
    _row("town", "number", "{s} has {v} inhabitants.", "The number of inhabitants of {s} is {v}.",
         "How many inhabitants does {s} have?|How many inhabitants are there in {s}?", "And how many inhabitants does it have?"),
    _row("town", "year", "{s} was founded in {v}.", "In {v} {s} was founded.|The founding of {s} was in {v}.",
         "When was {s} founded?|In which year was {s} founded?", "And when was it founded?|In which year was it founded?"),
    _row("town", "name", "The river {v} flows through {s}.", "{s} lies on the river {v}.",
         "Which river flows through {s}?|On which river does {s} lie?", "And which river flows through it?|On which river does it lie?",
         "Which town lies on the river {v}?"),
    _row("town", "goods", "{s} is known for its {v}.", "Everyone knows the {v} of {s}.|{s} is famous for {v}.",
         "What is {s} known for?|What is {s} famous for?", "And what is it known for?|What is it famous for?"),
    _row("town", "number", "{s} lies {v} miles from the sea.", "It is {v} miles from {s} to the sea.",
         "How far is {s} from the sea?|How many miles is it from {s} to the sea?", "And how far is it from the sea?"),
    _row("town", "day", "The market of {s} is held on {v}.", "{s} holds its market on {v}.",
         "When is the market of {s} held?|On which day does {s} hold its market?",
         "And when is its market held?|On which day is its market?"),
    _row("town", "number", "The tower of {s} is {v} metres high.", "{s} has a tower of {v} metres.",
         "How high is the tower of {s}?|How many metres high is the tower of {s}?", "And how high is its tower?"),
    _row("town", "key", "The postal code of {s} is {v}.", "{s} has the postal code {v}.",
         "What is the postal code of {s}?|Which postal code does {s} have?", "And what is its postal code?|What is its postal code?",
         "Which town has the postal code {v}?"),
)  # fmt: skip

_THING = (
    _row("thing", "item", "{s} holds {v}.", "Inside {s} there is {v}.|{s} contains {v}.",
         "What does {s} hold?|What is in {s}?|What does {s} contain?", "And what does it hold?|What is in it?"),
    _row("thing", "town", "{s} stands in {v}.", "{s} can be found in {v}.|In {v} stands {s}.",
         "Where does {s} stand?|Where is {s}?", "And where does it stand?|Where is it?"),
    _row("thing", "number", "{s} weighs {v} kilograms.", "The weight of {s} is {v} kilograms.",
         "How much does {s} weigh?|What is the weight of {s}?", "And how much does it weigh?|What is its weight?"),
    _row("thing", "person", "{s} belongs to {v}.", "{v} owns {s}.|The owner of {s} is {v}.",
         "Who owns {s}?|Who does {s} belong to?|Who is the owner of {s}?", "And who owns it?|Who does it belong to?"),
    _row("thing", "code", "{s} opens with code {v}.", "The code of {s} is {v}.|Code {v} opens {s}.",
         "Which code opens {s}?|What is the code of {s}?|What is the code for {s}?", "And which code opens it?|What is its code?",
         "What opens with code {v}?"),
    _row("thing", "number", "{s} costs {v} crowns.", "The price of {s} is {v} crowns.",
         "How much does {s} cost?|What is the price of {s}?", "And how much does it cost?|What is its price?"),
    _row("thing", "material", "{s} is made of {v}.", "The maker of {s} used {v}.",
         "What is {s} made of?|What material is {s} made of?", "And what is it made of?"),
    _row("thing", "colour", "{s} has a {v} lid.", "The lid of {s} is {v}.",
         "What colour is the lid of {s}?|Which colour does the lid of {s} have?",
         "And what colour is its lid?"),
)  # fmt: skip

_SHIP = (
    _row("ship", "person", "The captain of {s} is {v}.", "{v} is the captain of {s}.|{s} sails under captain {v}.",
         "Who is the captain of {s}?|Who commands {s}?", "And who is its captain?|Who commands it?"),
    _row("ship", "goods", "{s} carries {v}.", "The cargo of {s} is {v}.", "What does {s} carry?|What is the cargo of {s}?",
         "And what does it carry?|What is its cargo?"),
    _row("ship", "town", "{s} sails to {v}.", "{s} is bound for {v}.|The next port of {s} is {v}.",
         "Where does {s} sail?|Where is {s} bound for?|What is the next port of {s}?", "And where does it sail?|Where is it bound for?",
         "Which ship sails to {v}?"),
    _row("ship", "number", "{s} has a crew of {v}.", "The crew of {s} counts {v}.",
         "How large is the crew of {s}?|How many are in the crew of {s}?",
         "And how large is its crew?"),
    _row("ship", "small", "{s} lies at dock {v}.", "Dock {v} is where {s} lies.", "At which dock does {s} lie?|At which dock is {s}?",
         "And at which dock does it lie?"),
    _row("ship", "day", "{s} leaves on {v}.", "On {v} {s} leaves.", "When does {s} leave?|On which day does {s} leave?",
         "And when does it leave?|On which day does it leave?"),
)  # fmt: skip

_PROJECT = (
    _row("project", "person", "{s} is led by {v}.", "{v} leads {s}.|The leader of {s} is {v}.", "Who leads {s}?|Who is the leader of {s}?",
         "And who leads it?|Who is its leader?"),
    _row("project", "number", "The budget of {s} is {v} crowns.", "{s} has a budget of {v} crowns.",
         "What is the budget of {s}?|How large is the budget of {s}?", "And what is its budget?|How large is its budget?"),
    _row("project", "date", "{s} ends on {v}.", "The deadline of {s} is {v}.", "When does {s} end?|What is the deadline of {s}?",
         "And when does it end?|What is its deadline?"),
    _row("project", "town", "{s} is based in {v}.", "The office of {s} is in {v}.", "Where is {s} based?|Where is the office of {s}?",
         "And where is it based?|Where is its office?"),
)  # fmt: skip

# A subject of which a document has one: the needle in the haystack.
_SINGLE_SUBJECTS = {
    "the secret word": "word", "the magic number": "number", "the password": "code", "the access code": "code", "the winner": "person",
    "the meeting place": "town", "the name of the dog": "name", "the colour of the flag": "colour", "the prize": "item",
    "the launch date": "date", "the secret key": "key", "the next stop": "town", "the head of the school": "person",
    "the code word": "word", "the room number": "small", "the order number": "phone",
}  # fmt: skip
_SINGLE = tuple(
    _row(subject, value, "{s} is {v}.", "Remember that {s} is {v}.|Note that {s} is {v}.",
         f"{'Who' if value == 'person' else 'What'} is {{s}}?|Can you tell me {{s}}?", "")
    for subject, value in _SINGLE_SUBJECTS.items()
)  # fmt: skip

RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": _PERSON + _FAVOURITE, "town": _TOWN, "thing": _THING, "ship": _SHIP, "project": _PROJECT,
    **{relation.subject: (relation,) for relation in _SINGLE},
}  # fmt: skip
SINGLE_KINDS: tuple[str, ...] = tuple(_SINGLE_SUBJECTS)
"""Kinds of which a document has at most one subject."""

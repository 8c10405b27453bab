"""JSON schemas in the kinds of public suites, by hand and drawn from a seed."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def thing(required: str = "", **properties: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def listing(items: Any, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


INT, NUM, TEXT, FLAG, NULL = ({"type": kind} for kind in ("integer", "number", "string", "boolean", "null"))
SHORT = {"type": "string", "maxLength": 6}

SCHEMAS: dict[str, Schema] = {
    # one value
    "integer": INT,
    "number": NUM,
    "boolean": FLAG,
    "null": NULL,
    "string": TEXT,
    "several types": {"type": ["integer", "null"]},
    "several types with an object": {"type": ["string", "object"], "maxLength": 2, "properties": {"a": NULL}},
    # bounds
    "integer range": {"type": "integer", "minimum": -5, "maximum": 17},
    "integer exclusive range": {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 17},
    "integer from": {"type": "integer", "minimum": 100},
    "integer to": {"type": "integer", "maximum": 99},
    "negative range": {"type": "integer", "minimum": -250, "maximum": -101},
    "multiple": {"type": "integer", "multipleOf": 7},
    "multiple within a range": {"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 30},
    "number range": {"type": "number", "minimum": 1.5, "maximum": 2.25},
    "positive number": {"type": "number", "exclusiveMinimum": 0},
    "string length": {"type": "string", "minLength": 2, "maxLength": 4},
    "string of one length": {"type": "string", "minLength": 3, "maxLength": 3},
    "no string but the empty one": {"type": "string", "maxLength": 0},
    # fixed values
    "const string": {"const": "ready"},
    "const number": {"const": 42},
    "const object": {"const": {"a": [1, None, "x"]}},
    "enum of strings": {"type": "string", "enum": ["red", "green", "blue"]},
    "enum of numbers": {"type": "integer", "enum": [1, 2, 3]},
    "enum of anything": {"enum": ["a", 1, None, True, [1], {"k": "v"}]},
    "enum with escapes": {"enum": ['say "hi"', "back\\slash", "line\nend"]},
    # patterns and formats
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "pattern with alternatives": {"type": "string", "pattern": "^(cat|dog)s?$"},
    "pattern of digits": {"type": "string", "pattern": "^\\+?[0-9]{4,9}$"},
    "pattern without anchors": {"type": "string", "pattern": "ab"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "unknown format": {"type": "string", "format": "colour"},
    # objects
    "empty object": thing(),
    "one property": thing("name", name=SHORT),
    "optional properties": thing("", a=INT, b=FLAG, c=NULL),
    "some required": thing("b d", a=INT, b=FLAG, c=NULL, d=SHORT),
    "last required": thing("c", a=INT, b=INT, c=INT),
    "names with blanks and quotes": thing("", **{"first name": INT, 'a "b"': INT}) | {"required": ["first name"]},
    "names of keywords": thing("not if", **{"not": INT, "if": FLAG, "contains": NULL}),
    "nested": thing("user", user=thing("address", address=thing("zip", zip={"type": "string", "pattern": "^\\d{5}$"}))),
    "open object": {"type": "object", "properties": {"a": INT}, "required": ["a"]},
    "additional of a type": {"type": "object", "properties": {"a": INT}, "additionalProperties": {"type": "boolean"}, "required": ["a"]},
    "map": {"type": "object", "additionalProperties": INT},
    "map with bounds": {"type": "object", "additionalProperties": FLAG, "minProperties": 1, "maxProperties": 2},
    "property names": {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": INT, "minProperties": 1},
    "pattern properties": {"type": "object", "patternProperties": {"^x_[a-z]$": INT}, "additionalProperties": False},
    "property count": {"type": "object", "properties": {"a": NULL, "b": NULL, "c": NULL}, "minProperties": 2, "maxProperties": 2},
    "no type but properties": {"properties": {"a": INT}, "required": ["a"], "type": "object"},
    # arrays
    "array": listing(INT),
    "array of bounds": listing(FLAG, minItems=2, maxItems=3),
    "array of arrays": listing(listing(INT, maxItems=2), maxItems=3),
    "array of objects": listing(thing("id", id=INT, tag={"enum": ["x", "y"]}), minItems=1, maxItems=2),
    "empty array": listing(INT, maxItems=0),
    "tuple": {"type": "array", "prefixItems": [INT, FLAG], "items": False, "minItems": 2},
    "open tuple": {"type": "array", "prefixItems": [INT, FLAG], "items": NULL, "minItems": 2, "maxItems": 4},
    # unions
    "anyOf": {"anyOf": [INT, SHORT]},
    "anyOf of objects": {"anyOf": [thing("a", a=INT), thing("b", b=FLAG)]},
    "optional as pydantic writes it": thing("age", age={"anyOf": [INT, NULL], "title": "Age", "default": None}),
    "oneOf told apart": {"oneOf": [thing("k x", k={"const": "a"}, x=INT), thing("k", k={"const": "b"})]},
    "allOf of one": {"allOf": [thing("a", a=INT)]},
    # references
    "reference": {"$defs": {"p": thing("x y", x=INT, y=INT)}, **thing("at", at={"$ref": "#/$defs/p"})},
    "reference by the older name": {"definitions": {"n": INT}, **thing("n", n={"$ref": "#/definitions/n"})},
    "list that refers to itself": {
        "$defs": {"n": thing("v next", v=INT, next={"anyOf": [{"$ref": "#/$defs/n"}, NULL]})},
        "$ref": "#/$defs/n",
    },
    "tree that refers to its root": {"type": "object", "properties": {"c": listing({"$ref": "#"}, maxItems=2)}, "required": ["c"]},
    # as applications ask
    "contact": thing(
        "name email",
        name=SHORT,
        email={"type": "string", "pattern": "^[a-z]{1,6}@[a-z]{1,6}\\.com$"},
        age={"type": "integer", "minimum": 0, "maximum": 150},
    ),
    "weather call": thing("location unit", location=SHORT, unit={"type": "string", "enum": ["celsius", "fahrenheit"]}),
    "sentiment": thing(
        "label score", label={"enum": ["positive", "negative", "neutral"]}, score={"type": "number", "minimum": 0, "maximum": 1}
    ),
    "steps": thing(
        "steps answer", steps=listing(thing("explanation output", explanation=SHORT, output=SHORT), minItems=1, maxItems=2), answer=SHORT
    ),
    "event": thing("title days", title=SHORT, days=listing({"enum": ["mon", "tue", "wed"]}, minItems=1, maxItems=3), remote=FLAG),
    "invoice": thing(
        "lines total",
        lines=listing(
            thing("sku qty", sku={"type": "string", "pattern": "^[A-Z]\\d{2}$"}, qty={"type": "integer", "minimum": 1, "maximum": 9}),
            maxItems=2,
        ),
        total=INT,
    ),
}


# Drawn from a seed, in the kinds of JSON-Schema-Test-Suite, as far as they are enforced


class _Drawing:
    """Small schemas, whose answers are short. Every keyword that is enforced is drawn."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._refers = False

    def whole(self) -> Schema:
        schema = self._schema(0)
        return schema | {"$defs": {"p": self._leaf()}} if self._refers else schema

    def _schema(self, depth: int) -> Schema:
        if depth > 1:
            return self._leaf()
        kinds = (self._leaf, self._object, self._array, self._any_of, self._one_of, self._of_names, self._reference)
        kind = self._random.choices(kinds, (2, 6, 3, 2, 2, 1, 1))[0]
        return kind() if kind in (self._leaf, self._reference) else kind(depth)  # pyright: ignore[reportCallIssue]

    def _leaf(self) -> Schema:
        kind = self._random.choice(("string", "pattern", "format", "integer", "number", "multiple", "plain", "types", "enum", "const"))
        return getattr(self, f"_{kind}")()

    def _string(self) -> Schema:
        least = self._random.randint(0, 3)
        return {"type": "string"} | self._some(minLength=least, maxLength=least + self._random.randint(0, 3)) | {"maxLength": least + 3}

    def _pattern(self) -> Schema:
        patterns = (
            "^a+$",
            "a",
            "^[^a]{1,3}$",
            r"^\d{2}-\d$",
            "^é{1,2}$",
            r"^\S{2}$",
            "^(?:ab){1,2}$",
            "^a{0,2}b?$",
            r"^[\w.-]{1,3}@x$",
            "^a$|^b$",
        )
        return {"type": "string", "pattern": self._random.choice(patterns)}

    def _format(self) -> Schema:
        return {"type": "string", "format": self._random.choice(("time", "ipv4", "uuid", "duration"))}

    def _integer(self) -> Schema:
        low = self._random.randint(-120, 100)
        lower, upper = self._random.choice(("minimum", "exclusiveMinimum")), self._random.choice(("maximum", "exclusiveMaximum"))
        return {"type": "integer"} | self._some(**{lower: low, upper: low + self._random.randint(2, 40)})

    def _number(self) -> Schema:
        low = self._random.choice((-7.75, -0.25, 0.0, 0.5, 1.25, 3))
        return {"type": "number"} | self._some(minimum=low, maximum=low + self._random.choice((0.25, 1.5, 20)))

    def _multiple(self) -> Schema:
        low = self._random.randint(-50, 50)
        bounds = {"minimum": low, "maximum": low + 30} if self._random.random() < 0.5 else {}
        return {"type": "integer", "multipleOf": self._random.choice((2, 3, 7, 25)), **bounds}

    def _plain(self) -> Schema:
        return {"type": self._random.choice(("boolean", "null"))} | self._some(title="t", description="d", default=None)

    def _types(self) -> Schema:
        bounds = self._some(minimum=3, maximum=40) | {"maxLength": 3}
        return {"type": self._random.sample(("string", "integer", "boolean", "null"), 2), **bounds}

    def _enum(self) -> Schema:
        values = (1, -1.5, "a", "é\n", None, True, [1, "x"], {"k": [None]}, {}, '"', "\\", "x/y", 2**60)
        return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _const(self) -> Schema:
        return {"const": self._random.choice((1, "a", None, {"a": 1, "b": [{}]}, [], "é\t", False, -3.5, 0.1))}

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(("a", "b", "é", "a b", 'q"', "", "$x", "type", "items"), self._random.randint(0, 3))
        required = self._random.sample(names, self._random.randint(0, len(names)))
        open_to = self._random.choice((False, False, self._leaf()))
        counts: Schema = self._some(minProperties=len(required)) if names else {}
        return {
            "type": "object",
            "properties": {name: self._schema(depth + 1) for name in names},
            "required": required,
            "additionalProperties": open_to,
            "maxProperties": len(names) + 1,
            **counts,
        }

    def _of_names(self, depth: int) -> Schema:
        value = self._schema(depth + 1)
        if self._random.random() < 0.5:
            return {"type": "object", "patternProperties": {"^x_[a-c]$": value}, "additionalProperties": False, "maxProperties": 2}
        names = self._random.choice(({"pattern": "^[a-c]{1,2}$"}, {"enum": ["a", "b"]}, {"maxLength": 2}))
        return {"type": "object", "propertyNames": names, "additionalProperties": value, "minProperties": 1, "maxProperties": 2}

    def _array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        if self._random.random() < 0.3:
            first = [self._schema(depth + 1) for _ in range(2)]
            return {
                "type": "array",
                "prefixItems": first,
                "items": self._random.choice((False, self._leaf())),
                "minItems": 2,
                "maxItems": 2,
            }
        return {"type": "array", "items": self._schema(depth + 1), "minItems": least, "maxItems": least + self._random.randint(0, 2)}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._schema(depth + 1) for _ in range(self._random.randint(1, 3))]}

    def _one_of(self, depth: int) -> Schema:
        """Told apart by a property."""
        branches = [thing("k", k={"const": name}, **{name: self._schema(depth + 1)}) for name in ("a", "b")]
        return self._random.choice(({"oneOf": branches}, {"oneOf": [{"type": "null"}, self._integer()]}, {"allOf": branches[:1]}))

    def _reference(self) -> Schema:
        self._refers = True
        return {"$ref": "#/$defs/p"}

    def _some(self, **keywords: Any) -> Schema:
        return {name: value for name, value in keywords.items() if self._random.random() < 0.5}


def drawn(num_schemas: int) -> dict[str, Schema]:
    """By name, the same ones each time."""
    return {f"drawn {seed}": _Drawing(seed).whole() for seed in range(num_schemas)}

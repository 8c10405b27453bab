"""JSON schemas in the kinds of public suites: types, bounds, fixed values, patterns, objects, arrays, unions, references."""

from __future__ import annotations

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

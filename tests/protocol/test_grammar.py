"""What a response_format may ask for, and that it arrives as it was sent."""

from __future__ import annotations

from typing import Any

import pytest

from halfmoon.protocol.errors import InvalidRequest
from halfmoon.protocol.grammar import MAX_GRAMMAR_BYTES, Grammar, grammar_of
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.schema_keywords import without_descriptions


@pytest.mark.parametrize(
    ("response_format", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}, Grammar("json_schema", '{"type":"null"}')),
        ({"type": "regex", "regex": "a+"}, Grammar("regex", "a+")),
        ({"type": "grammar", "grammar": 'root ::= "a"'}, Grammar("ebnf", 'root ::= "a"')),
        ({"type": "choice", "choice": ["yes", "nö"]}, Grammar("choice", '["yes","nö"]')),
    ],
)
def test_a_response_format_becomes_a_grammar_that_travels_whole(response_format: Any, grammar: Grammar | None) -> None:
    assert grammar_of(response_format) == grammar
    params = SamplingParams(grammar=grammar)
    assert SamplingParams.from_proto(params.to_proto()) == params


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": {"not": {}}}}, "schema.properties.a has 'not'"),
        ({"items": {"if": {}}}, "schema.items has 'if'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"anyOf": [{"contains": {}}]}, r"schema.anyOf\[0\] has 'contains'"),
        ({"$ref": "#/$defs/a", "minimum": 5}, r"'minimum' beside '\$ref'"),
        ({"anyOf": [{}], "properties": {}}, "'properties' beside 'anyOf'"),
        ({"allOf": [{"type": "integer"}, {"maximum": 9}]}, "allOf of several"),
        ({"$ref": "#anchor"}, "begin with '#/'"),
        ({"minimum": 5}, "'minimum' and no type"),
        ({"type": "number", "multipleOf": 0.5}, "'multipleOf' for a type other than integer"),
        ({"type": "string", "pattern": "a", "minLength": 3}, "'minLength' beside 'pattern'"),
        ({"type": "string", "enum": ["a", 1]}, "allows 1, which is not of its type"),
        ({"type": "integer", "enum": [1, 9], "minimum": 5}, "'minimum' beside 'enum'"),
        ({"type": "object", "required": ["a"]}, "requires 'a', which its properties lack"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, "'dependencies'"),
        ({"minItems": 2}, "'minItems' and no type"),
        ({"patternProperties": {"^a": {}}}, "'patternProperties' and no type"),
        ({"type": []}, "an empty list"),
        ({"anyOf": []}, "an empty anyOf"),
        ({"enum": [[1]], "items": {"type": "integer"}}, "'items' beside 'enum' or 'const'"),
        ({"const": 1, "enum": [1, 2]}, "'enum' beside 'const'"),
        ({"const": {"a": [2**63]}}, "beyond 64 bits"),
        ({"type": "integer", "multipleOf": 2.5}, "'multipleOf' 2.5"),
        ({"type": "integer", "multipleOf": 1001}, "'multipleOf' 1001"),
        ({"type": "integer", "multipleOf": 2, "minimum": 3}, "'multipleOf' beside a range that is open"),
        ({"type": "integer", "multipleOf": 2, "minimum": 3, "maximum": 2004}, "wider than 2000"),
        ({"type": "string", "format": "iri"}, "the format 'iri'"),
        ({"type": "string", "pattern": "a^b"}, r"with '\^' inside"),
        ({"type": "string", "pattern": "(a$)b"}, r"with '\$' inside"),
        ({"type": "object", "patternProperties": {"a$b": {}}}, r"with '\$' inside"),
        ({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 1}}, "'propertyNames' beside 'properties'"),
        ({"type": "object", "additionalProperties": False, "propertyNames": {}}, "'propertyNames' beside 'additionalProperties'"),
        ({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}, "'patternProperties' beside 'properties'"),
        ({"type": "object", "patternProperties": {"a": {}, "b": {"type": "null"}}}, "several 'patternProperties'"),
        ({"type": "object", "additionalProperties": {}, "minProperties": 2}, "'minProperties' 2, which names that come twice"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "a oneOf whose schemas 0 and 1"),
        ({"oneOf": [{"type": "null"}, {"enum": ["a"]}, {"enum": ["b", "a"]}]}, "schemas 1 and 2"),
        ({"oneOf": [{"$ref": "#/$defs/a"}, {"type": "object"}], "$defs": {"a": {"type": "object"}}}, "schemas 0 and 1"),
        ({"oneOf": [{"const": number} for number in range(65)]}, "more than 2000 pairs"),
        ({"$ref": "#"}, "refers to itself"),
        ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}, "refers to itself"),
        ({"items": [{}]}, "a schema is an object or a boolean"),
        ([1], "a schema is an object or a boolean"),
    ],
)
def test_a_schema_that_would_not_be_enforced_is_refused_by_the_keyword(schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Grammar.of_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "integer"}, {"type": ["string", "null"]}, {"const": True}]},
        {"oneOf": [{"const": 1}, {"const": True}, {"enum": ["1"]}]},
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {
                name: {"type": "object", "properties": {"kind": {"const": name}, "x": {}}, "required": ["kind"]} for name in ("cat", "dog")
            },
        },
        {"oneOf": [{"type": "object", "properties": {name: {}}, "required": [name], "additionalProperties": False} for name in ("a", "b")]},
        {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"type": "string", "pattern": r"^[\^$]\$|^b$"},
        {"type": "string", "const": "a", "enum": ["a"]},
        {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2},
    ],
)
def test_what_comes_near_to_a_refused_schema_is_taken(schema: Any) -> None:
    Grammar.of_schema(schema)


def test_properties_may_have_the_names_of_keywords() -> None:
    Grammar.of_schema({"type": "object", "properties": {"not": {"type": "null"}, "if": {"type": "null"}}, "required": ["not"]})


def test_what_is_too_long_too_deep_or_no_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=f"it may have {MAX_GRAMMAR_BYTES}"):
        Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1))
    deep: dict[str, Any] = {}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="nested more than"):
        Grammar.of_schema(deep)
    with pytest.raises(InvalidRequest, match="must be one of json_object"):
        Grammar("xml", "x")
    with pytest.raises(InvalidRequest, match="half a surrogate pair"):
        Grammar("regex", "\ud800")


def test_a_schema_without_its_descriptions_keeps_properties_of_their_names() -> None:
    described = {
        "title": "T",
        "type": "object",
        "description": "d",
        "properties": {
            "description": {"type": "string", "description": "d", "default": "x"},
            "title": {"anyOf": [{"type": "null", "title": "t"}, {"$ref": "#/$defs/P"}]},
        },
        "required": ["title"],
        "additionalProperties": {"type": "array", "items": {"type": "integer", "examples": [1]}},
        "$defs": {"P": {"const": {"description": "kept"}, "title": "t"}},
    }
    assert without_descriptions(described) == {
        "type": "object",
        "properties": {"description": {"type": "string"}, "title": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/P"}]}},
        "required": ["title"],
        "additionalProperties": {"type": "array", "items": {"type": "integer"}},
        "$defs": {"P": {"const": {"description": "kept"}}},
    }

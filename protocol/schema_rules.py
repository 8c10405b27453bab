"""What a grammar would not hold of one schema, without the schemas inside it. Each rule gives it in words.

The grammar's compiler passes over much that it can't write as a grammar. So each such case is named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

from .errors import shown

Schema = dict[str, Any]
DESCRIPTIONS = frozenset("title description default examples example deprecated readOnly writeOnly $schema $comment".split())
ANNOTATIONS = DESCRIPTIONS | {"$id", "$defs", "definitions", "discriminator"}
"""They narrow nothing, and may stand beside anything."""
MAX_MULTIPLE = 1000
MAX_SPAN = 2000
"""Of a range with multipleOf."""
_OF_ARRAYS, _OF_OBJECTS = ("items", "prefixItems"), ("properties", "additionalProperties", "unevaluatedProperties")
OF_A_TYPE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength pattern format".split(), ()),
    **dict.fromkeys(("minItems", "maxItems"), _OF_ARRAYS),
    **dict.fromkeys(("minProperties", "maxProperties", "patternProperties", "propertyNames"), _OF_OBJECTS),
}
"""A keyword that has an effect where the type is given, or one of these keywords."""
_FORMATS_NOT_HELD = ("idn-email", "idn-hostname", "iri", "iri-reference", "regex")
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def faults(schema: Schema) -> Iterator[str]:
    """Of a schema whose values have any type that JSON has."""
    for rule in (_of_types, _of_fixed_values, _of_strings, _of_multiples, _of_objects):
        yield from rule(schema)


def _of_types(schema: Schema) -> Iterator[str]:
    kind = schema.get("type")
    if kind == []:
        yield "has a type that is an empty list; name a type"
    if kind is None and not {"enum", "const"} & schema.keys():
        for name, others in OF_A_TYPE.items():
            if name in schema and not any(other in schema for other in others):
                yield f"has {name!r} and no type, where it is not enforced; add the type"


def _of_fixed_values(schema: Schema) -> Iterator[str]:
    if not {"enum", "const"} & schema.keys():
        return
    beside = sorted(schema.keys() - ANNOTATIONS - {"enum", "const", "type"})
    if beside:
        yield f"has {beside[0]!r} beside 'enum' or 'const', where it is not enforced; leave it out"
    values = _listed(schema.get("enum")) if "enum" in schema else [schema["const"]]
    if len({"enum", "const"} & schema.keys()) == 2 and values != [schema["const"]]:
        yield "has 'enum' beside 'const', where it is not enforced; leave one out"
    kind = schema.get("type")
    kinds = _listed(kind) if isinstance(kind, list) else [kind]
    for value in values:
        if kind is not None and not any(_is_of(value, one) for one in kinds):
            yield f"allows {shown(value)}, which is not of its type {shown(kind)}"
        if _is_beyond(value):
            yield f"allows {shown(value)}, a number beyond 64 bits, which is not kept whole; leave it out"


def _of_strings(schema: Schema) -> Iterator[str]:
    length = next((name for name in ("minLength", "maxLength") if name in schema), None)
    if length is not None and ("pattern" in schema or "format" in schema):
        yield f"has {length!r} beside 'pattern' or 'format', where it is not enforced; put it into the pattern"
    if "pattern" in schema and "format" in schema:
        yield "has 'pattern' beside 'format', where one is not enforced; leave one out"
    if schema.get("format") in _FORMATS_NOT_HELD:
        yield f"has the format {schema['format']!r}, which is not enforced; leave it out"
    if isinstance(schema.get("pattern"), str):
        yield from _of_pattern(schema["pattern"])


def _of_pattern(pattern: str) -> Iterator[str]:
    """An anchor elsewhere than at the ends of an alternative is passed over."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    depth = 0
    for position, char in enumerate(plain):
        depth += {"(": 1, ")": -1}.get(char, 0)
        at_start, at_end = plain[:position][-1:] in ("", "|"), plain[position + 1 :][:1] in ("", "|")
        if (char == "^" and (depth or not at_start)) or (char == "$" and (depth or not at_end)):
            yield f"has the pattern {shown(pattern)}, with {char!r} inside, where it is not enforced; keep it to the ends"
            return


def _of_multiples(schema: Schema) -> Iterator[str]:
    if "multipleOf" not in schema:
        return
    multiple = schema["multipleOf"]
    if schema.get("type") != "integer":
        yield "has 'multipleOf' for a type other than integer, which is not enforced; leave it out"
    if not (isinstance(multiple, (int, float)) and float(multiple).is_integer() and multiple <= MAX_MULTIPLE):
        yield f"has 'multipleOf' {shown(multiple)}; it is enforced for integers up to {MAX_MULTIPLE}"
    low = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    high = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    numbers = all(isinstance(bound, (int, float)) for bound in (*low, *high))
    if (low or high) and not (low and high and numbers and min(high) - max(low) <= MAX_SPAN):
        yield f"has 'multipleOf' beside a range that is open or wider than {MAX_SPAN}, where it is not enforced; leave one out"


def _of_objects(schema: Schema) -> Iterator[str]:
    properties, patterns = _mapped(schema.get("properties")), _mapped(schema.get("patternProperties"))
    required = [name for name in _listed(schema.get("required")) if isinstance(name, str)]
    for name in required:
        if name not in properties:
            yield f"requires {shown(name)}, which its properties lack; add it there"
    if "propertyNames" in schema:
        closed = [name for name in ("additionalProperties", "unevaluatedProperties") if schema.get(name) is False]
        beside = [name for name in ("properties", "patternProperties") if name in schema] + closed
        if beside:
            yield f"has 'propertyNames' beside {beside[0]!r}, where it is not enforced; leave it out"
    values = list(patterns.values())
    if any(value != values[0] for value in values):
        yield "has several 'patternProperties', where a name of two of them is held to one; keep one"
    if patterns and properties:
        yield "has 'patternProperties' beside 'properties', where a name of both is held to one; leave one out"
    for pattern in patterns:
        yield from _of_pattern(pattern)
    has_free_names = bool(patterns) or "propertyNames" in schema or any(schema.get(name, False) is not False for name in _OF_OBJECTS[1:])
    least = schema.get("minProperties")
    if has_free_names and isinstance(least, int) and least > len(required) + 1:
        yield f"has 'minProperties' {least}, which names that come twice would meet, too; require the properties by name"


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES.get(str(kind), (object,)))


def _is_beyond(value: Any) -> bool:
    if isinstance(value, int):
        return not -(2**63) <= value < 2**63
    return any(map(_is_beyond, value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()))


def _mapped(value: Any) -> Schema:
    return cast(Schema, value) if isinstance(value, dict) else {}


def _listed(value: Any) -> Sequence[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []

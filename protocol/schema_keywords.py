"""Which keywords of JSON Schema an answer is held to. A schema that asks for another one is refused, never enforced in part.

The grammar's compiler passes over what it does not know. So each keyword that narrows a schema and has no effect there is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, cast

from .errors import InvalidRequest, shown

MAX_DEPTH = 64
NOT_ENFORCED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"),
    *("$dynamicRef", "$recursiveRef", "$anchor", "contentMediaType", "contentEncoding", "contentSchema"),
)
DESCRIPTIONS = frozenset("title description default examples example deprecated readOnly writeOnly $schema $comment".split())
ANNOTATIONS = DESCRIPTIONS | {"$id", "$defs", "definitions", "discriminator"}
"""They narrow nothing, and may stand beside anything."""
COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
"""What stands beside one of them has no effect."""
OF_A_TYPE = "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength pattern format".split()
"""They have an effect where the type is given alone."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


class _Place(NamedTuple):
    schema: Any
    path: str
    depth: int


def require_enforced(schema: Any) -> None:
    """Raises InvalidRequest, naming the keyword and where it stands, for a schema that the answer would not be held to."""
    places = [_Place(schema, "schema", 0)]
    while places:
        place = places.pop()
        if isinstance(place.schema, bool):
            continue
        if not isinstance(place.schema, dict):
            _refuse(place, f"is {shown(place.schema)}; a schema is an object or a boolean")
        if place.depth > MAX_DEPTH:
            raise InvalidRequest(f"the schema is nested more than {MAX_DEPTH} deep", param="response_format")
        _require_known(place, cast(dict[str, Any], place.schema))
        places += _inside(place, cast(dict[str, Any], place.schema))


def without_descriptions(schema: Any) -> Any:
    """The same schema for a grammar, which is as long as what is to be enforced."""
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in cast(dict[str, Any], schema).items():
        if name in _MAPS and isinstance(value, dict):
            found[name] = {key: without_descriptions(inner) for key, inner in cast(dict[str, Any], value).items()}
        elif name in _LISTS and isinstance(value, list):
            found[name] = [without_descriptions(inner) for inner in cast(list[Any], value)]
        elif name not in DESCRIPTIONS:
            found[name] = without_descriptions(value) if name in _SINGLE else value
    return found


def _require_known(place: _Place, schema: dict[str, Any]) -> None:
    for name in NOT_ENFORCED:
        if name in schema:
            _refuse(place, f"has {name!r}, which is not enforced; leave it out")
    if schema.get("uniqueItems"):
        _refuse(place, "has 'uniqueItems', which is not enforced; leave it out")
    combining = [name for name in COMBINING if name in schema]
    beside = sorted(schema.keys() - ANNOTATIONS - set(combining[:1]))
    if combining and beside:
        _refuse(place, f"has {beside[0]!r} beside {combining[0]!r}, where it is not enforced; move it into the schemas there")
    if len(schema.get("allOf") or [0]) > 1:
        _refuse(place, "has an allOf of several schemas, which is not enforced; write them as one")
    reference = schema.get("$ref", "#")
    if not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        _refuse(place, f"refers to {shown(reference)}; a reference must be '#' or begin with '#/'")
    _require_typed(place, schema)
    _require_declared(place, schema)


def _require_typed(place: _Place, schema: dict[str, Any]) -> None:
    kind = schema.get("type")
    bounds = [name for name in OF_A_TYPE if name in schema]
    if bounds and kind is None and "enum" not in schema and "const" not in schema:
        _refuse(place, f"has {bounds[0]!r} and no type, where it is not enforced; add the type")
    if "multipleOf" in schema and kind != "integer":
        _refuse(place, "has 'multipleOf' for a type other than integer, which is not enforced; leave it out")
    length = next((name for name in ("minLength", "maxLength") if name in schema), None)
    if length is not None and ("pattern" in schema or "format" in schema):
        _refuse(place, f"has {length!r} beside 'pattern' or 'format', where it is not enforced; put it into the pattern")
    if "pattern" in schema and "format" in schema:
        _refuse(place, "has 'pattern' beside 'format', where one is not enforced; leave one out")
    fixed = list(schema["enum"]) if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    kinds: list[Any] = cast(list[Any], kind) if isinstance(kind, list) else [kind]
    for value in fixed if kind is not None else ():
        if not any(_is_of(value, one) for one in kinds):
            _refuse(place, f"allows {shown(value)}, which is not of its type {shown(kind)}")
    if fixed and bounds:
        _refuse(place, f"has {bounds[0]!r} beside 'enum' or 'const', where it is not enforced; leave it out")


def _require_declared(place: _Place, schema: dict[str, Any]) -> None:
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list):
        return
    declared: dict[str, Any] = cast(dict[str, Any], properties) if isinstance(properties, dict) else {}
    for name in cast(list[Any], required):
        if name not in declared:
            _refuse(place, f"requires {shown(name)}, which its properties lack; add it there")


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES.get(str(kind), (object,)))


def _inside(place: _Place, schema: dict[str, Any]) -> Iterator[_Place]:
    for name in _MAPS:
        inner = schema.get(name)
        if isinstance(inner, dict):
            for key, value in cast(dict[str, Any], inner).items():
                yield _Place(value, f"{place.path}.{name}.{key}", place.depth + 1)
    for name in _LISTS:
        inner = schema.get(name)
        if isinstance(inner, list):
            for position, value in enumerate(cast(list[Any], inner)):
                yield _Place(value, f"{place.path}.{name}[{position}]", place.depth + 1)
    for name in _SINGLE:
        if name in schema:
            inner = schema[name]
            if name == "propertyNames" and isinstance(inner, dict):
                inner = {"type": "string", **cast(dict[str, Any], inner)}  # a name is nothing else
            yield _Place(inner, f"{place.path}.{name}", place.depth + 1)


def _refuse(place: _Place, what: str) -> NoReturn:
    raise InvalidRequest(f"{place.path} {what}", param="response_format")

"""What a body's text has to match: response_format as OpenAI has it, structured_outputs and guided_* as vLLM has them.

response_format | structured_outputs: {json | regex | choice | grammar | json_object} | guided_json, … ─► one Grammar, or none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from ...protocol.errors import InvalidRequest, shown
from ...protocol.grammar import Grammar, compact, grammar_of

_OF_KIND: dict[str, Callable[[Any], Grammar | None]] = {
    "json": lambda value: Grammar("json_schema", value) if isinstance(value, str) else Grammar.of_schema(value),
    "regex": lambda value: grammar_of({"type": "regex", "regex": value}),
    "choice": Grammar.of_choices,
    "grammar": lambda value: grammar_of({"type": "ebnf", "ebnf": value}),
    "json_object": lambda value: Grammar("json_object") if value else None,
    "structural_tag": lambda value: Grammar("structural_tag", value if isinstance(value, str) else compact(value)),
}
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def answer_grammar(response_format: Any, structured_outputs: Any, guided: Mapping[str, Any]) -> Grammar | None:
    """guided: of GUIDED, those that the body has. Raises InvalidRequest where there are two, or one is wrong."""
    found: dict[str, Grammar | None] = {}
    if response_format is not None:
        found["response_format"] = grammar_of(response_format)
    if structured_outputs is not None:
        found.update(_structured(structured_outputs))
    found.update({name: _OF_KIND[name.removeprefix("guided_")](value) for name, value in guided.items() if value is not None})
    grammars = {name: grammar for name, grammar in found.items() if grammar is not None}
    if len(grammars) > 1:
        first, second, *_ = grammars
        raise InvalidRequest(f"{first} and {second} both say what the answer has to match; send one of them", param=second)
    return next(iter(grammars.values()), None)


def _structured(structured_outputs: Any) -> dict[str, Grammar | None]:
    if not isinstance(structured_outputs, dict):
        raise InvalidRequest(f"structured_outputs is {shown(structured_outputs)}; it must be an object", param="structured_outputs")
    given = {name: value for name, value in cast(dict[str, Any], structured_outputs).items() if value is not None}
    for name in given:
        if name not in _OF_KIND:
            raise InvalidRequest(
                f"structured_outputs.{name[:80]} is not supported; it may have {', '.join(_OF_KIND)}",
                param=f"structured_outputs.{name[:80]}",
            )
    return {f"structured_outputs.{name}": _OF_KIND[name](value) for name, value in given.items()}

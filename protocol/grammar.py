"""Grammar: what an answer's text has to match. One value from the client to both workers.

response_format ─► Grammar(kind, text) ─► SamplingParams ─► worker: compiled ─► a mask of the next tokens, by the tokens so far
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from .errors import InvalidRequest, shown
from .schema_keywords import require_enforced

KINDS = ("json_object", "json_schema", "regex", "ebnf", "choice", "structural_tag", "tools")
MAX_GRAMMAR_BYTES = 2**16
MAX_CHOICES = 1000
MAX_REPEATS = 10_000
_REPEAT = re.compile(r"\{\s*\d*\s*,?\s*(\d+)\s*\}")
_PARAM = "response_format"


@dataclass(frozen=True, slots=True)
class Grammar:
    """Raises InvalidRequest for a kind that is none, and for what is wrong with the text as far as that shows without its compiler.

    Attributes:
        kind: of KINDS.
        text: a regular expression or a grammar in EBNF; JSON of a schema, a list of choices or a structural tag; json_object: "".
            tools: a structural tag that was made of a request's tools.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(f"a grammar's kind is {shown(self.kind)}; it must be one of {', '.join(KINDS)}", param=_PARAM)
        try:
            num_bytes = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the {self.kind} has half a surrogate pair at character {error.start}", param=_PARAM) from error
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"the {self.kind} has {num_bytes} bytes; it may have {MAX_GRAMMAR_BYTES}", param=self.param)
        if self.kind != "json_object" and not self.text:
            raise InvalidRequest(f"the {self.kind} is empty", param=_PARAM)
        if self.kind == "json_schema":
            require_enforced(_parsed(self.text, self.kind))
        elif self.kind == "choice":
            _require_choices(_parsed(self.text, self.kind))
        elif self.kind in ("regex", "ebnf"):
            self._require_few_repeats()

    @property
    def param(self) -> str:
        """The field of a request that it came from."""
        return "tools" if self.kind == "tools" else _PARAM

    def _require_few_repeats(self) -> None:
        most = max(map(int, (found for found in _REPEAT.findall(self.text) if len(found) < 20)), default=0)
        if most > MAX_REPEATS:
            raise InvalidRequest(f"the {self.kind} repeats something {most} times; it may {MAX_REPEATS} times", param=_PARAM)

    @classmethod
    def of_schema(cls, schema: Any) -> Grammar:
        """Raises InvalidRequest for what is no JSON schema, or asks for what is not enforced."""
        return cls("json_schema", compact(schema))

    @classmethod
    def of_choices(cls, choices: Any) -> Grammar:
        return cls("choice", compact(choices))


def grammar_of(response_format: Any) -> Grammar | None:
    """None for {"type": "text"}. Raises InvalidRequest.

    Args:
        response_format: OpenAI's {"type": "json_object"} and {"type": "json_schema", "json_schema": {"schema": ...}}; and of the same shape
            "regex", "ebnf" (or "grammar") and "choice", each with a field of that name.
    """
    if not isinstance(response_format, Mapping):
        raise InvalidRequest(f"response_format is {shown(response_format)}; it must be an object with a type", param=_PARAM)
    given = cast(Mapping[str, Any], response_format)
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    if kind == "json_schema":
        return Grammar.of_schema(_schema_in(given.get("json_schema")))
    if kind == "choice":
        return Grammar.of_choices(given.get("choice"))
    if kind in ("regex", "ebnf", "grammar"):
        text = given.get(kind)
        if not isinstance(text, str):
            raise InvalidRequest(f"response_format.{kind} is {shown(text)}; it must be a string", param=f"{_PARAM}.{kind}")
        return Grammar("regex" if kind == "regex" else "ebnf", text)
    raise InvalidRequest(
        f"response_format.type is {shown(kind)}; it must be text, json_object, json_schema, regex, ebnf or choice", param=f"{_PARAM}.type"
    )


def compact(value: Any) -> str:
    """JSON without blanks, keys in their order: one text for one value. Raises InvalidRequest."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"response_format can't be written as JSON: {error}", param=_PARAM) from error


def _schema_in(named: Any) -> Any:
    if not isinstance(named, Mapping) or "schema" not in named:
        raise InvalidRequest("response_format.json_schema must be an object with a schema", param=f"{_PARAM}.json_schema")
    return cast(Mapping[str, Any], named)["schema"]


def _parsed(text: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the {kind} is not JSON: {error}", param=_PARAM) from error


def _require_choices(choices: Any) -> None:
    found: list[Any] = cast(list[Any], choices) if isinstance(choices, list) else []
    if not found or not all(isinstance(one, str) and one for one in found):
        raise InvalidRequest(f"choice is {shown(choices)}; it must be a list of strings that are not empty", param=_PARAM)
    if len(found) > MAX_CHOICES:
        raise InvalidRequest(f"choice has {len(found)} strings; it may have {MAX_CHOICES}", param=_PARAM)

"""proxy/text/tool_parsers: what each format's answers consist of, however they are cut."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.config import ToolParserName
from halfmoon.proxy.text.answer_parts import CallArguments, CallBegin, Content, Part, merged
from halfmoon.proxy.text.tool_parsers import TOOL_PARSERS

NAMES = {"get_weather", "add"}
WEATHER, SUM = ("get_weather", {"city": 'Zürich \\ "}]\n', "days": [1, 2.5, None]}), ("add", {"a": -1, "b": {"c": True}})
Calls = Sequence[tuple[str, dict[str, Any]]]


def hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps({'name': name, 'arguments': found})}\n</tool_call>" for name, found in calls)


def hermes_backwards(calls: Calls) -> str:
    return "\n".join(f"<tool_call>{json.dumps({'arguments': found, 'name': name})}</tool_call>" for name, found in calls)


def llama(calls: Calls) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": found}) for name, found in calls)


def mistral(calls: Calls) -> str:
    return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": found, "id": "abcdefghi"} for name, found in calls])


def mistral_named(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]abcdefghi[ARGS]{json.dumps(found)}" for name, found in calls)


def pythonic(calls: Calls) -> str:
    return "[" + ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in found.items())})" for name, found in calls) + "]"


FORMS: dict[str, list[Any]] = {
    "hermes": [hermes, hermes_backwards],
    "llama3_json": [llama, lambda calls: "<|python_tag|>" + llama(calls)],
    "mistral": [mistral, mistral_named],
    "pythonic": [pythonic, lambda calls: f"<|python_start|>{pythonic(calls)}<|python_end|>"],
}
CASES = [(name, form) for name, forms in FORMS.items() for form in forms]


def read(name: str, pieces: Sequence[str]) -> list[Part]:
    """Ids are taken out: they are random."""
    parser = TOOL_PARSERS[name](NAMES)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    return [part._replace(id="") if isinstance(part, CallBegin) else part for part in merged(parts)]


def cut(text: str, places: Sequence[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def calls_in(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    texts = {part.number: part.text for part in parts if isinstance(part, CallArguments)}
    return [(part.name, json.loads(texts[part.number])) for part in parts if isinstance(part, CallBegin)]


def content_in(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def test_every_parser_has_a_name_in_the_configuration_and_a_form_here() -> None:
    assert set(get_args(ToolParserName)) - {"auto", "none"} == set(TOOL_PARSERS) == set(FORMS)


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.parametrize("calls", [[WEATHER], [WEATHER, SUM, WEATHER], [("add", {})]])
def test_calls_are_read_character_by_character_and_nothing_of_them_is_content(name: str, form: Any, calls: Any) -> None:
    parts = read(name, list(form(calls)))
    assert calls_in(parts) == calls and content_in(parts) == ""


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[0] in ("hermes", "mistral")])
def test_text_before_a_marked_call_is_content(name: str, form: Any) -> None:
    parts = read(name, list("Let me see. <tool [TOOL\n" + form([SUM])))
    assert content_in(parts) == "Let me see. <tool [TOOL\n" and calls_in(parts) == [SUM]


def test_text_behind_a_call_is_content_and_blanks_around_calls_are_not() -> None:
    assert content_in(read("hermes", ["\n\n", hermes([SUM, SUM]), "\n Done.\n"])) == "\n Done.\n"
    assert content_in(read("hermes", ["\n\n", hermes([SUM, SUM]), "\n"])) == ""


def test_blanks_of_an_answer_without_calls_stay() -> None:
    for name in TOOL_PARSERS:
        assert read(name, ["\n", " a ", "\n"]) == [Content("\n a \n")]
        assert read(name, ["\n", " "]) == [Content("\n ")]


def test_a_name_comes_first_and_arguments_as_they_are_written() -> None:
    parser = TOOL_PARSERS["hermes"](NAMES)
    assert parser.push('<tool_call>\n{"name": "add", "arguments"') == []
    begin, first = parser.push(': {"a": 1')
    assert isinstance(begin, CallBegin) and (begin.number, begin.name) == (0, "add") and re.fullmatch("call_[0-9a-f]{24}", begin.id)
    assert first == CallArguments(0, '{"a": ')
    assert parser.push(', "b": "x') == [CallArguments(0, '1, "b": "x')]
    assert parser.push('y"}') == [CallArguments(0, 'y"}')]
    assert parser.push("}\n</tool_call>") == parser.finish() == []


def test_no_half_of_a_marker_is_content() -> None:
    parser = TOOL_PARSERS["hermes"](NAMES)
    assert [parser.push(piece) for piece in ("a", " <", "tool", "_x", "<")] == [
        [Content("a")],
        [Content(" ")],
        [],
        [Content("<tool_x")],
        [],
    ]
    assert parser.finish() == [Content("<")]


def test_mistral_s_ids_are_as_its_template_requires() -> None:
    begin = next(part for part in TOOL_PARSERS["mistral"](NAMES).push(mistral([SUM])) if isinstance(part, CallBegin))
    assert re.fullmatch("[A-Za-z0-9]{9}", begin.id)


MALFORMED = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>add(1)</tool_call>"),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{]"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "argu'),
    ("llama3_json", '{"answer": 42, "name": "add"}'),
    ("llama3_json", '{"name": "Ann", "parameters": {}}'),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("llama3_json", 'It is {"name": "add", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("mistral", "[TOOL_CALLS]add(1)"),
    ("mistral", "[TOOL_CALLS]" + "a" * 200 + "[ARGS]{}"),
    ("pythonic", "[1] Knuth"),
    ("pythonic", "[add(1, 2)]"),
    ("pythonic", "[add(a=open('x'))]"),
    ("pythonic", "[add(**{})]"),
    ("pythonic", "[subtract(a=1)]"),
    ("pythonic", "[add(a='unclosed)]"),
    ("pythonic", "[add(a={1})]"),
    ("pythonic", '[{"name": "Ann", "arguments": {}}]'),
    ("pythonic", "I call [add(a=1)]"),
]


@pytest.mark.parametrize(("name", "text"), MALFORMED)
def test_what_is_no_call_is_content_to_the_last_character(name: str, text: str) -> None:
    for whole in (text, f"\n{text}", f"{text}\n\nSo be it."):
        assert read(name, list(whole)) == [Content(whole)]


def test_a_broken_call_is_followed_by_what_comes_next() -> None:
    broken = '<tool_call>{"name": <tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert read("hermes", list(broken)) == [Content('<tool_call>{"name": '), CallBegin(0, "", "add"), CallArguments(0, "{}")]


def test_arguments_that_turn_out_to_be_no_json_end_there_and_the_rest_is_content() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>'
    assert read("hermes", list(text)) == [CallBegin(0, "", "add"), CallArguments(0, '{"a": '), Content("oops}}</tool_call>")]
    listed = '[TOOL_CALLS][{"name": "add", "arguments": {}}, oops]'
    assert read("mistral", list(listed)) == [CallBegin(0, "", "add"), CallArguments(0, "{}"), Content(", oops]")]


def test_an_answer_that_is_cut_off_has_the_arguments_so_far() -> None:
    arguments, text = json.dumps(WEATHER[1]), hermes([WEATHER])
    end = text.index("[1, ") + 4
    assert read("hermes", [text[:end]])[-1] == CallArguments(0, arguments[: arguments.index("[1, ") + 4])


def test_arguments_may_come_as_a_string_or_not_at_all() -> None:
    for value in (json.dumps('{"a": 1}'), '"{\\n\\"a\\": 1}"'):
        assert calls_in(read("hermes", [f'<tool_call>{{"name": "add", "arguments": {value}}}</tool_call>'])) == [("add", {"a": 1})]
    for rest in ("", ', "arguments": null', ', "arguments": {}'):
        assert calls_in(read("hermes", [f'<tool_call>{{"name": "add"{rest}}}</tool_call>'])) == [("add", {})]


def test_a_raw_newline_in_a_string_is_given_on_as_json() -> None:
    assert calls_in(read("hermes", ['<tool_call>{"name": "add", "arguments": {"a": "1\n\t2"}}'])) == [("add", {"a": "1\n\t2"})]


def test_half_a_surrogate_pair_can_be_sent() -> None:
    parts = read("pythonic", ["[add(a='\\ud800é')]"])
    assert calls_in(parts) == [("add", {"a": "\ud800é"})]
    assert all(part.text.encode() for part in parts if isinstance(part, CallArguments))


def test_a_marked_call_may_be_of_a_function_that_there_is_not() -> None:
    assert calls_in(read("hermes", [hermes([("invented", {})])])) == [("invented", {})]


def test_deep_nesting_ends_a_call_and_not_the_process() -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {"[" * 5000}'
    assert content_in(read("hermes", [text])) == text
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": {"[" * 5000}'
    parts = read("hermes", [text])
    assert sum(len(part.text) for part in parts if not isinstance(part, CallBegin)) == 5000 + len('{"a": ')
    assert content_in(read("pythonic", [f"[add(a={'[' * 5000}{']' * 5000})]"])).startswith("[add(a=[")


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_start|>", "<|python_end|>"),
        *(
            '{"name": "add", "arguments": {',
            '"name"',
            '"parameters": {',
            '"add"',
            "add(",
            "a=",
            "'",
            '"',
            "\\",
            "\\u00e9",
            "\\u",
            ":",
            ",",
            ";",
        ),
        *("{", "}", "[", "]", "(", ")", " ", "\n", "1", "-", "true", "null", "é", "x", "<", "get_weather", "{}", "}}"),
    ]
)
TEXTS = st.lists(FRAGMENTS, max_size=25).map("".join)
WHOLE = st.sampled_from([form([call]) for _, form in CASES for call in (WEATHER, SUM)])
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=120, deadline=None)
@given(before=TEXTS, call=st.one_of(st.just(""), WHOLE), after=TEXTS, places=PLACES)
def test_however_an_answer_is_cut_it_is_read_the_same(name: str, before: str, call: str, after: str, places: list[int]) -> None:
    text = before + call + after
    whole = read(name, [text])
    assert read(name, cut(text, places)) == read(name, list(text)) == whole
    if not any(isinstance(part, CallBegin) for part in whole):
        assert content_in(whole) == text

"""What answers are held to, compiled as workers do: it lets the forms through that the parsers read, and nothing that breaks a schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from halfmoon.engine.grammar_compiler import GrammarCompiler
from halfmoon.protocol.config import ModelOptions, ReasoningParserName, ToolParserName
from halfmoon.protocol.grammar import Grammar
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.proxy.text.answer_form import AnswerForm, AnswerForms
from halfmoon.proxy.text.answer_parts import CallArguments, CallBegin, Content, Part
from halfmoon.proxy.text.detokenizer import create_detokenizer
from halfmoon.proxy.text.tokenizer import Tokenizer
from halfmoon.proxy.text.tools import NO_TOOLS, Function, ToolUse

ADD_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ADD, NOW = Function("add", ADD_SCHEMA), Function("now", {"type": "object", "properties": {}})
STRICT = Function("add", ADD_SCHEMA, strict=True)
EOS = 1
MARKERS = {
    "plain": [],
    "special": ["[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>"],
    "newest": ["[TOOL_CALLS]", "[ARGS]"],
}


@pytest.fixture(scope="module")
def folders(faces: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by which markers are special tokens of theirs."""
    found: dict[str, Path] = {}
    for name, markers in MARKERS.items():
        folder = found[name] = faces.write_model_folder(tmp_path_factory.mktemp("markers") / name)
        backend = Tokenizer.from_folder(folder)._backend
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in markers])
        backend.save(str(folder / "tokenizer.json"))
    return found


class Model:
    """Whatever its grammar lets through, it says."""

    def __init__(self, folder: Path, tools: ToolParserName, reasoning: ReasoningParserName = "none") -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.forms = AnswerForms.chosen(self.tokenizer, ModelOptions(tool_parser=tools, reasoning_parser=reasoning))
        self._compiler = GrammarCompiler.from_folder(folder, self.tokenizer.vocab_size, frozenset({EOS}))

    def form(self, use: ToolUse, prompt: str = "assistant\n") -> AnswerForm:
        form = self.forms.of(use, self.tokenizer.encode(prompt, add_special_tokens=False))
        assert form is not None
        return form

    def lets_through(self, grammar: Grammar | None, text: str) -> bool:
        """Every token of the text, and then the end."""
        assert grammar is not None
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        state = self._compiler.state(self._compiler.compile(grammar), SamplingParams(grammar=grammar))
        words = np.zeros(-(-self.tokenizer.vocab_size // 32), dtype=np.int32)
        for position, token_id in enumerate([*token_ids, EOS]):
            state.fill(token_ids[:position], words)
            if not words.view(np.uint32)[token_id // 32] >> np.uint32(token_id % 32) & 1:
                return False
        return True

    def reads(self, form: AnswerForm, text: str) -> list[Part]:
        detokenizer, parser = create_detokenizer(self.tokenizer, shown=form.shown), form.parser()
        pieces = [detokenizer.push(token_id) for token_id in self.tokenizer.encode(text, add_special_tokens=False)]
        return [part for piece in [*pieces, detokenizer.finish()] for part in parser.push(piece)] + parser.finish()


def calls_in(parts: list[Part]) -> list[tuple[str, Any]]:
    arguments: dict[int, str] = {}
    for part in parts:
        if isinstance(part, CallArguments):
            arguments[part.number] = arguments.get(part.number, "") + part.text
    assert not any(isinstance(part, Content) for part in parts)
    return [(part.name, json.loads(arguments[part.number])) for part in parts if isinstance(part, CallBegin)]


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


ONE, TWO = '{"name": "add", "arguments": {"a": 5}}', '{"name": "now", "arguments": {}}'
CASES = [
    ("plain", "hermes", hermes(ONE), hermes(ONE, TWO), hermes(ONE.replace("5", '"5"'))),
    ("special", "hermes", hermes(ONE), hermes(ONE, TWO), hermes(ONE.replace('"a"', '"b"'))),
    ("plain", "mistral", f"[TOOL_CALLS][{ONE}]", f"[TOOL_CALLS][{ONE}, {TWO}]", f"[TOOL_CALLS][{ONE}"),
    ("special", "mistral", f"[TOOL_CALLS] [{ONE}]", f"[TOOL_CALLS] [{ONE}, {TWO}]", f"[{ONE}]"),
    (
        "newest",
        "mistral",
        '[TOOL_CALLS]add[ARGS]{"a": 5}',
        '[TOOL_CALLS]add[ARGS]{"a": 5}[TOOL_CALLS]now[ARGS]{}',
        "[TOOL_CALLS]now[ARGS]1",
    ),
    ("plain", "llama3_json", ONE.replace("arguments", "parameters"), "", ONE),
    (
        "plain",
        "pythonic",
        f"[{ONE}]".replace("arguments", "parameters"),
        f"[{ONE}, {TWO}]".replace("arguments", "parameters"),
        "[add(a=5)]",
    ),
]


@pytest.mark.parametrize(("markers", "name", "one", "two", "wrong"), CASES)
def test_required_calls_are_those_that_the_parser_reads(
    markers: str, name: Any, one: str, two: str, wrong: str, folders: dict[str, Path]
) -> None:
    model = Model(folders[markers], name)
    form = model.form(ToolUse([ADD, NOW], [], "required"))
    grammar = form.grammar(None)
    assert model.lets_through(grammar, one) and calls_in(model.reads(form, one)) == [("add", {"a": 5})]
    if two:
        assert model.lets_through(grammar, two) and calls_in(model.reads(form, two)) == [("add", {"a": 5}), ("now", {})]
        assert not model.lets_through(model.form(ToolUse([ADD, NOW], [], "required", parallel=False)).grammar(None), two)
        assert not model.lets_through(model.form(ToolUse([ADD, NOW], [], ADD)).grammar(None), two)
    for text in (wrong, "", "Hello", one + "x"):
        assert not model.lets_through(grammar, text)
    named = model.form(ToolUse([ADD, NOW], [], NOW)).grammar(None)
    assert not model.lets_through(named, one) and model.lets_through(named, one.replace("add", "now").replace('"a": 5', ""))


@pytest.mark.parametrize(("markers", "name", "one", "two", "wrong"), CASES[:5])
def test_where_the_model_is_free_to_call_it_is_held_from_the_marker_on(
    markers: str, name: Any, one: str, two: str, wrong: str, folders: dict[str, Path]
) -> None:
    model = Model(folders[markers], name)
    assert model.form(ToolUse([ADD, NOW], [], "auto")).grammar(None) is None
    grammar = model.form(ToolUse([STRICT, NOW], [], "auto")).grammar(None)
    for text in ("Hello [TOOL <tool", "", one, two, f"Hello {one}"):
        assert model.lets_through(grammar, text), text
    for text in (one.replace("5", '"5"'), one.replace("add", "sub")):
        assert not model.lets_through(grammar, text)
    single = model.form(ToolUse([STRICT, NOW], [], "auto", parallel=False)).grammar(None)
    assert model.lets_through(single, f"Hello {one}") and not model.lets_through(single, two)


def test_beside_a_strict_function_another_takes_any_object_where_the_model_is_free_to_call(folders: dict[str, Path]) -> None:
    model, other = Model(folders["plain"], "hermes"), Function("sub", ADD_SCHEMA)
    call = hermes('{"name": "sub", "arguments": {"z": []}}')
    assert model.lets_through(model.form(ToolUse([STRICT, other], [], "auto")).grammar(None), call)
    assert not model.lets_through(model.form(ToolUse([STRICT, other], [], "required")).grammar(None), call)


def test_calls_that_can_t_be_told_from_text_are_not_held(folders: dict[str, Path]) -> None:
    for name in ("llama3_json", "pythonic"):
        assert Model(folders["plain"], name).form(ToolUse([STRICT], [], "auto")).grammar(None) is None


THOUGHT = "<think>\nA [b] {c}.\n</think>\n\n"


@pytest.mark.parametrize("markers", ["plain", "special"])
@pytest.mark.parametrize("asked", [Grammar("json_schema", json.dumps(ADD_SCHEMA)), Grammar("choice", '["{\\"a\\": 5}", "no"]')])
def test_a_model_may_reason_before_what_it_is_held_to(markers: str, asked: Grammar, folders: dict[str, Path]) -> None:
    answer, thinking = '{"a": 5}', Model(folders[markers], "none", "qwen3")
    free, begun = thinking.form(NO_TOOLS).grammar(asked), thinking.form(NO_TOOLS, "assistant\n<think>\n").grammar(asked)
    assert thinking.lets_through(free, answer) and thinking.lets_through(free, THOUGHT + answer)
    assert not thinking.lets_through(free, THOUGHT) and not thinking.lets_through(free, "x" + answer)
    assert thinking.lets_through(begun, f"Hm.</think>{answer}") and not thinking.lets_through(begun, answer)
    assert thinking.form(NO_TOOLS, "<think>\n\n</think>\n\n").grammar(asked) is asked
    always = Model(folders[markers], "none", "deepseek_r1").form(NO_TOOLS).grammar(asked)
    assert thinking.lets_through(always, THOUGHT + answer) and not thinking.lets_through(always, answer)


@pytest.mark.parametrize("kind", ["json_object", "regex", "ebnf", "structural_tag"])
def test_every_kind_of_grammar_may_follow_reasoning_or_stand_beside_calls(kind: str, folders: dict[str, Path]) -> None:
    text = {
        "json_object": "",
        "regex": r"\{[^}]*\}",
        "ebnf": 'root ::= "{" [a-z0-9": ]* "}"',
        "structural_tag": '{"type": "structural_tag", "format": {"type": "const_string", "value": "{\\"a\\": 5}"}}',
    }[kind]
    model = Model(folders["plain"], "hermes", "qwen3")
    grammar = model.form(ToolUse([ADD], [], "auto")).grammar(Grammar(kind, text))
    for answer in ('{"a": 5}', THOUGHT + '{"a": 5}', hermes(ONE), THOUGHT + hermes(ONE)):
        assert model.lets_through(grammar, answer)
    assert not model.lets_through(grammar, "Hello")


def test_a_special_token_is_let_through_where_it_is_named_and_nowhere_else(folders: dict[str, Path]) -> None:
    model = Model(folders["special"], "mistral")
    assert not model.lets_through(Grammar("regex", r"[^a]*"), "[TOOL_CALLS]")
    assert not model.lets_through(Grammar("json_object"), '{"a": "[TOOL_CALLS]"}')

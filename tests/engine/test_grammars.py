"""What a grammar lets through: compared with a regular expression's partial matches, and with what the next tokens spell."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.engine.compile_lanes import MAX_LATE
from halfmoon.engine.grammar_compiler import GrammarCompiler
from halfmoon.engine.grammars import Grammars
from halfmoon.engine.vocabulary import read_vocabulary
from halfmoon.protocol.errors import InvalidRequest, Overloaded
from halfmoon.protocol.grammar import Grammar
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.tests.waiting import until

EOS = 0
TEXTS = [
    b"",
    *(bytes([byte]) for byte in range(32, 127)),
    b"ab",
    b"12",
    b"-1",
    b'{"',
    b'":',
    b'"}',
    "é".encode(),
    "é".encode()[:1],
    "é".encode()[1:],
]
NUM_WORDS = -(-len(TEXTS) // 32)
PATTERNS = ["[ab]{1,4}(12|34)?", "-?[0-9]{1,3}", "(ab|a)*b", "é+|e", r"[A-Z]{2}-\d{2}"]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TEXTS, frozenset({EOS}))


def allowed(state: Any, token_ids: list[int]) -> set[int]:
    words = np.zeros(NUM_WORDS, dtype=np.int32)
    state.fill(token_ids, words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: len(TEXTS)]).tolist())


def state_of(compiler: GrammarCompiler, grammar: Grammar, **params: Any) -> Any:
    return compiler.state(compiler.compile(grammar), SamplingParams(grammar=grammar, **params))


def expected(pattern: str, text: bytes) -> set[int]:
    """By partial matches of whole characters: every token after which the text may still become a match, and the end where it is one."""
    found = {EOS} if regex.fullmatch(pattern, text.decode("utf-8", "ignore")) and _is_whole(text) else set()
    for token_id, piece in enumerate(TEXTS):
        if piece and any(_may_go_on(pattern, text + piece + rest) for rest in (b"", "é".encode()[1:])):
            found.add(token_id)
    return found


def _is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _may_go_on(pattern: str, text: bytes) -> bool:
    return _is_whole(text) and regex.fullmatch(pattern, text.decode(), partial=True) is not None


@settings(max_examples=60, deadline=None)
@given(data=st.data(), pattern=st.sampled_from(PATTERNS))
def test_a_token_is_let_through_if_and_only_if_the_text_may_still_match(
    compiler: GrammarCompiler, data: st.DataObject, pattern: str
) -> None:
    state = state_of(compiler, Grammar("regex", pattern))
    token_ids: list[int] = []
    for _ in range(8):
        found = allowed(state, token_ids)
        assert found == expected(pattern, b"".join(TEXTS[token_id] for token_id in token_ids))
        going_on = sorted(found - {EOS})
        if not going_on:
            return
        token_ids.append(data.draw(st.sampled_from(going_on)))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_state_that_is_told_all_tokens_at_once_is_that_of_a_straight_run(compiler: GrammarCompiler, data: st.DataObject) -> None:
    grammar = Grammar.of_schema({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["ab", "a"]}}, "required": ["a"]})
    straight, token_ids = state_of(compiler, grammar), list[int]()
    for _ in range(25):
        found = allowed(straight, token_ids)
        assert found == allowed(state_of(compiler, grammar), token_ids)
        going_on = sorted(found - {EOS})
        if not going_on:
            break
        token_ids.append(data.draw(st.sampled_from(going_on)))
    half = token_ids[: len(token_ids) // 2]
    assert allowed(straight, half) == allowed(state_of(compiler, grammar), half)  # and it goes back, too


def test_tokens_of_another_grammar_are_an_error(compiler: GrammarCompiler) -> None:
    state = state_of(compiler, Grammar("regex", "[0-9]+"))
    with pytest.raises(ValueError, match="number 2 of the answer"):
        allowed(state, [TEXTS.index(b"1"), TEXTS.index(b"a")])


def test_before_min_tokens_an_answer_ends_only_where_nothing_else_can_follow(compiler: GrammarCompiler) -> None:
    one, ends = TEXTS.index(b"1"), Grammar("regex", "1{1,3}")
    assert EOS in allowed(state_of(compiler, ends), [one])
    assert allowed(state_of(compiler, ends, min_tokens=9), [one]) == {one}
    assert allowed(state_of(compiler, ends, min_tokens=9), [one] * 3) == {EOS}


def test_a_stop_token_without_text_ends_an_answer_where_it_may_end_and_one_with_text_is_text(compiler: GrammarCompiler) -> None:
    texts = [*TEXTS, b""]
    other = len(TEXTS)
    state = state_of(GrammarCompiler(texts, frozenset({EOS})), Grammar("regex", "1b?"), stop_token_ids=(other, TEXTS.index(b"b")))
    words = np.zeros(-(-len(texts) // 32), dtype=np.int32)
    state.fill([TEXTS.index(b"1")], words)
    found = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: len(texts)]).tolist()
    assert found == [EOS, TEXTS.index(b"b"), other]


def test_a_string_of_limited_length_has_no_raw_tab_and_no_token_that_holds_one() -> None:
    texts = [*TEXTS, b"\t", b'a\t"', b"\n"]
    compiler = GrammarCompiler(texts, frozenset({EOS}))
    words = np.zeros(-(-len(texts) // 32), dtype=np.int32)
    for schema, begins in (
        ({"type": "string", "maxLength": 3}, b'"'),
        ({"type": "array", "items": {"type": "string", "maxLength": 3}}, b"["),
    ):
        state_of(compiler, Grammar.of_schema(schema)).fill([texts.index(begins)], words)
        found = {texts[index] for index in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: len(texts)])}
        assert not any(b"\t" in text for text in found) and (b"a" in found or b"\n" in found)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("regex", "(["), "Unclosed"),
        (Grammar("regex", "(?<=a)b"), "Lookbehind"),
        (Grammar("ebnf", "root ::= foo"), '"foo" is not defined'),
        (Grammar("ebnf", 'root ::= "'), "line 1, column 11"),
        (Grammar.of_schema({"type": "what"}), "what"),
        (Grammar.of_schema({"$ref": "#/nope"}), "nope"),
        (Grammar.of_schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength 5"),
        (Grammar("structural_tag", "{}"), "structural_tag"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_compiler_s_reason(compiler: GrammarCompiler, grammar: Grammar, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.compile(grammar)
    assert says in refused.value.message and "/project/" not in refused.value.message and refused.value.fields["param"] == "response_format"


def write_tokenizer(folder: Path, **fields: Any) -> Path:
    tokenizer: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": {"a": 0, "Ġb": 1, "Ã©": 2, "</s>": 3}},
        "added_tokens": [{"id": 3, "content": "</s>", "special": True}, {"id": 4, "content": "<tool_call>", "special": False}],
        "decoder": {"type": "ByteLevel"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | fields))
    return folder


def test_the_bytes_of_byte_level_and_sentence_piece_tokens(tmp_path: Path) -> None:
    assert read_vocabulary(write_tokenizer(tmp_path), 6) == [b"a", b" b", "é".encode(), b"", b"<tool_call>", b""]
    parts = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    vocab = {"type": "Unigram", "vocab": [["▁a", 0.0], ["<0xC3>", 0.0], ["é", 0.0]]}
    folder = write_tokenizer(tmp_path, model=vocab, decoder={"type": "Sequence", "decoders": parts}, added_tokens=[])
    assert read_vocabulary(folder, 4) == [b" a", b"\xc3", "é".encode(), b""]


def test_a_folder_without_a_tokenizer_of_bytes_refuses_grammars(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        read_vocabulary(tmp_path, 4)
    with pytest.raises(InvalidRequest, match="decodes by WordPiece"):
        read_vocabulary(write_tokenizer(tmp_path, decoder={"type": "WordPiece"}), 4)
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        GrammarCompiler.from_folder(write_tokenizer(tmp_path), 6, frozenset())


@pytest.fixture
async def grammars(tmp_path: Path) -> AsyncIterator[Grammars]:
    found = Grammars(write_tokenizer(tmp_path), 6, frozenset({3}), "test-grammars")
    yield found
    await found.close()


async def test_a_grammar_is_compiled_once_for_all_who_ask_and_each_has_its_own_state(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Grammar] = []
    compile_one = GrammarCompiler.compile

    def counting(self: GrammarCompiler, grammar: Grammar) -> Any:
        compiled.append(grammar)
        return compile_one(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "compile", counting)
    params = SamplingParams(grammar=Grammar("regex", "a+"))
    states = [*await asyncio.gather(*(grammars.state_of(params) for _ in range(4))), await grammars.state_of(params)]
    assert compiled == [params.grammar] and len({id(state) for state in states}) == 5
    bad = SamplingParams(grammar=Grammar("regex", "(["))
    for _ in range(2):  # a failure is not kept
        with pytest.raises(InvalidRequest):
            await grammars.state_of(bad)
    assert len(compiled) == 3
    assert await grammars.state_of(SamplingParams()) is None


async def test_who_leaves_while_a_grammar_is_compiled_leaves_it_to_the_others(grammars: Grammars) -> None:
    params = SamplingParams(grammar=Grammar("regex", "a{1,300}"))
    first, second = (asyncio.ensure_future(grammars.state_of(params)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is not None


async def test_a_grammar_that_takes_too_long_is_refused_and_holds_nobody_up(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars.warm_up()
    compiled: list[Grammar] = []
    may_end, compile_one = threading.Event(), GrammarCompiler.compile

    def slow(self: GrammarCompiler, grammar: Grammar) -> Any:
        compiled.append(grammar)
        assert not grammar.text.startswith("b") or may_end.wait(600)
        return compile_one(self, grammar)

    async def asked(pattern: str, limit_s: float) -> Any:
        grammars._lanes._limit_s = limit_s
        return await grammars.state_of(SamplingParams(grammar=Grammar("regex", pattern)))

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    endless = [f"b{{{number}}}" for number in range(1, MAX_LATE + 1)]
    try:
        for pattern in endless[:2]:
            with pytest.raises(InvalidRequest, match=r"the regex takes longer than .* s to compile"):
                await asked(pattern, 0.01)
        assert await asked("a+", 600.0) is not None
        with pytest.raises(InvalidRequest, match="takes longer"):  # it is known, and not tried again
            await asked(endless[0], 600.0)
        assert compiled.count(Grammar("regex", endless[0])) == 1
        for pattern in endless[2:]:
            with pytest.raises(InvalidRequest, match="takes longer"):
                await asked(pattern, 0.01)
        with pytest.raises(Overloaded, match="hold all threads"):
            await asked("aa", 600.0)
        assert await asked("a+", 600.0) is not None  # it is kept
    finally:
        may_end.set()
        await until(lambda: grammars._lanes._num_late == 0)
    assert await asked("aa", 600.0) is not None

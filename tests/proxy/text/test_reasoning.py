"""proxy/text/reasoning.py: what of an answer is reasoning, by the prompt's end and the answer's markers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfmoon.protocol.config import ReasoningParserName
from halfmoon.proxy.text.answer_parts import Content, Reasoning, merged
from halfmoon.proxy.text.reasoning import REASONING_PARSERS

BEGUN, OVER, NEITHER = "<|im_start|>assistant\n<think>\n", "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"


def read(name: str, prompt_end: str, pieces: Sequence[str]) -> list[Content | Reasoning]:
    parser = REASONING_PARSERS[name](prompt_end)
    return merged([part for piece in pieces for part in parser.push(piece)] + parser.finish())  # type: ignore[return-value]


def test_every_parser_has_a_name_in_the_configuration() -> None:
    assert set(get_args(ReasoningParserName)) - {"auto", "none"} == set(REASONING_PARSERS)


@pytest.mark.parametrize(
    ("name", "prompt_end", "text", "reasoning", "content"),
    [
        ("qwen3", NEITHER, "<think>\nHm.\n\nWell.\n</think>\n\nYes.\n", "Hm.\n\nWell.", "Yes.\n"),
        ("qwen3", NEITHER, "Yes, <think> it.</think>", "", "Yes, <think> it.</think>"),
        ("qwen3", NEITHER, "\n Yes", "", "\n Yes"),
        ("qwen3", BEGUN, "Hm.</think>Yes", "Hm.", "Yes"),
        ("qwen3", BEGUN, "Hm.\n", "Hm.\n", ""),
        ("qwen3", OVER, "Yes</think>", "", "Yes</think>"),
        ("deepseek_r1", NEITHER, "Hm.\n</think>\n\nYes", "Hm.", "Yes"),
        ("deepseek_r1", NEITHER, "<think>\nHm.\n</think>\n\nYes", "Hm.", "Yes"),
        ("deepseek_r1", BEGUN, "Hm. <think></think>Yes", "Hm. <think>", "Yes"),
        ("deepseek_r1", NEITHER, "Hm. </thin", "Hm. </thin", ""),
        ("deepseek_r1", OVER, "Yes", "", "Yes"),
    ],
)
def test_reasoning_ends_at_its_marker(name: str, prompt_end: str, text: str, reasoning: str, content: str) -> None:
    expected = [*([Reasoning(reasoning)] if reasoning else []), *([Content(content)] if content else [])]
    assert read(name, prompt_end, [text]) == read(name, prompt_end, list(text)) == expected


FRAGMENTS = st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", "\n\n", " ", "Hm", "é"])


@pytest.mark.parametrize("name", REASONING_PARSERS)
@pytest.mark.parametrize("prompt_end", [BEGUN, OVER, NEITHER])
@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(FRAGMENTS, max_size=14))
def test_however_an_answer_is_cut_its_reasoning_is_the_same(name: str, prompt_end: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = read(name, prompt_end, [text])
    assert read(name, prompt_end, pieces) == read(name, prompt_end, list(text)) == whole
    given_on = squeezed("".join(part.text for part in whole))  # white space next to the markers may go
    assert given_on in [squeezed(without(text, *markers)) for markers in ((), ("<think>",), ("</think>",), ("<think>", "</think>"))]


def squeezed(text: str) -> str:
    return "".join(text.split())


def without(text: str, *markers: str) -> str:
    """The first of each is taken out."""
    for marker in markers:
        text = text.replace(marker, "", 1)
    return text

"""proxy/requests/choice_text.py: tokens to text, stops and logprobs of one choice."""

from __future__ import annotations

from typing import Any

import pytest

from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2
from halfmoon.proxy.request import ProxyRequest
from halfmoon.proxy.requests.choice_text import ChoiceText, Pushed
from halfmoon.proxy.text.tokenizer import Tokenizer

EOS = frozenset({1})


def choice_text(tokenizer: Tokenizer, stop: tuple[str, ...] = (), **sampling: Any) -> ChoiceText:
    request = ProxyRequest("r", tokenizer.encode("Hi"), SamplingParams(**{"max_tokens": 100, **sampling}), 10.0)
    return ChoiceText(tokenizer, request, stop, EOS)


def push(choice: ChoiceText, tokenizer: Tokenizer, text: str, drop: int = 0, logprobs: bool = False) -> Pushed:
    """The text's tokens but for the last few."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    token_ids = token_ids[: len(token_ids) - drop]
    return choice.push(token_ids, [common_pb2.TokenOutput(token_id=token_id) for token_id in token_ids] if logprobs else [])


def test_tokens_behind_a_stop_string_are_left_out(chat_tokenizer: Tokenizer) -> None:
    text = choice_text(chat_tokenizer, ("fox",), num_logprobs=0)
    pushed = push(text, chat_tokenizer, "The quick brown fox jumps over", logprobs=True)
    assert (pushed.text, text.matched_stop) == ("The quick brown ", "fox")
    assert text.num_tokens == len(pushed.token_ids) == len(pushed.token_texts) == 4
    assert text.finish() == ""


def test_the_beginning_of_a_stop_string_that_did_not_come_is_given_at_the_end(chat_tokenizer: Tokenizer) -> None:
    text = choice_text(chat_tokenizer, (" fox jumps",))
    assert push(text, chat_tokenizer, "The quick brown fox").text == "The quick brown"
    assert text.finish() == " fox"


def test_stop_strings_do_not_count_before_min_tokens(chat_tokenizer: Tokenizer) -> None:
    text = choice_text(chat_tokenizer, ("quick", "lazy"), min_tokens=3)
    assert push(text, chat_tokenizer, "The quick brown fox lazy").text == "The quick brown fox "
    assert text.matched_stop == "lazy"


@pytest.mark.parametrize(("min_tokens", "matched"), [(1, "quick"), (2, None), (3, None)])
def test_a_stop_string_that_ends_with_the_last_of_min_tokens_is_text(
    min_tokens: int, matched: str | None, chat_tokenizer: Tokenizer
) -> None:
    """vLLM looks for stop strings once more than min_tokens tokens are there, and for those that end in what came after them."""
    text = choice_text(chat_tokenizer, ("quick",), min_tokens=min_tokens)
    pushed = push(text, chat_tokenizer, "The quick brown")  # "quick" ends with the second token
    assert (text.matched_stop, pushed.text + text.finish()) == (matched, "The " if matched else "The quick brown")
    assert text.num_tokens == (2 if matched else 3)


def test_a_stop_string_that_ends_behind_min_tokens_counts_wherever_it_begins(chat_tokenizer: Tokenizer) -> None:
    text = choice_text(chat_tokenizer, ("quick brown",), min_tokens=2)
    assert push(text, chat_tokenizer, "The quick brown fox").text == "The "
    assert (text.matched_stop, text.num_tokens) == ("quick brown", 3)


def test_an_end_token_leaves_no_text_unless_it_is_ignored(chat_tokenizer: Tokenizer) -> None:
    (comma,) = chat_tokenizer.encode(",", add_special_tokens=False)
    assert push(choice_text(chat_tokenizer, stop_token_ids=(comma,)), chat_tokenizer, "The,").text == "The"
    # not yet an end: min_tokens has not been reached
    assert push(choice_text(chat_tokenizer, stop_token_ids=(comma,), min_tokens=5), chat_tokenizer, "The,").text == "The,"


def test_an_unfinished_character_is_given_at_the_end(chat_tokenizer: Tokenizer) -> None:
    text = choice_text(chat_tokenizer)
    assert push(text, chat_tokenizer, "The🜚", drop=1).text == "The"
    assert text.finish() == "\ufffd"


def test_text_offsets_count_characters_of_the_answer(chat_tokenizer: Tokenizer) -> None:
    text = choice_text(chat_tokenizer, num_logprobs=1)
    first = push(text, chat_tokenizer, "The quick", logprobs=True)
    second = push(text, chat_tokenizer, " 😀!", logprobs=True)
    offsets = [token.text_offset for token in [*first.token_texts, *second.token_texts]]
    assert offsets[:3] == [0, 3, 9] and offsets[-1] == len("The quick 😀")

"""proxy/text/detokenizer.py: the deltas together are the full decode, and no stop string passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from halfmoon.protocol.token_pieces import BYTE_OF_CHAR
from halfmoon.proxy.text.detokenizer import StopStrings, create_detokenizer
from halfmoon.proxy.text.tokenizer import Tokenizer

EMOJI = "👩‍👩‍👧‍👦 mixed 🏳️‍🌈 text 日本 é"


def deltas(tokenizer: Tokenizer, token_ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = create_detokenizer(tokenizer, context or [])
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@given(data=st.data())
@settings(max_examples=200)
def test_the_deltas_together_are_the_full_decode_of_any_tokens(data: st.DataObject, chat_tokenizer: Tokenizer) -> None:
    token_id = st.integers(0, chat_tokenizer.vocab_size - 1)
    bits = st.one_of(st.lists(token_id, max_size=6), st.sampled_from(EMOJI.split()).map(lambda text: chat_tokenizer.encode(text)))
    token_ids = [found for part in data.draw(st.lists(bits, max_size=8)) for found in part]
    assert "".join(deltas(chat_tokenizer, token_ids)) == chat_tokenizer.decode(token_ids)


@given(text=st.text(max_size=40))
@settings(max_examples=100)
def test_valid_text_comes_in_whole_characters(text: str, chat_tokenizer: Tokenizer) -> None:
    token_ids = chat_tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    pieces = deltas(chat_tokenizer, token_ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == chat_tokenizer.decode(token_ids)


def test_a_character_comes_with_its_last_token(chat_tokenizer: Tokenizer) -> None:
    token_ids = chat_tokenizer.encode("🜚", add_special_tokens=False)
    assert deltas(chat_tokenizer, token_ids) == [""] * (len(token_ids) - 1) + ["🜚", ""]


def test_an_unfinished_character_is_flushed_at_the_end(chat_tokenizer: Tokenizer) -> None:
    token_ids = chat_tokenizer.encode("x🜚", add_special_tokens=False)[:-1]
    assert "".join(deltas(chat_tokenizer, token_ids)[:-1]) == "x"
    assert deltas(chat_tokenizer, token_ids)[-1] == "\ufffd"


def test_a_long_run_of_broken_bytes_is_not_held(chat_tokenizer: Tokenizer) -> None:
    broken = chat_tokenizer.encode("🜚", add_special_tokens=False)[0]
    pieces = deltas(chat_tokenizer, [broken] * 50)
    assert "".join(pieces) == "\ufffd" * 50
    assert all(len(piece) <= 1 for piece in pieces)


def test_special_tokens_leave_no_text(chat_tokenizer: Tokenizer) -> None:
    token_ids = chat_tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    assert "".join(deltas(chat_tokenizer, token_ids)) == "ab"


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: ▁ for a space, one token per byte where a character has none."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Once", "▁upon", "▁a", "time", "▁"]
    backend = RustTokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, special_tokens={}, chat_templates={})


def test_byte_fallback_gives_whole_characters(sentencepiece: Tokenizer) -> None:
    emoji = [1 + byte for byte in "日本😀".encode()]
    token_ids = [257, *emoji, 258, 261, 260]
    pieces = deltas(sentencepiece, token_ids)
    assert "".join(pieces) == sentencepiece.decode(token_ids) == "Once日本😀 upon time"
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_answer_keeps_the_space_between_itself_and_the_prompt(sentencepiece: Tokenizer) -> None:
    assert deltas(sentencepiece, [259], context=[257, 258])[0] == " a"
    assert deltas(sentencepiece, [259])[0] == "a"


def test_special_tokens_that_are_shown_have_text_and_others_have_none(chat_tokenizer: Tokenizer) -> None:
    backend = RustTokenizer.from_str(chat_tokenizer._backend.to_str())
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    window = Tokenizer(backend, special_tokens={}, chat_templates={})
    assert chat_tokenizer.is_byte_level and not window.is_byte_level
    bos, begin, end = 0, 2, 3
    word = chat_tokenizer.encode("fox", add_special_tokens=False)
    for tokenizer in (chat_tokenizer, window):
        detokenizer = create_detokenizer(tokenizer, [bos, *word, begin, end], shown={begin})
        pieces = [detokenizer.push(token_id) for token_id in (begin, *word, end, begin, *word)]
        assert "".join([*pieces, detokenizer.finish()]) == "<|im_start|>fox<|im_start|>fox"


def test_a_prompt_that_ends_inside_a_character_takes_nothing_from_the_answer(chat_tokenizer: Tokenizer) -> None:
    head = chat_tokenizer.encode("🜚", add_special_tokens=False)[:1]
    token_ids = chat_tokenizer.encode("yes", add_special_tokens=False)
    assert "".join(deltas(chat_tokenizer, token_ids, context=head)) == "yes"


@pytest.fixture(scope="module", params=["bytes", "window"])
def byte_pieces(request: pytest.FixtureRequest) -> Tokenizer:
    """Byte-level, with tokens that end one character and begin another, as trained vocabularies have them.

    window: the same behind a decoder that is more than byte-level, so that its text must come from decode itself.
    """
    raw = [*(bytes([byte]) for byte in range(256)), *(bytes([end, begin]) for end in (0x9F, 0x98, 0x80) for begin in (0xF0, 0xE6, 0xC3))]
    char_of = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    words = {"".join(char_of[byte] for byte in piece): index for index, piece in enumerate(raw)}
    backend = RustTokenizer(models.BPE(words, []))
    backend.decoder = decoders.ByteLevel() if request.param == "bytes" else decoders.Sequence([decoders.ByteLevel()])
    backend.add_tokens(["é", "a b"])  # an added token's characters are read as bytes where they stand for some
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, special_tokens={}, chat_templates={})


LONE_BYTE, SPLIT_CHARACTERS, SPECIAL = [0xF0], [256], [267]


@given(data=st.data())
@settings(max_examples=200)
def test_the_deltas_together_are_the_full_decode_of_any_bytes(data: st.DataObject, byte_pieces: Tokenizer) -> None:
    awkward = st.sampled_from([0x41, 0x80, 0x98, 0x9F, 0xBF, 0xC3, 0xE6, 0xED, 0xF0, 0xF4, 0xFF, *range(256, 268)])
    runs = st.lists(st.tuples(st.one_of(awkward, st.integers(0, 267)), st.sampled_from([1, 1, 1, 2, 7])), max_size=25)
    token_ids = [token_id for token_id, times in data.draw(runs) for _ in range(times)]
    context = data.draw(st.lists(awkward, max_size=8))
    pieces = deltas(byte_pieces, token_ids)
    assert "".join(pieces) == byte_pieces.decode(token_ids)
    if not byte_pieces.decode(context).endswith("\ufffd"):
        assert byte_pieces.decode(context) + "".join(deltas(byte_pieces, token_ids, context)) == byte_pieces.decode(context + token_ids)


@pytest.mark.parametrize("token_ids", [LONE_BYTE, SPLIT_CHARACTERS, SPECIAL, [0x80], [0xF0, 0x9F], [0xE6, *SPECIAL * 3]])
def test_the_work_a_token_does_not_grow_with_those_before_it(
    token_ids: list[int], byte_pieces: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = Tokenizer.decode

    def seen(self: Tokenizer, token_ids: list[int], **options: bool) -> str:
        sizes.append(len(token_ids))
        return decode(self, token_ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", seen)
    text = "".join(deltas(byte_pieces, token_ids * 500))
    assert text == decode(byte_pieces, token_ids * 500)
    assert max(sizes, default=0) <= 16 and len(sizes) <= 2 + 3 * 500 * len(token_ids)


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads character by character; of two stop strings that end together the longer counts."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=10),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
@settings(max_examples=150)
def test_the_text_ends_at_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    checker = StopStrings(stops)
    out = "".join(checker.push(piece) for piece in pieces)
    out += checker.finish()
    assert (out, checker.matched) == cut_by_hand("".join(pieces), stops)


@given(
    pieces=st.lists(st.text("abc", min_size=1, max_size=3), max_size=8), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)
)
@settings(max_examples=200)
def test_no_more_is_held_than_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    checker, out, seen = StopStrings(stops), "", ""
    for piece in pieces:
        seen, out = seen + piece, out + checker.push(piece)
        if checker.matched is not None:
            return
        held = seen[len(out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(
    exempt=st.lists(st.text("abc", max_size=3), max_size=4),
    pieces=st.lists(st.text("abc", max_size=3), max_size=6),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=150)
def test_a_stop_string_counts_where_it_ends_behind_the_exempt_text(exempt: list[str], pieces: list[str], stops: list[str]) -> None:
    checker = StopStrings(stops)
    out = "".join([*map(checker.push_exempt, exempt), *map(checker.push, pieces)]) + checker.finish()
    text, num_exempt = "".join([*exempt, *pieces]), len("".join(exempt))
    for end in range(num_exempt + 1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            text = text[: end - len(max(matches, key=len))]
            break
    assert out == text

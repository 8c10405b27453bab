"""protocol/token_pieces, beside the decoders of the tokenizers library."""

from __future__ import annotations

from tokenizers import decoders, pre_tokenizers

from halfmoon.protocol.token_pieces import BYTE_OF_CHAR, byte_level, sentence_piece


def test_every_byte_has_the_stand_in_that_the_library_gives_it() -> None:
    assert set(BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTE_OF_CHAR.values()) == list(range(256))
    for text in ("Hello, world!", " naïve\ttab", "日本語 😀", "\x00\x7f"):
        ((piece, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert byte_level(piece) == text.encode() and decoders.ByteLevel().decode([piece]) == text


def test_a_piece_with_any_other_character_is_its_own_text() -> None:
    assert byte_level("a b") == b"a b" and byte_level("日") == "日".encode()


def test_sentence_pieces_are_bytes_where_the_vocabulary_has_them() -> None:
    library = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    for pieces in (["▁the", "▁▁"], ["<0xE6>", "<0x97>", "<0xA5>"], ["<0x4>", "<0x041>"]):
        assert b"".join(sentence_piece(piece, has_bytes=True) for piece in pieces).decode() == library.decode(pieces)
    assert sentence_piece("<0x41>", has_bytes=False) == b"<0x41>"

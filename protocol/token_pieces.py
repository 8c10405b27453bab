"""The bytes that a piece of a vocabulary stands for, by the two spellings that tokenizers have."""

from __future__ import annotations


def byte_level(piece: str) -> bytes:
    """Of GPT-2's stand-ins for bytes. A piece with any other character, as some added tokens have, is its own UTF-8."""
    return bytes(BYTE_OF_CHAR[char] for char in piece) if all(char in BYTE_OF_CHAR for char in piece) else piece.encode()


def sentence_piece(piece: str, *, has_bytes: bool) -> bytes:
    """has_bytes: the vocabulary has a piece <0x..> for each byte."""
    if has_bytes and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, backwards (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()

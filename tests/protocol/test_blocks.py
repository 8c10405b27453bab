from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.protocol.blocks import block_keys, div_ceil, root_key, sent_or_made_keys
from halfmoon.protocol.errors import InvalidRequest

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
salts = st.binary(max_size=64)
ROOT = root_key(b"schema")


@given(tokens, st.integers(1, 8), salts)
def test_keys_are_a_blake2b_chain_under_a_root_that_is_keyed_with_the_salt(token_ids: list[int], block_size: int, salt: bytes) -> None:
    key = hashlib.blake2b(b"schema", digest_size=16, key=salt).digest()
    expected = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        words = token_ids[start : start + block_size]
        key = hashlib.blake2b(key + struct.pack(f"<{len(words)}I", *words), digest_size=16).digest()
        expected.append(key)
    assert block_keys(root_key(b"schema", salt=salt), token_ids, block_size) == expected


@given(tokens, tokens, st.integers(1, 8))
def test_two_sequences_share_exactly_the_keys_of_their_common_full_blocks(left: list[int], right: list[int], block_size: int) -> None:
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    pairs = zip(block_keys(ROOT, left, block_size), block_keys(ROOT, right, block_size), strict=False)
    assert [a == b for a, b in pairs] == [(i + 1) * block_size <= common for i in range(min(len(left), len(right)) // block_size)]


@given(tokens, st.integers(0, 40), st.integers(1, 8))
def test_a_chain_continued_from_a_parent_equals_the_whole_chain(token_ids: list[int], cut: int, block_size: int) -> None:
    whole = block_keys(ROOT, token_ids, block_size)
    num_blocks = min(cut, len(whole))
    parent = whole[num_blocks - 1] if num_blocks else ROOT
    assert block_keys(ROOT, token_ids[num_blocks * block_size :], block_size, parent=parent) == whole[num_blocks:]


@given(st.lists(st.integers(0, 100), min_size=4, max_size=4), salts, salts)
def test_a_tenant_cannot_name_the_block_of_another(token_ids: list[int], salt: bytes, other: bytes) -> None:
    mine = block_keys(root_key(b"schema", salt=salt), token_ids, 4)
    theirs = block_keys(root_key(b"schema", salt=other), token_ids, 4)
    assert (mine == theirs) == ((salt.rstrip(b"\0") == other.rstrip(b"\0") and len(salt) == len(other)) or salt == other)


def test_schema_and_lora_change_the_root() -> None:
    assert len({root_key(b"a"), root_key(b"b"), root_key(b"a", "lora"), root_key(b"a", salt=b"s")}) == 4


@given(st.integers(0, 1000), st.integers(1, 100))
def test_div_ceil_is_the_number_of_blocks_that_hold_all_tokens(num_tokens: int, block_size: int) -> None:
    num_blocks = div_ceil(num_tokens, block_size)
    assert (num_blocks - 1) * block_size < num_tokens <= num_blocks * block_size or num_tokens == num_blocks == 0


def test_keys_that_were_sent_are_used_and_without_any_they_are_made() -> None:
    token_ids, sent = list(range(11)), [bytes([number]) * 16 for number in range(2)]
    assert sent_or_made_keys(sent, ROOT, token_ids, 4) == sent
    assert sent_or_made_keys([], ROOT, token_ids, 4) == block_keys(ROOT, token_ids, 4)


@pytest.mark.parametrize("num_keys", [1, 3])
def test_a_wrong_number_of_sent_keys_is_refused_with_both_counts(num_keys: int) -> None:
    with pytest.raises(InvalidRequest, match=f"block_keys has {num_keys} keys, and 11 token_ids fill 2 blocks of 4"):
        sent_or_made_keys([bytes(16)] * num_keys, ROOT, list(range(11)), 4)


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(17)])
def test_a_sent_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(InvalidRequest, match=f"a key of {len(key)} bytes; each has 16"):
        sent_or_made_keys([bytes(16), key], ROOT, list(range(11)), 4)

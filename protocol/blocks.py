"""Block keys: a blake2b chain over token ids, so that equal keys mean equal prefixes of one tenant.

    root = blake2b(schema fingerprint ‖ LoRA id, key=the tenant's salt)        key_i = blake2b(key_{i-1} ‖ tokens of block i as u32 LE)

Every key follows from its root, which nobody knows without the salt: a tenant can neither name nor time another's blocks.
Only full blocks have keys.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence

from .errors import InvalidRequest

KEY_BYTES = 16
BlockKey = bytes


def root_key(schema_fingerprint: bytes, lora_id: str = "", salt: bytes = b"") -> BlockKey:
    """salt: of the tenant, at most 64 bytes, known to the proxy alone; empty: of all who have no tenant."""
    return hashlib.blake2b(schema_fingerprint + lora_id.encode(), digest_size=KEY_BYTES, key=salt).digest()


def block_keys(root: BlockKey, token_ids: Sequence[int], block_size: int, *, parent: BlockKey | None = None) -> list[BlockKey]:
    """The keys of the full blocks of token_ids, in order.

    parent: the key before the first block where token_ids continue a chain (default: the root).
    """
    words = array.array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    data = memoryview(words.tobytes())
    stride = block_size * words.itemsize
    keys: list[BlockKey] = []
    key = root if parent is None else parent
    for start in range(0, len(token_ids) // block_size * stride, stride):
        digest = hashlib.blake2b(key, digest_size=KEY_BYTES)
        digest.update(data[start : start + stride])
        key = digest.digest()
        keys.append(key)
    return keys


def sent_or_made_keys(sent: Sequence[BlockKey], root: BlockKey, token_ids: Sequence[int], block_size: int) -> list[BlockKey]:
    """The keys of the full blocks of token_ids: those that came with them, or where none did made here.

    Raises InvalidRequest where they are not one for each full block.
    """
    if not sent:
        return block_keys(root, token_ids, block_size)
    num_blocks = len(token_ids) // block_size
    if len(sent) != num_blocks:
        raise InvalidRequest(
            f"block_keys has {len(sent)} keys, and {len(token_ids)} token_ids fill {num_blocks} blocks of {block_size}; "
            "send one for each full block, or none",
            param="block_keys",
        )
    for key in sent:
        if len(key) != KEY_BYTES:
            raise InvalidRequest(f"block_keys has a key of {len(key)} bytes; each has {KEY_BYTES}", param="block_keys")
    return list(sent)


def div_ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)

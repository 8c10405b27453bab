"""Which pages hold blocks that others may use: a tree, each block under the one before it. Pure bookkeeping, no tensor.

root ─► block ─► block ─► …      found by key, whole; or by the token ids that follow its parent, as far as they agree
          ├────► block
          └────► tail            where a sequence ended inside a block: no key, and nothing stands under it
A block leaves together with all that stands under it, so that what is found is always a whole prefix.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .key_changes import KeyChanges


@dataclass(slots=True, eq=False)
class CachedBlock:
    page: int
    parent: CachedBlock | None
    key: bytes | None  # None: a tail
    tokens: bytes  # its token ids, packed so that bytes sort as they do
    children: list[CachedBlock] = field(default_factory=list)  # by tokens; no two have the same


class PrefixPages:
    """Whether a page is in use is the allocator's matter.

    Args:
        root: the key before every first block of a sequence that has none of its own.
        block_size: tokens; a page is a block.

    Attributes:
        changes: of the keys, for whoever follows them.
    """

    def __init__(self, root: bytes, block_size: int) -> None:
        self.block_size = block_size
        self.changes = KeyChanges(self.keys)
        self._root = root
        self._tops = {root: CachedBlock(-1, None, root, b"")}  # one for each tenant, who are few
        self._by_key: dict[bytes, CachedBlock] = {}  # parents before their children
        self._by_page: dict[int, CachedBlock] = {}

    def __len__(self) -> int:
        """Pages that hold a block or a tail."""
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def keys(self) -> list[bytes]:
        """Of the blocks, each behind its parent's."""
        return list(self._by_key)

    def root_of(self, root: bytes) -> bytes:
        """A sequence's own root, or where it has none the common one. Nothing under one root is found under another."""
        if not root:
            return self._root
        if root not in self._tops:
            self._tops[root] = CachedBlock(-1, None, root, b"")
        return root

    def find(self, key: bytes) -> CachedBlock | None:
        return self._by_key.get(key)

    def find_run(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of leading keys."""
        pages: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            pages.append(block.page)
        return pages

    def find_part(self, parent_key: bytes, token_ids: Sequence[int]) -> tuple[int, int]:
        """The block or tail behind parent_key that begins with most of token_ids: (page, how many agree). (-1, 0): none does."""
        parent = self._parent(parent_key)
        if parent is None:
            return -1, 0
        wanted = _pack(token_ids)
        children = parent.children
        at = bisect_left(children, wanted, key=_tokens)
        # in sorted order the best one is a neighbour of where it would stand
        found = [(_num_agreeing(child.tokens, wanted), child.page) for child in children[max(at - 1, 0) : at + 1]]
        num_tokens, page = max(found, default=(0, -1))
        return (page, num_tokens) if num_tokens else (-1, 0)

    def add(self, parent_key: bytes, key: bytes | None, token_ids: Sequence[int], page: int) -> CachedBlock | None:
        """A block behind parent_key's stands in page; key None: a tail. None, and nothing done, where the parent is not here, or it
        tells nothing new: the key is known, or a tail's tokens are the beginning of what is here."""
        parent = self._parent(parent_key)
        if parent is None or key in self._by_key:
            return None
        tokens = _pack(token_ids)
        at = bisect_left(parent.children, tokens, key=_tokens)
        if key is None and at < len(parent.children) and parent.children[at].tokens.startswith(tokens):
            return None
        block = CachedBlock(page, parent, key, tokens)
        parent.children.insert(at, block)
        self._by_page[page] = block
        if key is not None:
            self._by_key[key] = block
            self.changes.added(key)
        return block

    def remove(self, page: int) -> list[int]:
        """The page's block is no longer here, nor what stands under it. The pages of all, this one first."""
        block = self._by_page[page]
        siblings = block.parent.children if block.parent is not None else []
        del siblings[bisect_left(siblings, block.tokens, key=_tokens)]
        leaving = [block]
        for block in leaving:  # which grows meanwhile
            leaving += block.children
            del self._by_page[block.page]
            if block.key is not None:
                del self._by_key[block.key]
                self.changes.removed(block.key)
        return [block.page for block in leaving]

    def chain(self, block: CachedBlock) -> Iterator[int]:
        """The pages from the block up to the first one."""
        above: CachedBlock | None = block
        while above is not None and above.parent is not None:
            yield above.page
            above = above.parent

    def _parent(self, key: bytes) -> CachedBlock | None:
        return self._tops.get(key) or self._by_key.get(key)


def _tokens(block: CachedBlock) -> bytes:
    return block.tokens


def _pack(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f">{len(token_ids)}I", *token_ids)


def _num_agreeing(tokens: bytes, others: bytes) -> int:
    """Leading token ids that both have."""
    least, most = 0, min(len(tokens), len(others)) // 4
    while least < most:
        middle = (least + most + 1) // 2
        if tokens[: 4 * middle] == others[: 4 * middle]:
            least = middle
        else:
            most = middle - 1
    return least

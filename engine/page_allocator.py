"""Which pages of the paged KV cache are free, who shares one, and which stay for whoever comes next. Pure bookkeeping, no tensor.

free ─allocate─► in use, by one or more ─free, by the last─► holds a block: idle, found by key ─► shared: in use again
  ▲                                            └─ else        └─ evicted for room, least recently used first, ends before starts
  └────────────────────────────────────────────┴──────────────┘
take · keep · advance · release are about whole sequences: what schedulers ask for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from ..protocol.blocks import block_keys
from .prefix_pages import PrefixPages
from .sequence import Sequence


class PartialHit(NamedTuple):
    """A page whose first tokens are those that come next in a sequence. It is held: free([page]) has to follow."""

    page: int
    num_tokens: int


class PageAllocator:
    """Invariant: every page is free, idle or in use, and num_free counts the first two; a page in use has as many users as took it.

    prefixes: what the pages hold that others may use; None: nothing, a page without a user is free.
    """

    def __init__(self, num_pages: int, prefixes: PrefixPages | None = None) -> None:
        self.num_pages = num_pages
        self.prefixes = prefixes
        self._free = deque(range(num_pages))
        self._idle: OrderedDict[int, None] = OrderedDict()  # they hold blocks that nobody uses; least recently used first
        self._num_users: dict[int, int] = {}  # of the pages in use

    @property
    def num_free(self) -> int:
        """Pages to be had: those that nobody uses."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages that hold what others may use, in use or not."""
        return len(self.prefixes) if self.prefixes is not None else 0

    @property
    def usage_ratio(self) -> float:
        """The share of the pages that is in use."""
        return len(self._num_users) / self.num_pages

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= self.num_free

    def allocate(self, num_pages: int) -> list[int]:
        """For one user each. Raises ValueError where can_allocate is false: the scheduler has to ask first."""
        if not self.can_allocate(num_pages):
            raise ValueError(f"{num_pages} pages asked for, {self.num_free} of {self.num_pages} are free")
        while len(self._free) < num_pages:
            self._evict()
        pages = [self._free.popleft() for _ in range(num_pages)]
        self._num_users.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of them; they hold blocks, or are in use."""
        for page in pages:
            self._idle.pop(page, None)
            self._num_users[page] = self._num_users.get(page, 0) + 1

    def free(self, pages: Iterable[int]) -> None:
        """One user less. Raises ValueError for a page without: somebody else may hold it by now."""
        for page in pages:
            num_users = self._num_users.get(page, 0)
            if num_users == 0:
                raise ValueError(f"page {page} is freed twice")
            if num_users > 1:
                self._num_users[page] = num_users - 1
                continue
            del self._num_users[page]
            if self.prefixes is not None and page in self.prefixes:
                self._idle[page] = None
            else:
                self._free.append(page)

    # sequences

    def take(self, sequence: Sequence, num_pages: int, num_spare: int = 0) -> bool:
        """Gives a sequence without pages its first num_pages: those of the blocks that it begins with where these are here, whose tokens
        count as computed, and others. At least the page of its last token is its own.

        False, and nothing done, where fewer than num_spare pages would be left.
        """
        shared = self._find_run(sequence)
        num_idle = sum(page in self._idle for page in shared)
        if num_pages - len(shared) + num_idle + num_spare > self.num_free:
            return False
        self.share(shared)  # first, lest they be evicted for the others
        sequence.pages = shared + self.allocate(num_pages - len(shared))
        sequence.num_kept_blocks = len(shared)
        sequence.num_sound_tokens = len(shared) * self._block_size
        if shared:
            sequence.num_computed_tokens = sequence.num_sound_tokens
        return True

    def keep(self, sequence: Sequence) -> None:
        """What it has computed is sound: others find its full blocks from now on. Where another's copy of a block is here, that one stays.

        To be called once finite logits came of it, or a checksum proved it: KV that is no numbers must not reach others.
        """
        sequence.num_sound_tokens = sequence.num_computed_tokens
        prefixes, keys = self.prefixes, sequence.block_keys
        if prefixes is None or keys is None:
            return
        size = prefixes.block_size
        num_full, first = sequence.num_computed_tokens // size, sequence.num_kept_blocks
        if num_full <= first:
            return
        if num_full > len(keys):
            more = sequence.token_ids[len(keys) * size : num_full * size]
            keys += block_keys(prefixes.root_of(sequence.root), more, size, parent=keys[-1] if keys else None)
        if first and prefixes.find(keys[first - 1]) is None:
            first = 0  # another's copy that it built on was evicted
        for block in range(first, num_full):
            parent = keys[block - 1] if block else prefixes.root_of(sequence.root)
            prefixes.add(parent, keys[block], sequence.token_ids[block * size : (block + 1) * size], sequence.pages[block])
        sequence.num_kept_blocks = num_full

    def advance(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks behind its first num_tokens that others have computed meanwhile: their pages take the place of its own. Returns how many
        tokens stand in its pages then; fewer than all. No step that computes it is under way, and no copy into these pages."""
        prefixes, keys = self.prefixes, sequence.block_keys
        if prefixes is None or keys is None or sequence.scores_prompt:
            return num_tokens
        first = num_tokens // prefixes.block_size
        found = prefixes.find_run(keys[first : self._num_shareable(sequence)])
        if not found:
            return num_tokens
        last = first + len(found)
        self.share(found)
        self.free(sequence.pages[first:last])
        sequence.pages[first:last] = found
        sequence.num_kept_blocks = last
        return last * prefixes.block_size

    def hold_part(self, sequence: Sequence, num_tokens: int) -> PartialHit | None:
        """The page to copy from, where a block is known that begins as the sequence goes on behind its first num_tokens, a block's end."""
        prefixes, keys = self.prefixes, sequence.block_keys
        if prefixes is None or keys is None or sequence.scores_prompt:
            return None
        size = prefixes.block_size
        block = num_tokens // size
        following = sequence.token_ids[num_tokens : min(num_tokens + size, sequence.num_tokens - 1)]
        page, num_agreeing = prefixes.find_part(keys[block - 1] if block else prefixes.root_of(sequence.root), following)
        if not num_agreeing:
            return None
        self.share([page])
        return PartialHit(page, num_agreeing)

    def own_pages(self, sequence: Sequence) -> list[int]:
        """Those that nobody else uses or may find."""
        return [page for page in sequence.pages if self._num_users[page] == 1 and (self.prefixes is None or page not in self.prefixes)]

    def discard(self, sequence: Sequence, pages: Iterable[int]) -> list[int]:
        """What some of its pages hold is not to be found any more, nor is anything kept of it from now on. Returns own_pages of these.

        Who uses them beside it goes on with what stands there.
        """
        sequence.block_keys = None
        wrong = set(pages)
        if self.prefixes is not None:
            for page in wrong:
                for gone in self.prefixes.remove(page) if page in self.prefixes else ():
                    if gone in self._idle:
                        del self._idle[gone]
                        self._free.append(gone)
        return [page for page in self.own_pages(sequence) if page in wrong]

    def keep_tail(self, sequence: Sequence) -> None:
        """The sequence has ended: others find what of it is sound behind its last full block, too."""
        prefixes, keys = self.prefixes, sequence.block_keys
        if prefixes is None or keys is None:
            return
        num_full = sequence.num_sound_tokens // prefixes.block_size
        tail = sequence.token_ids[num_full * prefixes.block_size : sequence.num_sound_tokens]
        if tail and sequence.pages[num_full] not in prefixes:
            prefixes.add(keys[num_full - 1] if num_full else prefixes.root_of(sequence.root), None, tail, sequence.pages[num_full])

    def release(self, sequence: Sequence) -> None:
        """The sequence's pages have a user less; what of it is sound stays. It is in no step."""
        self.keep_tail(sequence)
        self.free(sequence.pages)
        for page in self._chain(sequence):
            if page in self._idle:
                self._idle.move_to_end(page)
        sequence.pages, sequence.num_sound_tokens = [], 0

    @property
    def _block_size(self) -> int:
        return self.prefixes.block_size if self.prefixes is not None else 1

    def _find_run(self, sequence: Sequence) -> list[int]:
        if self.prefixes is None or sequence.block_keys is None or sequence.scores_prompt:
            return []
        return self.prefixes.find_run(sequence.block_keys[: self._num_shareable(sequence)])

    def _num_shareable(self, sequence: Sequence) -> int:
        """Blocks; its last token is computed, or comes with its hand-off, and so has a page of its own."""
        return (sequence.num_tokens - 1) // self._block_size

    def _chain(self, sequence: Sequence) -> Iterable[int]:
        """The pages of its sound blocks, the last one first: in the order of eviction it comes before those that it stands under."""
        num_full = sequence.num_sound_tokens // self._block_size
        if self.prefixes is None or not sequence.block_keys or not num_full:
            return ()
        last = self.prefixes.find(sequence.block_keys[num_full - 1])
        return self.prefixes.chain(last) if last is not None else ()

    def _evict(self) -> None:
        page = next(iter(self._idle))
        assert self.prefixes is not None  # else no page is idle
        for gone in self.prefixes.remove(page):
            if gone in self._idle:
                del self._idle[gone]
                self._free.append(gone)

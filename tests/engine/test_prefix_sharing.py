"""Shared pages against plain dictionaries: who uses which page, and what stands in it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.prefix_pages import PrefixPages
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.sampling import SamplingParams

SIZE = 3
NUM_PAGES = 11
ROOT = root_key(b"model")
TENANT = root_key(b"model", salt=b"of a tenant")  # the others have none
TEXTS = [(0,) * 14, (0,) * 4 + (1,) * 10, (0,) * 6 + (1,) * 8, (1,) * 14]  # they begin alike, and part inside a block or at its end
INDEX = st.integers(0, 63)


class SharedPages(RuleBasedStateMachine):
    """The KV of a token is a function of all tokens up to it, so a page's content is written down as those, and whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixPages(ROOT, SIZE)
        self.allocator = PageAllocator(NUM_PAGES, self.prefixes)
        self.content: dict[tuple[int, int], tuple[bytes | int, ...]] = {}  # (page, place in it) -> the root, and the tokens up to that one
        self.users: Counter[int] = Counter()
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.followed: set[bytes] | None = None
        self.parents: dict[bytes, bytes] = {}  # block key -> the one before it

    @rule(text=st.sampled_from(TEXTS), num_tokens=st.integers(1, 14), root=st.sampled_from([b"", TENANT]))
    def add(self, text: tuple[int, ...], num_tokens: int, root: bytes = b"") -> None:
        tokens = list(text[:num_tokens])
        sequence = Sequence("r", tokens, len(tokens), SamplingParams(max_tokens=8), root=root)
        sequence.block_keys = block_keys(root or ROOT, tokens, SIZE)
        self.waiting.append(sequence)
        self.take(-1, 0)

    @precondition(lambda self: self.waiting)
    @rule(index=INDEX, num_spare=st.integers(0, 2))
    def take(self, index: int, num_spare: int) -> None:
        sequence = self.waiting[index % len(self.waiting)]
        num_pages = -(-sequence.num_tokens // SIZE)
        num_free = self.allocator.num_free
        taken = self.allocator.take(sequence, num_pages, num_spare)
        assert taken or num_pages + num_spare > num_free, "who needs no more than the free pages gets them"
        if not taken:
            assert not sequence.pages and self.allocator.num_free == num_free
            return
        self.waiting.remove(sequence)
        self.running.append(sequence)
        assert len(sequence.pages) == num_pages and self.allocator.num_free >= num_spare
        fresh = sequence.pages[sequence.num_computed_tokens // SIZE :]
        assert fresh and not any(self.users[page] for page in fresh)
        self.users.update(sequence.pages)
        for page in fresh:
            self._write(page, 0, ("garbage",) * SIZE)

    @precondition(lambda self: self.running)
    @rule(index=INDEX)
    def copy_part(self, index: int) -> None:
        sequence = self.running[index % len(self.running)]
        num_tokens = sequence.num_computed_tokens
        if num_tokens % SIZE or num_tokens >= sequence.num_tokens - 1:
            return
        part = self.allocator.hold_part(sequence, num_tokens)
        if part is None:
            return
        assert 0 < part.num_tokens <= SIZE and num_tokens + part.num_tokens < sequence.num_tokens
        self.users[part.page] += 1
        self.check()
        target = sequence.pages[num_tokens // SIZE]
        self._write(target, 0, [self.content[part.page, place] for place in range(part.num_tokens)])
        self.allocator.free([part.page])
        self.users[part.page] -= 1
        sequence.num_computed_tokens += part.num_tokens
        self.allocator.keep(sequence)

    @precondition(lambda self: self.running)
    @rule(index=INDEX, num_tokens=st.integers(1, 7))
    def compute(self, index: int, num_tokens: int) -> None:
        sequence = self.running[index % len(self.running)]
        first = sequence.num_computed_tokens
        last = min(first + num_tokens, sequence.num_tokens)
        for place in range(first, last):
            self._write(sequence.pages[place // SIZE], place % SIZE, [(sequence.root, *sequence.token_ids[: place + 1])])
        sequence.num_computed_tokens = last
        if last < sequence.num_tokens:
            return  # no logits came of it yet
        self.allocator.keep(sequence)
        root = sequence.root or ROOT
        keys = block_keys(root, sequence.token_ids, SIZE)
        self.parents.update(zip(keys, [root, *keys], strict=False))
        if last // SIZE > first // SIZE:
            assert all(map(self.prefixes.find, keys[: last // SIZE])), "full blocks are found"

    @precondition(lambda self: self.running)
    @rule(index=INDEX, token=st.integers(0, 1))
    def grow(self, index: int, token: int) -> None:
        sequence = self.running[index % len(self.running)]
        if sequence.num_computed_tokens < sequence.num_tokens:
            return
        if sequence.num_tokens % SIZE == 0:
            if not self.allocator.can_allocate(1):
                return
            sequence.pages += self.allocator.allocate(1)
            self.users[sequence.pages[-1]] += 1
        sequence.token_ids.append(token)

    @precondition(lambda self: self.running)
    @rule(index=INDEX)
    def advance(self, index: int) -> None:
        sequence = self.running[index % len(self.running)]
        before, found = list(sequence.pages), sequence.num_computed_tokens
        sequence.num_computed_tokens = self.allocator.advance(sequence, found)
        assert found <= sequence.num_computed_tokens < max(sequence.num_tokens, found + 1)
        self.users.subtract(before)
        self.users.update(sequence.pages)

    @precondition(lambda self: self.running)
    @rule(index=INDEX, comes_back=st.booleans())
    def leave(self, index: int, comes_back: bool) -> None:
        """Ended, aborted or preempted: it is all one to the pages."""
        sequence = self.running.pop(index % len(self.running))
        self.users.subtract(sequence.pages)
        self.allocator.release(sequence)
        assert sequence.pages == []
        if comes_back:
            sequence.num_computed_tokens = 0
            self.waiting.append(sequence)

    @rule(again=st.booleans())
    def follow(self, again: bool) -> None:
        changes = self.prefixes.changes
        if again or self.followed is None:
            changes.restart()
        while (change := changes.take()) is not None:
            known = set() if change.is_whole else self.followed
            assert known is not None
            self.followed = (known | set(change.added)) - set(change.removed)
        assert self.followed == set(self.prefixes.keys())

    @invariant()
    def check_chains(self) -> None:
        found: set[bytes] = {ROOT, TENANT}
        for key in self.prefixes.keys():
            assert self.parents[key] in found, "a block without the one before it"
            found.add(key)

    @invariant()
    def check(self) -> None:
        used = {page for page, num_users in self.users.items() if num_users}
        assert self.allocator._num_users == {page: self.users[page] for page in used}
        assert self.allocator.num_free == NUM_PAGES - len(used)
        assert len(self.allocator._free) + len(self.allocator._idle) + len(used) == NUM_PAGES
        assert set(self.allocator._idle) <= set(self.prefixes._by_page)
        for sequence in self.running:
            for place in range(sequence.num_computed_tokens):
                found = self.content[sequence.pages[place // SIZE], place % SIZE]
                assert found == (sequence.root, *sequence.token_ids[: place + 1]), "the page holds another token's KV, or another tenant's"

    def teardown(self) -> None:
        while self.running:
            self.leave(0, comes_back=False)
        assert self.allocator.num_free == NUM_PAGES and not self.allocator._num_users
        assert sorted(self.allocator.allocate(NUM_PAGES)) == list(range(NUM_PAGES)), "each page can be had again"
        assert len(self.prefixes) == 0 and self.prefixes.keys() == []

    def _write(self, page: int, first: int, tokens: object) -> None:
        assert self.users[page] == 1, "only a page of one's own is written to"
        for place, token in enumerate(tokens, first):  # type: ignore[call-overload]
            self.content[page, place] = token


SharedPages.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestSharedPages = SharedPages.TestCase


@pytest.mark.parametrize("seed", range(6))
def test_the_same_over_long_runs(seed: int) -> None:
    """Long enough for what is rare: two who compute one block, what hangs under an evicted one, pages that just suffice."""
    rng, pages = random.Random(seed), SharedPages()
    for _ in range(1500):
        name = rng.choice(["add", "take", "copy_part", "compute", "compute", "compute", "grow", "advance", "leave", "follow"])
        if name == "add" and len(pages.running) + len(pages.waiting) < 6:
            pages.add(rng.choice(TEXTS), rng.randint(1, 14), rng.choice([b"", TENANT]))
        elif name == "take" and pages.waiting:
            pages.take(rng.randrange(64), rng.randrange(3))
        elif name == "follow":
            pages.follow(rng.random() < 0.1)
        elif pages.running and name not in ("add", "take"):
            more = {"compute": [rng.randint(1, 7)], "grow": [rng.randrange(2)], "leave": [rng.random() < 0.3]}
            getattr(pages, name)(rng.randrange(64), *more.get(name, []))
        pages.check()
        pages.check_chains()
    pages.teardown()


def test_a_sequence_that_scores_its_prompt_uses_nobody_s_pages_until_it_has() -> None:
    allocator = PageAllocator(NUM_PAGES, PrefixPages(ROOT, SIZE))

    def made(num_prompt_logprobs: int | None) -> Sequence:
        sequence = Sequence("r", [0] * 8, 8, SamplingParams(max_tokens=8), num_prompt_logprobs=num_prompt_logprobs)
        sequence.block_keys = block_keys(ROOT, sequence.token_ids, SIZE)
        return sequence

    first, scoring, plain = made(None), made(0), made(None)
    assert allocator.take(first, 3) and allocator.take(scoring, 3)
    first.num_computed_tokens = 8
    allocator.keep(first)
    assert allocator.advance(scoring, 0) == 0 and allocator.hold_part(scoring, 0) is None
    allocator.release(scoring)
    assert allocator.take(scoring, 3) and not {*scoring.pages} & {*first.pages}, "what is computed there gives no logits"
    scoring.num_scored_tokens = 8
    assert allocator.advance(scoring, 0) == 6 and scoring.pages[:2] == first.pages[:2]
    assert allocator.take(plain, 3) and plain.pages[:2] == first.pages[:2]

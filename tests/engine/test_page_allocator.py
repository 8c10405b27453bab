from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.prefix_pages import PrefixPages
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.sampling import SamplingParams

NUM_PAGES = 13


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_every_page_is_free_or_held_by_one_owner(steps):
    """Each step: (True, n) allocates n pages where they fit, (False, i) frees the i-th holding."""
    allocator, held = PageAllocator(NUM_PAGES), []
    for allocates, number in steps:
        if allocates and allocator.can_allocate(number):
            held.append(allocator.allocate(number))
        elif allocates:
            with pytest.raises(ValueError, match="pages asked for"):
                allocator.allocate(number)
        elif held:
            allocator.free(held.pop(number % len(held)))
        pages = [page for one in held for page in one]
        assert len(set(pages)) == len(pages) and set(pages) <= set(range(NUM_PAGES))
        assert allocator.num_free == NUM_PAGES - len(pages)
        assert allocator.usage_ratio == len(pages) / NUM_PAGES


def test_a_page_freed_twice_is_an_error():
    allocator = PageAllocator(NUM_PAGES)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is freed twice"):
        allocator.free(pages)


def test_what_is_discarded_is_found_by_nobody_and_named_where_nobody_else_uses_it():
    allocator = PageAllocator(NUM_PAGES, PrefixPages(b"root", 2))
    keys = [b"a", b"b", b"c"]
    first, second = (Sequence("r", [1, 2, 3, 4, 5, 6, 7], 7, SamplingParams(), block_keys=list(keys)) for _ in range(2))
    assert allocator.take(first, 4)
    first.num_computed_tokens = 6
    allocator.keep(first)
    assert allocator.take(second, 4) and second.pages[:3] == first.pages[:3]
    assert allocator.discard(first, first.pages[1:]) == [first.pages[3]], "the other one uses the shared pages"
    third = Sequence("r", [1, 2, 3, 4, 5, 6, 7], 7, SamplingParams(), block_keys=list(keys))
    assert allocator.take(third, 4) and third.num_computed_tokens == 2, "only the first block is found"
    allocator.keep(first)
    allocator.release(first)
    assert allocator.prefixes is not None and allocator.prefixes.keys() == [b"a"], "nothing of it is kept"
    assert allocator.discard(second, second.pages[1:]) == second.pages[1:]
    for sequence in (second, third):
        allocator.release(sequence)
    assert allocator.num_free == NUM_PAGES

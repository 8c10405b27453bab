from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfmoon.engine.page_allocator import PageAllocator

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

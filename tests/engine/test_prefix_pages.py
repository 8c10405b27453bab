"""Which blocks are found, and in which order pages are given up, on hand-made sequences."""

from __future__ import annotations

import random

from halfmoon.engine import key_changes
from halfmoon.engine.page_allocator import PageAllocator
from halfmoon.engine.prefix_pages import PrefixPages
from halfmoon.engine.sequence import Sequence
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.sampling import SamplingParams

SIZE = 4
ROOT = root_key(b"model")


def make_allocator(num_pages: int = 20) -> PageAllocator:
    return PageAllocator(num_pages, PrefixPages(ROOT, SIZE))


def computed(allocator: PageAllocator, tokens: list[int]) -> Sequence:
    """A sequence that has been computed here, and still holds its pages."""
    sequence = started(allocator, tokens)
    sequence.num_computed_tokens = len(tokens)
    allocator.keep(sequence)
    return sequence


def started(allocator: PageAllocator, tokens: list[int]) -> Sequence:
    sequence = Sequence("r", list(tokens), len(tokens), SamplingParams(max_tokens=8))
    sequence.block_keys = block_keys(ROOT, tokens, SIZE)
    assert allocator.take(sequence, -(-len(tokens) // SIZE))
    return sequence


def num_found(allocator: PageAllocator, tokens: list[int]) -> int:
    assert allocator.prefixes is not None
    return len(allocator.prefixes.find_run(block_keys(ROOT, tokens, SIZE)))


def test_a_block_is_found_as_soon_as_it_is_full_while_its_sequence_goes_on() -> None:
    allocator = make_allocator()
    first = computed(allocator, list(range(10)))
    second = started(allocator, [*range(9), 99, 99, 99])
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert second.num_computed_tokens == 8 and allocator.num_free == 20 - 4


def test_the_last_token_is_computed_even_where_all_blocks_are_known() -> None:
    allocator = make_allocator()
    computed(allocator, list(range(8)))
    again = started(allocator, list(range(8)))
    assert again.num_computed_tokens == 4
    part = allocator.hold_part(again, 4)
    assert part is not None and part.num_tokens == 3, "and no more is computed than that one"


def test_of_two_who_computed_the_same_one_copy_stays() -> None:
    allocator = make_allocator()
    one, other = started(allocator, list(range(12))), started(allocator, list(range(12)))
    for sequence in (one, other):
        sequence.num_computed_tokens = 12
        allocator.keep(sequence)
    own = other.pages
    allocator.release(other)
    assert not any(map(allocator.prefixes.__contains__, own)) and num_found(allocator, list(range(12))) == 3
    allocator.release(one)
    assert allocator.num_free == 20 and allocator.num_cached == 3


def test_a_hit_ends_inside_a_block_at_the_first_token_that_differs() -> None:
    allocator = make_allocator()
    for last in ([7, 7, 7, 7], [7, 7, 1, 1], [9, 9, 9, 9]):
        allocator.release(computed(allocator, [0, 1, 2, 3, *last]))
    for tokens, num_agreeing in (([7, 7, 1, 5], 3), ([7, 7, 7, 8], 3), ([7, 8, 7, 7], 1), ([9, 9, 9, 9], 4), ([8, 7, 7, 7], 0)):
        sequence = started(allocator, [0, 1, 2, 3, *tokens, 5])
        part = allocator.hold_part(sequence, 4) if sequence.num_computed_tokens == 4 else None
        found = sequence.num_computed_tokens - 4 if part is None else part.num_tokens
        assert found == num_agreeing, tokens
        allocator.free([part.page] if part is not None else [])
        allocator.release(sequence)


def test_where_most_tokens_agree_is_what_a_search_through_all_blocks_finds() -> None:
    rng, prefixes = random.Random(3), PrefixPages(ROOT, SIZE)
    blocks: dict[int, list[int]] = {}
    for page in range(60):
        tokens = rng.choices(range(4), k=rng.randint(1, SIZE))
        if prefixes.add(ROOT, bytes([page]) if len(tokens) == SIZE else None, tokens, page) is not None:
            blocks[page] = tokens
    for _ in range(200):
        wanted = rng.choices(range(4), k=rng.randint(1, SIZE))
        page, num_tokens = prefixes.find_part(ROOT, wanted)
        agreeing = {other: next((n for n, (a, b) in enumerate(zip(wanted, tokens, strict=False)) if a != b), min(len(wanted), len(tokens)))
                    for other, tokens in blocks.items()}  # fmt: skip
        assert num_tokens == max(agreeing.values()) and (num_tokens == 0 or agreeing[page] == num_tokens)


def test_where_a_sequence_ended_inside_a_block_the_next_turn_goes_on() -> None:
    allocator = make_allocator()
    allocator.release(computed(allocator, list(range(10))))
    turn = started(allocator, [*range(10), 50, 51])
    assert turn.num_computed_tokens == 8
    part = allocator.hold_part(turn, 8)
    assert part is not None and part.num_tokens == 2 and part.page not in turn.pages


def test_ends_are_evicted_before_starts_and_the_least_recently_used_first() -> None:
    allocator = make_allocator(8)
    old, new = list(range(16)), [0, 1, 2, 3, 80, 81, 82, 83]
    for tokens in (old, new):
        allocator.release(computed(allocator, tokens))
    assert allocator.num_cached == 5 and allocator.num_free == 8
    seen = []
    for _ in range(8):
        allocator.allocate(1)
        seen.append((num_found(allocator, old), num_found(allocator, new)))
    assert seen == [(4, 2), (4, 2), (4, 2), (3, 2), (2, 2), (1, 2), (1, 1), (0, 0)]


def test_what_hangs_under_an_evicted_block_goes_with_it_and_its_page_is_its_users_alone() -> None:
    allocator = make_allocator(7)
    first, second = started(allocator, list(range(8))), started(allocator, [*range(8), 8, 9, 10, 11])
    for sequence in (first, second):  # both computed the first two blocks, and the first one's stayed
        sequence.num_computed_tokens = sequence.num_tokens
        allocator.keep(sequence)
    allocator.release(first)
    assert num_found(allocator, second.token_ids) == 3 and allocator.num_free == 4
    held = list(second.pages)
    others = allocator.allocate(4)
    assert num_found(allocator, second.token_ids) == 0, "the third block builds on the first two"
    assert not set(others) & set(held)
    second.token_ids += [12, 13, 14, 15]
    allocator.free(others)
    second.pages += allocator.allocate(1)
    second.num_computed_tokens = 16
    allocator.keep(second)
    assert num_found(allocator, second.token_ids) == 4, "offered again from the start, out of its own pages"
    allocator.release(second)
    assert allocator.num_free == 7


def test_blocks_that_another_computed_meanwhile_take_the_place_of_ones_own_pages() -> None:
    allocator = make_allocator()
    waiting = started(allocator, [*range(12), 70])
    first = computed(allocator, [*range(12), 60])
    assert allocator.advance(waiting, 0) == 12
    assert waiting.pages[:3] == first.pages[:3] and allocator.num_free == 20 - 5


def test_without_keys_or_without_a_cache_nothing_stays() -> None:
    for allocator in (PageAllocator(6), make_allocator(6)):
        sequence = Sequence("r", list(range(9)), 9, SamplingParams(max_tokens=8))
        if allocator.prefixes is None:
            sequence.block_keys = block_keys(ROOT, sequence.token_ids, SIZE)
        assert allocator.take(sequence, 3) and not allocator.take(sequence, 2, num_spare=2)
        sequence.num_computed_tokens = 9
        allocator.keep(sequence)
        assert allocator.advance(sequence, 9) == 9 and allocator.hold_part(sequence, 8) is None
        allocator.release(sequence)
        assert allocator.num_free == 6 and allocator.num_cached == 0


def test_a_follower_gets_the_whole_in_parts_and_changes_behind_it(monkeypatch) -> None:
    monkeypatch.setattr(key_changes, "MAX_TAKEN", 2)
    allocator = make_allocator(6)
    prefixes = allocator.prefixes
    assert prefixes is not None and prefixes.changes.take() is None
    tokens = list(range(20))
    allocator.release(computed(allocator, tokens))
    keys = block_keys(ROOT, tokens, SIZE)
    prefixes.changes.restart()
    assert prefixes.changes.take() == (True, keys[:2], [])
    allocator.allocate(2)  # evicts the last block, which is still to be told of
    assert prefixes.changes.take() == (False, keys[2:4], [])
    assert prefixes.changes.take() == (False, keys[4:], [])
    assert prefixes.changes.take() == (False, [], [keys[4]])
    assert prefixes.changes.take() is None


def test_a_follower_that_does_not_ask_for_long_gets_the_whole_again(monkeypatch) -> None:
    monkeypatch.setattr(key_changes, "MAX_PENDING", 3)
    allocator = make_allocator()
    assert allocator.prefixes is not None
    changes = allocator.prefixes.changes
    changes.restart()
    assert changes.take() == (True, [], [])
    allocator.release(computed(allocator, list(range(12))))
    keys = block_keys(ROOT, list(range(24)), SIZE)
    assert changes.take() == (False, keys[:3], [])
    allocator.release(computed(allocator, [*range(24)]))
    computed(allocator, list(range(50, 56)))
    assert changes.take() == (True, allocator.prefixes.keys(), [])

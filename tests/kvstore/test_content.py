from __future__ import annotations

from halfmoon.kvstore.content import ContentIndex
from halfmoon.kvstore.eviction import LRU
from halfmoon.kvstore.slots import SlotAllocator


def build(num_slots: int) -> tuple[ContentIndex, SlotAllocator, list[tuple[list[bytes], list[bytes]]]]:
    changes: list[tuple[list[bytes], list[bytes]]] = []
    slots = SlotAllocator(num_slots)
    return ContentIndex(slots, LRU(), lambda stored, evicted: changes.append((stored, evicted))), slots, changes


def store(index: ContentIndex, *keys: bytes) -> list[int]:
    found = index.allocate(len(keys))
    assert found is not None
    index.add(zip(keys, found, range(len(keys)), strict=True))
    index.unpin(found)
    return found


def test_a_chain_is_evicted_from_its_end() -> None:
    index, _, changes = build(3)
    store(index, b"a0", b"a1", b"a2")
    held = index.allocate(2)
    assert index.keys() == [b"a0"] and held is not None
    assert changes == [([b"a0", b"a1", b"a2"], []), ([], [b"a2", b"a1"])]


def test_a_pinned_block_is_never_evicted() -> None:
    index, _, _ = build(3)
    slots = store(index, b"a0", b"a1", b"a2")
    index.pin(slots[2:])
    assert index.allocate(3) is None and len(index) == 3
    assert index.allocate(2) is not None and index.keys() == [b"a2"]
    index.unpin(slots[2:])
    assert index.allocate(1) == [slots[2]]


def test_using_a_block_makes_it_young_again() -> None:
    index, _, _ = build(2)
    old = store(index, b"old")
    store(index, b"new")
    index.pin(old)
    index.unpin(old)
    index.allocate(1)
    assert index.keys() == [b"old"]


def test_the_first_slot_of_a_key_wins() -> None:
    index, slots, changes = build(2)
    first, second = index.allocate(1), index.allocate(1)
    assert first is not None and second is not None
    index.add([(b"k", first[0], 11)])
    index.add([(b"k", second[0], 22)])
    assert index.slot(b"k") == first[0] and index.checksum(first[0]) == 11 and len(changes) == 1
    index.unpin(second)
    assert (slots.num_leased, slots.num_cached, slots.num_free) == (1, 0, 1)


def test_a_dropped_block_is_not_found_and_is_freed_by_its_last_holder() -> None:
    index, slots, changes = build(2)
    found = store(index, b"k")
    index.pin(found)
    index.drop(found)
    index.drop(found)
    assert index.slot(b"k") is None and changes[-1] == ([], [b"k"]) and slots.num_leased == 1
    index.unpin(found)
    assert slots.num_free == 2


def test_the_run_ends_at_the_first_key_that_is_missing() -> None:
    index, _, _ = build(4)
    slots = store(index, b"a", b"b", b"d")
    assert index.find_run([b"a", b"b", b"c", b"d"]) == slots[:2]
    assert index.find_run([]) == [] and index.find_run([b"c"]) == []

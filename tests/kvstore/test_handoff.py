from __future__ import annotations

from halfmoon.kvstore.handoff import HandoffId, Tombstones
from halfmoon.protocol.errors import WorkerLost


def test_a_tombstone_covers_its_epoch_and_the_earlier_ones() -> None:
    stones = Tombstones(lambda: 0.0)
    stones.bury(HandoffId("a", 3), WorkerLost("p0 died"))
    stones.bury(HandoffId("a", 2), WorkerLost("late news"))
    assert all(stones.find(HandoffId("a", epoch)) for epoch in (1, 2, 3))
    assert stones.find(HandoffId("a", 4)) is None and stones.find(HandoffId("b", 1)) is None
    found = stones.find(HandoffId("a", 1))
    assert found is not None and "p0 died" in found.stale(HandoffId("a", 1)).message


def test_tombstones_are_forgotten_after_their_time() -> None:
    now = [0.0]
    stones = Tombstones(lambda: now[0], ttl_s=10)
    stones.bury(HandoffId("a", 1), WorkerLost("x"))
    now[0] = 6
    stones.bury(HandoffId("b", 1), WorkerLost("x"))
    stones.bury(HandoffId("a", 2), WorkerLost("x"))
    now[0] = 12
    assert stones.find(HandoffId("a", 1)) and stones.find(HandoffId("b", 1))
    now[0] = 17
    assert stones.find(HandoffId("a", 2)) is None and len(stones) == 0


def test_their_number_is_bounded() -> None:
    stones = Tombstones(lambda: 0.0, max_entries=3)
    for name in "abcd":
        stones.bury(HandoffId(name, 1), WorkerLost("x"))
    assert len(stones) == 3 and stones.find(HandoffId("a", 1)) is None and stones.find(HandoffId("d", 1))

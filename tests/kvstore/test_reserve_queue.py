"""Who may take room, and who is woken for it. Counts, no clock."""

from __future__ import annotations

from halfmoon.kvstore.reserve_queue import ReserveQueue, Ticket


class Woken(list[Ticket]):
    def take(self) -> list[Ticket]:
        found = self[:]
        self.clear()
        return found


def make_queue() -> tuple[ReserveQueue, Woken]:
    woken = Woken()
    return ReserveQueue(woken.append), woken


def test_freed_room_wakes_the_first_alone_and_its_leaving_the_next() -> None:
    queue, woken = make_queue()
    first, second, third = (queue.join("s", f"r{n}", 1) for n in range(3))
    queue.wake_first()
    assert woken.take() == [first]
    queue.leave(first)
    assert woken.take() == [second]
    queue.leave(third)  # was not the first: nothing changes for anybody
    assert woken.take() == []
    queue.leave(second)
    queue.wake_first()
    assert woken.take() == [] and len(queue) == 0


def test_only_the_first_may_go_while_the_others_can_wait() -> None:
    queue, _ = make_queue()
    first, second = queue.join("s", "large", 8), queue.join("s", "small", 1)
    assert queue.may_go(first, can_wait=True) and queue.may_go(first, can_wait=False)
    assert not queue.may_go(second, can_wait=True)


def test_what_cannot_wait_passes_the_first_until_as_much_has_passed_as_the_first_asks_for() -> None:
    queue, _ = make_queue()
    queue.join("s", "large", 8)
    for num_blocks in (4, 3):
        passing = queue.join("s", "", num_blocks)
        assert queue.may_go(passing, can_wait=False)
        queue.went(passing)
        queue.leave(passing)
    assert not queue.may_go(queue.join("s", "", 2), can_wait=False)
    assert queue.may_go(queue.join("s", "", 1), can_wait=False)


def test_a_new_first_may_be_passed_anew() -> None:
    queue, _ = make_queue()
    first, second = queue.join("s", "r1", 2), queue.join("s", "r2", 2)
    passing = queue.join("s", "", 2)
    queue.went(passing)
    assert not queue.may_go(queue.join("s", "", 1), can_wait=False)
    queue.leave(first)
    assert second.num_blocks_passed == 0 and queue.may_go(queue.join("s", "", 2), can_wait=False)


def test_an_abort_and_the_end_of_a_session_wake_their_own_requests_alone() -> None:
    queue, woken = make_queue()
    ours, theirs, again = queue.join("a", "r1", 1), queue.join("b", "r2", 1), queue.join("a", "r2", 1)
    queue.wake_handoff("r2")
    assert set(woken.take()) == {theirs, again}
    queue.wake_session("a")
    assert set(woken.take()) == {ours, again}
    queue.leave(again)
    queue.wake_handoff("r2")
    assert woken.take() == [theirs]
    queue.wake_handoff("unknown")
    queue.wake_session("unknown")
    assert woken.take() == []

"""The requests that wait for room in the arena, in order of arrival. Freed room wakes the first alone: no other one could take it.

first ◄── woken by freed room                 a request that can wait no longer takes room that the first
  2                                           can't use yet, until those that passed the first have taken
  3 ──leaves──► nobody is woken               as much as the first itself asks for
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Ticket:
    session_id: str
    handoff_id: str  # "" for blocks to cache
    num_blocks: int
    num_blocks_passed: int = 0  # taken by later requests while this one was the first


class ReserveQueue:
    """Every operation takes constant time, but waking the requests of a whole session."""

    def __init__(self, wake: Callable[[Ticket], None]) -> None:
        """wake(ticket): its owner shall look again whether it may go."""
        self._wake = wake
        self._tickets: OrderedDict[Ticket, None] = OrderedDict()
        self._of_handoff: defaultdict[str, set[Ticket]] = defaultdict(set)
        self._of_session: defaultdict[str, set[Ticket]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._tickets)

    def join(self, session_id: str, handoff_id: str, num_blocks: int) -> Ticket:
        ticket = Ticket(session_id, handoff_id, num_blocks)
        self._tickets[ticket] = None
        self._of_handoff[handoff_id].add(ticket)
        self._of_session[session_id].add(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """It has its room, or has given up. The next one may have become the first, and is woken."""
        was_first = ticket is self._first()
        del self._tickets[ticket]
        for tickets, name in ((self._of_handoff, ticket.handoff_id), (self._of_session, ticket.session_id)):
            tickets[name].discard(ticket)
            if not tickets[name]:
                del tickets[name]
        if was_first:
            self.wake_first()

    def may_go(self, ticket: Ticket, *, can_wait: bool) -> bool:
        """Whether it may take room now, if there is enough for it."""
        first = self._first()
        if first is None or first is ticket:
            return True
        return not can_wait and first.num_blocks_passed + ticket.num_blocks <= first.num_blocks

    def went(self, ticket: Ticket) -> None:
        """It took its room."""
        first = self._first()
        if first is not None and first is not ticket:
            first.num_blocks_passed += ticket.num_blocks

    def wake_first(self) -> None:
        first = self._first()
        if first is not None:
            self._wake(first)

    def wake_handoff(self, handoff_id: str) -> None:
        self._wake_each(self._of_handoff.get(handoff_id, ()))

    def wake_session(self, session_id: str) -> None:
        self._wake_each(self._of_session.get(session_id, ()))

    def _wake_each(self, tickets: Iterable[Ticket]) -> None:
        for ticket in list(tickets):
            self._wake(ticket)

    def _first(self) -> Ticket | None:
        return next(iter(self._tickets), None)

"""Who copies into or out of leased slots on a thread of the store, beside the event loop that owns the leases.

open ─► enter (thread) ─► copy ─► leave (thread)
  └──── close (loop): no copy begins any more; those under way are broken off, and the slots are let go when the last has left
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ..protocol.errors import InvalidRequest, LeaseExpired
from .data_wire import Op, Request
from .handoff import Access, Lease
from .progress import Progress

Break = Callable[[], None]


@dataclass(slots=True, eq=False)
class OpenLease:
    lease_id: str
    session_id: str
    access: Access
    slots: list[int]
    progress: Progress  # READ: of what is written; WRITE: of what is claimed, so that no slice is written twice
    copying: dict[object, tuple[Request, Break]] = field(default_factory=dict[object, tuple[Request, Break]])
    untouched: Callable[[], None] | None = None  # set by close


class SlotAccess:
    """enter and leave: any thread; the rest: the event loop."""

    def __init__(self, post: Callable[[Callable[[], None]], object]) -> None:
        """post: runs a callback on the event loop."""
        self._post = post
        self._lock = threading.Condition()  # notified of every leave
        self._leases: dict[str, OpenLease] = {}

    def open(self, lease: Lease) -> None:
        progress = lease.progress
        if lease.access is Access.WRITE:
            progress = Progress(len(lease.slots), progress.num_layers, lease.present)
        opened = OpenLease(lease.lease_id, lease.client.session_id, lease.access, list(lease.slots), progress)
        with self._lock:
            self._leases[lease.lease_id] = opened

    def close(self, lease_id: str, untouched: Callable[[], None]) -> None:
        """untouched() is called once nobody copies any more: at once, or on the event loop after the last leave."""
        with self._lock:
            lease = self._leases.pop(lease_id, None)
            if lease is not None and lease.copying:
                lease.untouched = untouched
                for _, stop in lease.copying.values():
                    stop()
                return
        untouched()

    def enter(self, session_id: str, request: Request, copy: object, stop: Break) -> OpenLease | None:
        """A copy begins. copy: its name. stop: breaks it off, from any thread. None for a slice that is written already: its client did not
        hear of it, and says it again.

        Raises LeaseExpired where the lease is over, InvalidRequest for a slice that may not be copied.
        """
        with self._lock:
            lease = self._find(session_id, request)
            while (again := [stop for other, stop in lease.copying.values() if other == request and request.op is Op.WRITE]) != []:
                # its client has found that connection broken and begun anew; here it is not known yet
                for stop_other in again:
                    stop_other()
                self._lock.wait()
                lease = self._find(session_id, request)
            if (lease.access is Access.WRITE) is not (request.op is Op.WRITE):
                raise InvalidRequest(f"{request.op.name.lower()} on a lease to {lease.access.value}")
            slice_of = (request.layer, request.first_block, request.num_blocks, request.num_layers)
            if lease.access is Access.WRITE and lease.progress.is_written(*slice_of):
                return None
            if lease.access is Access.WRITE:
                lease.progress.record(*slice_of)
            else:
                lease.progress.require_written(*slice_of)
            lease.copying[copy] = (request, stop)
            return lease

    def leave(self, lease: OpenLease, copy: object, request: Request, *, done: bool) -> None:
        """The copy is over. done: all of it was copied; a slice that was not may be written again."""
        with self._lock:
            del lease.copying[copy]
            if not done and request.op is Op.WRITE:
                lease.progress.take_back(request.first_block, request.num_blocks, request.num_layers)
            untouched = None if lease.copying else lease.untouched
            self._lock.notify_all()
        if untouched is not None:
            self._post(untouched)

    def _find(self, session_id: str, request: Request) -> OpenLease:
        lease = self._leases.get(request.lease_id)
        if lease is None or lease.session_id != session_id:
            raise LeaseExpired(f"no lease {request.lease_id!r} of this session")
        return lease

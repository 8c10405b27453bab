"""The store's manager: sessions' leases, hand-offs, content. One pure state machine: no clock of its own, no I/O, no waiting.

              LeaseManager ──────────► Observer (wakes waiters, watchers, metrics)
      leases │ hand-offs │ tombstones
             ContentIndex      key -> slot, pins, eviction
             SlotAllocator     leased + cached + free = arena, at every moment

A lease that is taken from a client which maps the arena keeps its slots (quarantine) until that client says it has let go
(release) or its session ends: it may be in the middle of a copy, and the slot must not be another's by then.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from ..protocol.blocks import KEY_BYTES
from ..protocol.errors import (
    DeadlineExceeded,
    HalfmoonError,
    InvalidRequest,
    LeaseExpired,
    PromptTooLong,
    RequestCancelled,
    StaleEpoch,
    StoreFull,
    StoreUnavailable,
    WorkerLost,
)
from ..protocol.v1 import common_pb2
from .content import ContentIndex
from .eviction import EvictionPolicy
from .handoff import Access, Client, Handoff, HandoffId, Lease, Tombstones, aborted
from .progress import Progress
from .slots import SlotAllocator


class Observer(Protocol):
    def lease_ended(self, lease_id: str, error: HalfmoonError | None) -> None:
        """Released or sealed (None), or taken away. Told once a lease."""
        ...

    def handoff_changed(self, handoff_id: str) -> None:
        """Reserved, written, sealed or aborted."""
        ...

    def handoff_ended(self, handoff_id: HandoffId, error: HalfmoonError | None) -> None: ...

    def when_untouched(self, lease_id: str, then: Callable[[], None]) -> None:
        """Calls then once no thread of the store copies into or out of the lease's slots any more, and none will."""
        ...

    def room_freed(self) -> None: ...

    def content_changed(self, stored: list[bytes], evicted: list[bytes]) -> None: ...


class Accounting(NamedTuple):
    """In slots. num_slots = num_leased + num_cached + num_free."""

    num_slots: int
    num_leased: int
    num_cached: int
    num_free: int


class LeaseManager:
    def __init__(self, num_slots: int, num_layers: int, policy: EvictionPolicy, clock: Callable[[], float], observer: Observer) -> None:
        self._num_layers = num_layers
        self._observer = observer
        self.slots = SlotAllocator(num_slots)
        self.content = ContentIndex(self.slots, policy, observer.content_changed)
        self._clients: dict[str, Client] = {}
        self._leases: dict[str, Lease] = {}
        self._handoffs: dict[str, Handoff] = {}
        self._tombstones = Tombstones(clock)
        self.num_expired_leases = 0
        self.num_query_blocks = 0
        self.num_hit_blocks = 0

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_handoffs(self) -> int:
        return len(self._handoffs)

    def accounting(self) -> Accounting:
        slots = self.slots
        return Accounting(slots.num_slots, slots.num_leased, slots.num_cached, slots.num_free)

    # sessions

    def open_session(self, session_id: str, client_id: str, shares_arena: bool) -> None:
        self._clients[session_id] = Client(session_id, client_id, shares_arena)

    def client(self, session_id: str) -> Client:
        """Raises LeaseExpired where the session has ended."""
        client = self._clients.get(session_id)
        if client is None:
            raise LeaseExpired(f"no session {session_id!r}: the client was silent for too long or detached; attach again")
        return client

    def end_session(self, session_id: str, what_happened: str, cause: HalfmoonError | None = None) -> None:
        """Ends every lease of it; what_happened completes "<client> …". Its unsealed hand-offs abort with that reason.

        cause: in the place of the client's loss, where it is not the client that is gone.
        """
        client = self._clients.pop(session_id, None)
        if client is None:
            return
        self.num_expired_leases += len(client.leases)
        for lease in list(client.leases.values()):
            unsealed = lease.handoff is not None and lease.revoked is None and not lease.handoff.is_sealed
            lost = f"{client.client_id} {what_happened}{' before the seal' if unsealed else ''}"
            reason = cause or WorkerLost(lost, client_id=client.client_id)
            if lease.handoff is not None and unsealed:
                self._abort(lease.handoff, reason)
            self._end_lease(lease, reason)

    # writing

    def num_fitting(self, block_keys: Sequence[bytes]) -> int:
        """How many leading blocks can stand here together: those that do, and room for the others without touching a leased one."""
        room = self.slots.num_free + self.slots.num_cached
        for index, key in enumerate(block_keys):
            slot = self.content.slot(key)
            if slot is None or self.slots.num_pins(slot) == 0:
                room -= 1  # a cached block of the run itself is not there to be evicted for it
            if room < 0:
                return index
        return len(block_keys)

    def check_epoch(self, handoff_id: HandoffId) -> None:
        """Raises StaleEpoch where this epoch has ended or a later one is under way."""
        tombstone = self._tombstones.find(handoff_id)
        if tombstone is not None:
            raise tombstone.stale(handoff_id)
        live = self._handoffs.get(handoff_id.id)
        if live is not None and live.handoff_id.epoch > handoff_id.epoch:
            raise StaleEpoch(f"{handoff_id} was given up: epoch {live.handoff_id.epoch} is under way")

    def end_reason(self, handoff_id: HandoffId) -> HalfmoonError | None:
        """Why this epoch has ended; None where it has not."""
        tombstone = self._tombstones.find(handoff_id)
        return None if tombstone is None else tombstone.reason

    def try_reserve(
        self, session_id: str, handoff_id: HandoffId | None, block_keys: Sequence[bytes], num_blocks: int, deadline: float
    ) -> Lease | None:
        """A lease to write num_blocks; None where there is no room now.

        handoff_id: None for blocks to cache; an earlier epoch still under way is aborted. deadline: when a hand-off ends that
        nobody has fetched.
        Raises LeaseExpired (the session ended), StaleEpoch, InvalidRequest; where it can never fit, PromptTooLong for a hand-off and
        StoreFull for blocks to cache.
        """
        client = self.client(session_id)
        check_keys(block_keys)
        if num_blocks - len(block_keys) not in ((0, 1) if handoff_id else (0,)):
            raise InvalidRequest(
                f"{num_blocks} blocks with {len(block_keys)} keys; a full block has a key, only a hand-off's partial last block has none"
            )
        if num_blocks > self.slots.num_slots:
            never = f"{num_blocks} blocks can never fit: the arena has {self.slots.num_slots} slots; raise store.arena_bytes"
            raise StoreFull(never) if handoff_id is None else PromptTooLong(f"{never}, or shorten the prompt")
        if handoff_id is not None:
            self._supersede(handoff_id)
        placed = self._place(block_keys, num_blocks)
        if placed is None:
            return None
        lease = self._open_lease(client, Access.WRITE, *placed, block_keys)
        if handoff_id is not None:
            lease.handoff = Handoff(handoff_id, lease, deadline)
            self._handoffs[handoff_id.id] = lease.handoff
            self._observer.handoff_changed(handoff_id.id)
        return lease

    def push(self, lease_id: str, layer: int, first_block: int, num_blocks: int, num_layers: int = 1) -> list[int]:
        """Records a slice as written; returns its blocks' slots.

        Raises LeaseExpired, HandoffAborted, InvalidRequest (outside, out of order, or a present block).
        """
        lease = self.writer(lease_id)
        lease.progress.record(layer, first_block, num_blocks, num_layers)
        if lease.handoff is not None:
            self._observer.handoff_changed(lease.handoff.handoff_id.id)
        return lease.slots[first_block : first_block + num_blocks]

    def seal(self, lease_id: str, state: common_pb2.HandoffState, checksums: Sequence[int]) -> None:
        """Makes the blocks immutable: keyed ones are found from now on, the hand-off can be fetched to its end.

        checksums: xxh3-64 of each block; ignored where present. Raises HandoffIncomplete and changes nothing where a
        slice is missing; LeaseExpired, HandoffAborted, InvalidRequest.
        """
        lease = self.writer(lease_id)
        if len(checksums) != len(lease.slots):
            raise InvalidRequest(f"{len(checksums)} checksums for {len(lease.slots)} blocks; send one for each")
        lease.progress.require_complete(str(lease.handoff.handoff_id) if lease.handoff else "the lease")
        # a present block can have been dropped as corrupt since: it stays readable, its own checksum tells on it
        known = zip(lease.slots, lease.present, lease.checksums, checksums, strict=True)
        lease.checksums = [old if present else new for _, present, old, new in known]
        keyed = zip(lease.block_keys, lease.slots, lease.checksums, lease.present, strict=False)
        self.content.add((key, slot, checksum) for key, slot, checksum, present in keyed if not present)
        handoff = lease.handoff
        if handoff is None:
            self._end_lease(lease, None)
            return
        handoff.state, handoff.checksums = state, lease.checksums
        self.content.pin(lease.slots)  # the hand-off's own hold, until it ends
        self._end_lease(lease, None)
        self._observer.handoff_changed(handoff.handoff_id.id)
        self._end_orphan(handoff)

    def writer(self, lease_id: str) -> Lease:
        """The open lease to write. Raises LeaseExpired, InvalidRequest, HandoffAborted (why the lease was revoked)."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseExpired(f"no lease {lease_id!r}: it was released or sealed, or its session ended; reserve again, under a new epoch")
        if lease.access is not Access.WRITE:
            raise InvalidRequest(f"lease {lease_id!r} is for reading")
        if lease.revoked is not None:
            raise lease.revoked
        return lease

    # reading

    def open_fetch(self, session_id: str, handoff_id: HandoffId) -> Lease | None:
        """A lease to read the hand-off, sealed or still growing; None where it is not reserved yet.

        Raises LeaseExpired, StaleEpoch, InvalidRequest (somebody else is fetching it).
        """
        client = self.client(session_id)
        self.check_epoch(handoff_id)
        handoff = self._handoffs.get(handoff_id.id)
        if handoff is None or handoff.handoff_id.epoch < handoff_id.epoch:
            return None
        if handoff.reader is not None:
            raise InvalidRequest(f"{handoff_id} is being fetched already; it is for one reader")
        writer = handoff.writer
        self.content.pin(writer.slots)
        lease = self._open_lease(client, Access.READ, list(writer.slots), [], writer.block_keys)
        lease.progress, lease.handoff, handoff.reader = writer.progress, handoff, lease
        return lease

    def fetch_prefix(self, session_id: str, block_keys: Sequence[bytes]) -> Lease:
        """A lease to read the longest run of leading keys, possibly of no block. Raises LeaseExpired, InvalidRequest."""
        client = self.client(session_id)
        check_keys(block_keys)
        slots = self.content.find_run(block_keys)
        self.num_query_blocks += len(block_keys)
        self.num_hit_blocks += len(slots)
        self.content.pin(slots)
        return self._open_lease(client, Access.READ, slots, [True] * len(slots), block_keys[: len(slots)])

    # ending

    def abort(self, handoff_id: HandoffId, reason: HalfmoonError) -> bool:
        """Ends this epoch and every earlier one; True where one was under way. Cached blocks of a sealed one stay cached."""
        live = self._handoffs.get(handoff_id.id)
        found = live is not None and live.handoff_id.epoch <= handoff_id.epoch
        if live is not None and found:
            self._abort(live, reason)
        self._tombstones.bury(handoff_id, reason)
        self._observer.handoff_changed(handoff_id.id)
        return found

    def expire_handoff(self, handoff_id: HandoffId) -> None:
        """Its deadline has come: over, unless somebody is fetching it (then the fetch's own deadline counts)."""
        live = self._handoffs.get(handoff_id.id)
        if live is not None and live.handoff_id == handoff_id and live.reader is None:
            self.num_expired_leases += 1
            self._abort(live, DeadlineExceeded("nobody fetched it before its deadline"))

    def orphan_handoffs(self, reason: HalfmoonError) -> None:
        """Who began the hand-offs that are here is gone. Sealed ones without a reader end now, others with their seal or their reader."""
        for handoff in list(self._handoffs.values()):
            handoff.orphaned = reason
            self._end_orphan(handoff)

    def end_lease(self, lease_id: str, error: HalfmoonError) -> None:
        """The store ends a lease to read: its hand-off can't be read to the end."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.revoked is not None:
            return
        if lease.handoff is not None and not lease.handoff.is_sealed:
            self._abort(lease.handoff, error)
        else:
            self._revoke(lease, error)

    def release(self, lease_id: str, corrupt_blocks: Iterable[int] = ()) -> None:
        """The client has let go of the slots. An unknown lease is over already, which is as well.

        Before the seal this aborts the hand-off, from either side; after it, the fetcher's release ends the hand-off.
        corrupt_blocks: those of the lease whose bytes did not match; nobody shall find them again.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            return
        if lease.access is Access.READ and lease.slots:
            self.content.drop(lease.slots[block] for block in corrupt_blocks if block < len(lease.slots))
        handoff, client = lease.handoff, lease.client
        if handoff is not None and lease.revoked is None and not handoff.is_sealed:
            self._abort(handoff, RequestCancelled(f"{client.client_id} gave it up before the seal", client_id=client.client_id))
        self._end_lease(lease, None)

    def _place(self, block_keys: Sequence[bytes], num_blocks: int) -> tuple[list[int], list[bool]] | None:
        """Pinned slots of the blocks, and which of them stand here already; None where there is no room."""
        found = [self.content.slot(key) for key in block_keys] + [None] * (num_blocks - len(block_keys))
        present = [slot for slot in found if slot is not None]
        self.content.pin(present)  # first, so that making room does not evict them
        allocated = self.content.allocate(num_blocks - len(present))
        if allocated is None:
            self.content.unpin(present)
            return None
        fresh = iter(allocated)
        return [next(fresh) if slot is None else slot for slot in found], [slot is not None for slot in found]

    def _supersede(self, handoff_id: HandoffId) -> None:
        self.check_epoch(handoff_id)
        live = self._handoffs.get(handoff_id.id)
        if live is None:
            return
        if live.handoff_id == handoff_id:
            raise InvalidRequest(f"{handoff_id} is reserved already; a retry needs a new epoch")
        self._abort(live, StaleEpoch(f"epoch {handoff_id.epoch} took its place"))

    def _open_lease(self, client: Client, access: Access, slots: list[int], present: list[bool], block_keys: Sequence[bytes]) -> Lease:
        lease = Lease(
            lease_id=secrets.token_hex(16),
            client=client,
            access=access,
            slots=slots,
            block_keys=list(block_keys),
            present=present,
            progress=Progress(len(slots), self._num_layers, present),
            checksums=[self.content.checksum(slot) if found else 0 for slot, found in zip(slots, present, strict=False)],
        )
        self._leases[lease.lease_id] = lease
        client.leases[lease.lease_id] = lease
        return lease

    def _abort(self, handoff: Handoff, reason: HalfmoonError) -> None:
        # a store that ends is nobody's giving up: both sides are told what they would be told if it had died
        error = reason if isinstance(reason, StoreUnavailable) else aborted(handoff.handoff_id, reason)
        self._end_handoff(handoff, reason, error)
        for lease in (handoff.writer, handoff.reader):
            if lease is not None and lease.lease_id in self._leases:
                self._revoke(lease, error)

    def _end_orphan(self, handoff: Handoff) -> None:
        if handoff.orphaned is not None and handoff.is_sealed and handoff.reader is None:
            self._abort(handoff, handoff.orphaned)

    def _end_handoff(self, handoff: Handoff, reason: HalfmoonError, error: HalfmoonError | None) -> None:
        self._tombstones.bury(handoff.handoff_id, reason)
        del self._handoffs[handoff.handoff_id.id]
        if handoff.is_sealed:
            self._unpin(handoff.writer.slots)
        self._observer.handoff_ended(handoff.handoff_id, error)
        self._observer.handoff_changed(handoff.handoff_id.id)

    def _revoke(self, lease: Lease, error: HalfmoonError) -> None:
        """It counts no more. Its slots go at once where only the store itself touches them."""
        if lease.revoked is not None:
            return
        lease.revoked = error
        if not lease.client.shares_arena:
            slots, lease.slots = lease.slots, []
            self._observer.when_untouched(lease.lease_id, partial(self._unpin, slots))
        self._observer.lease_ended(lease.lease_id, error)

    def _end_lease(self, lease: Lease, error: HalfmoonError | None) -> None:
        del self._leases[lease.lease_id]
        del lease.client.leases[lease.lease_id]
        handoff = lease.handoff
        if lease.access is Access.READ and handoff is not None and lease.revoked is None:
            self._end_handoff(handoff, error or RequestCancelled("it was fetched and released"), None)
        self._observer.when_untouched(lease.lease_id, partial(self._unpin, lease.slots))
        if lease.revoked is None:
            self._observer.lease_ended(lease.lease_id, error)

    def _unpin(self, slots: Sequence[int]) -> None:
        if slots:
            self.content.unpin(slots)
            self._observer.room_freed()


def check_keys(block_keys: Sequence[bytes]) -> None:
    """Raises InvalidRequest for what is no block key."""
    for key in block_keys:
        if len(key) != KEY_BYTES:
            raise InvalidRequest(f"block key {key.hex()} has {len(key)} bytes; it must have {KEY_BYTES}")

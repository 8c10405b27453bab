"""A hand-off and the leases on it, as values; lease_manager.py moves them.

reserve ─► OPEN ──seal──► SEALED ──release by the fetcher──► ended
             └──abort, writer or fetcher gone, deadline──┴──► ended, with a reason

Every end leaves a tombstone: what arrives late for that epoch, or an earlier one, is told that it is stale and why.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..protocol.errors import HalfmoonError, HandoffAborted, StaleEpoch
from ..protocol.v1 import common_pb2
from .progress import Progress


class HandoffId(NamedTuple):
    id: str
    epoch: int

    def __str__(self) -> str:
        return f"hand-off {self.id} epoch {self.epoch}"


class Access(enum.Enum):
    WRITE = "write"
    READ = "read"


@dataclass(slots=True, eq=False)
class Client:
    """One session, as the lease manager sees it."""

    session_id: str
    client_id: str
    shares_arena: bool  # it reads and writes the slots that it holds in shared memory, unseen by the store
    leases: dict[str, Lease] = field(default_factory=dict[str, "Lease"])


@dataclass(slots=True, eq=False)
class Lease:
    """A client's hold on slots: each is pinned once by it until it ends."""

    lease_id: str
    client: Client
    access: Access
    slots: list[int]
    block_keys: list[bytes]  # keys of the full blocks; a partial last block has a slot and no key
    present: list[bool]  # WRITE: found under its key, so not written by this lease
    progress: Progress
    handoff: Handoff | None = None
    checksums: list[int] = field(default_factory=list[int])  # known once sealed
    without_data: bool = False  # READ: the client gets the bytes by itself, over a data connection
    ssd_wait_s: float = 0.0  # READ: as FetchReply.Layout has them
    num_ssd_blocks: int = 0
    revoked: HalfmoonError | None = None  # why it counts no more; slots that its client may still touch stay pinned


@dataclass(slots=True, eq=False)
class Handoff:
    handoff_id: HandoffId
    writer: Lease
    deadline: float  # until then somebody has to fetch it; on the lease manager's clock
    reader: Lease | None = None
    state: common_pb2.HandoffState | None = None  # set by the seal
    checksums: list[int] = field(default_factory=list[int])
    orphaned: HalfmoonError | None = None  # who began it is gone, so nobody will fetch it who does not do so already

    @property
    def is_sealed(self) -> bool:
        return self.state is not None


class Tombstone(NamedTuple):
    epoch: int
    reason: HalfmoonError
    expires: float

    def stale(self, handoff_id: HandoffId) -> StaleEpoch:
        return StaleEpoch(
            f"{handoff_id} is over: {self.reason.message}; a retry needs an epoch above {self.epoch}",
            last_epoch=self.epoch,
            reason=self.reason.code,
            reason_message=self.reason.message,
        )


class Tombstones:
    """The epochs that ended, by hand-off. Bounded in time and in number: the oldest are forgotten."""

    def __init__(self, clock: Callable[[], float], ttl_s: float = 900.0, max_entries: int = 65_536) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._entries: OrderedDict[str, Tombstone] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def bury(self, handoff_id: HandoffId, reason: HalfmoonError) -> None:
        """This epoch and every earlier one are over."""
        self._forget_expired()
        previous = self._entries.get(handoff_id.id)
        if previous is not None and previous.epoch >= handoff_id.epoch:
            return
        self._entries[handoff_id.id] = Tombstone(handoff_id.epoch, reason, self._clock() + self._ttl_s)
        self._entries.move_to_end(handoff_id.id)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def find(self, handoff_id: HandoffId) -> Tombstone | None:
        """The tombstone that covers this epoch."""
        self._forget_expired()
        found = self._entries.get(handoff_id.id)
        return found if found is not None and handoff_id.epoch <= found.epoch else None

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._entries:
            oldest = next(iter(self._entries))
            if self._entries[oldest].expires > now:
                break
            del self._entries[oldest]


def aborted(handoff_id: HandoffId, reason: HalfmoonError) -> HandoffAborted:
    """What everyone who waits on the hand-off is told."""
    return HandoffAborted(
        f"{handoff_id} was aborted: {reason.message}",
        handoff=handoff_id.id,
        epoch=handoff_id.epoch,
        reason=reason.code,
        reason_message=reason.message,
        reason_fields=reason.fields,
    )

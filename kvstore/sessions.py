"""The clients that are attached. A session lives as long as its Attach stream, and not longer than lease_ttl_s after its last sign of life.

Attach ─► open ─► heartbeat … heartbeat ─► stream ends | silence ─► ended: its leases go, its unsealed hand-offs abort
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from ..protocol.errors import HalfmoonError, LeaseExpired

logger = logging.getLogger(__name__)

HEARTBEAT_SHARE = 0.25  # of lease_ttl_s, between two heartbeats; a loop that is later than that itself calls nobody silent


@dataclass(slots=True, eq=False)
class Session:
    session_id: str
    client_id: str
    last_seen: float  # loop.time()
    ended: asyncio.Future[HalfmoonError | None]
    timer: asyncio.TimerHandle | None = field(default=None)


class Sessions:
    def __init__(self, lease_ttl_s: float, on_end: Callable[[str, str], None]) -> None:
        """on_end(session_id, what happened, to follow the client's name)."""
        self.lease_ttl_s = lease_ttl_s
        self._on_end = on_end
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, client_id: str) -> Session:
        loop = asyncio.get_running_loop()
        session = Session(secrets.token_hex(16), client_id, loop.time(), loop.create_future())
        session.timer = loop.call_later(self.lease_ttl_s, self._check, session)
        self._open[session.session_id] = session
        return session

    def touch(self, session: Session) -> None:
        session.last_seen = asyncio.get_running_loop().time()

    def end(self, session: Session, what_happened: str, error: HalfmoonError | None = None) -> None:
        """Ends it once; error: for the Attach stream where it is still open."""
        if self._open.pop(session.session_id, None) is None:
            return
        if session.timer is not None:
            session.timer.cancel()
        logger.info("session of %s ended: it %s", session.client_id, what_happened)
        if not session.ended.done():
            session.ended.set_result(error)
        self._on_end(session.session_id, what_happened)

    def end_all(self, what_happened: str, error: HalfmoonError) -> None:
        for session in list(self._open.values()):
            self.end(session, what_happened, error)

    def _check(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        silent_s, late_s = now - session.last_seen, now - session.timer.when() if session.timer is not None else 0.0
        left_s = self.lease_ttl_s - silent_s
        if late_s > self.lease_ttl_s * HEARTBEAT_SHARE:  # this loop stood still: heartbeats may have come that it has not read
            left_s = max(left_s, self.lease_ttl_s * HEARTBEAT_SHARE)
        if left_s > 0.0:
            session.timer = loop.call_later(left_s, self._check, session)
            return
        what = f"was silent for {silent_s:.1f} s"
        self.end(session, what, LeaseExpired(f"{session.client_id} {what}; the limit is {self.lease_ttl_s} s; attach again"))

"""The clients that are attached. A session lives as long as its Attach stream, and not longer than lease_ttl_s after its last sign of life.

Only time counts in which the store's own event loop turned: what came while it stood still has not been read yet.

Attach ─► open ─► heartbeat … heartbeat ─► stream ends | silence ─► ended: its leases go, its unsealed hand-offs abort
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol.awake_clock import AwakeClock
from ..protocol.errors import HalfmoonError, LeaseExpired

logger = logging.getLogger(__name__)

HEARTBEAT_SHARE = 0.25  # of lease_ttl_s, between two heartbeats
CHECK_SHARE = 0.05  # of lease_ttl_s, between two looks at who is silent


@dataclass(slots=True, eq=False)
class Session:
    session_id: str
    client_id: str
    ended: asyncio.Future[HalfmoonError | None]
    silent_s: float = 0.0  # since its last sign of life, as it counts
    num_beats: int = 0


class Sessions:
    def __init__(self, lease_ttl_s: float, on_end: Callable[[str, str], None]) -> None:
        """on_end(session_id, what happened, to follow the client's name)."""
        self.lease_ttl_s = lease_ttl_s
        self._on_end = on_end
        self._open: dict[str, Session] = {}
        self._interval_s = CHECK_SHARE * lease_ttl_s
        self._awake = AwakeClock(self._interval_s)
        self._timer: asyncio.TimerHandle | None = None  # while a session is open

    def __len__(self) -> int:
        return len(self._open)

    def open(self, client_id: str) -> Session:
        session = Session(secrets.token_hex(16), client_id, asyncio.get_running_loop().create_future())
        self._open[session.session_id] = session
        if self._timer is None:
            self._awake = AwakeClock(self._interval_s)
            self._check()
        return session

    def touch(self, session: Session) -> None:
        session.silent_s = 0.0
        session.num_beats += 1

    def end(self, session: Session, what_happened: str, error: HalfmoonError | None = None) -> None:
        """Ends it once; error: for the Attach stream where it is still open."""
        if self._open.pop(session.session_id, None) is None:
            return
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        logger.info("session of %s ended: it %s", session.client_id, what_happened)
        if not session.ended.done():
            session.ended.set_result(error)
        self._on_end(session.session_id, what_happened)

    def end_all(self, what_happened: str, error: HalfmoonError) -> None:
        for session in list(self._open.values()):
            self.end(session, what_happened, error)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        awake_s = self._awake.tick(loop.time())
        self._timer = loop.call_later(self._interval_s, self._check)
        for session in list(self._open.values()):
            session.silent_s += awake_s
            if session.silent_s >= self.lease_ttl_s:
                what = f"was silent for {session.silent_s:.1f} s"
                self.end(session, what, LeaseExpired(f"{session.client_id} {what}; the limit is {self.lease_ttl_s} s; attach again"))

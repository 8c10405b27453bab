"""When a call may be tried again: the connection failed before anything came back, and time is left.

call ── UNAVAILABLE without a word of the proxy, before the first reply ─► wait 0.1, 0.2, 0.4 … s ─► call
     └─ anything else ─► the error of protocol/errors.py
"""

from __future__ import annotations

import random
import time
from typing import Any

import grpc

from ..protocol.errors import HalfmoonError, Unavailable
from ..protocol.grpc_errors import TRAILER, from_rpc_error

MAX_ATTEMPTS = 6
FIRST_DELAY_S = 0.1
DEADLINE_SLACK_S = 2.0  # the proxy ends a request in time and says why; this side waits a little longer for that


class Attempts:
    """The attempts of one call.

    Args:
        timeout_s: over all of them together, checked by options.checked_timeout_s; None: no limit.
    """

    def __init__(self, peer: str, timeout_s: float | None) -> None:
        self._peer = peer
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._failures = 0

    @property
    def remaining_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def call_timeout_s(self) -> float | None:
        remaining_s = self.remaining_s
        return None if remaining_s is None else remaining_s + DEADLINE_SLACK_S

    def delay_after(self, error: grpc.RpcError, *, replied: bool) -> float:
        """Seconds to wait before the next attempt. Raises the error, typed, where there is to be none."""
        typed = self.typed(error)
        self._failures += 1
        delay_s = FIRST_DELAY_S * 2 ** (self._failures - 1) * random.uniform(0.8, 1.2)
        out_of_time = self.remaining_s is not None and self.remaining_s <= delay_s
        if replied or _no_grpc(error) or self._failures >= MAX_ATTEMPTS or out_of_time or not _never_arrived(error):
            raise typed from error
        return delay_s

    def typed(self, error: grpc.RpcError) -> HalfmoonError:
        found = from_rpc_error(error, f"the proxy at {self._peer}")
        if not _no_grpc(error):
            return found
        return Unavailable(
            f"what answers at {self._peer} speaks no gRPC, or only by TLS; give the cluster's gRPC address, not its HTTP one, and "
            "authority= where it has TLS"
        )


class ClosedFlag:
    """Whether a client was closed; its streams ask, too, before they try again."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._closed = False

    def set(self) -> None:
        self._closed = True

    def require_open(self) -> None:
        """Raises RuntimeError once the client was closed."""
        if self._closed:
            raise RuntimeError(f"this client of {self._address} was closed; make another one for more requests")


def _no_grpc(error: Any) -> bool:
    """Something else than gRPC in the clear answers there."""
    return "Failed parsing HTTP/2" in (error.details() or "")


def _never_arrived(error: Any) -> bool:
    """The transport failed; an UNAVAILABLE of the proxy's own (no worker, draining) carries our trailer."""
    ours = any(key == TRAILER for key, _ in error.trailing_metadata() or ())
    return error.code() is grpc.StatusCode.UNAVAILABLE and not ours

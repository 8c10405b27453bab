"""W3C trace context: which trace a request belongs to, as it travels in an HTTP header and in gRPC metadata.

traceparent: 00-<trace id, 32 hex>-<span id, 16 hex>-<flags, 2 hex>
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

HEADER = "traceparent"
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    trace_id: str
    span_id: str  # of the span that the next one stands under
    sampled: bool = True

    @classmethod
    def new(cls) -> TraceContext:
        """Of a trace that begins here."""
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @classmethod
    def parse(cls, header: str | None) -> TraceContext | None:
        """None for what is no traceparent: by the standard a trace then begins anew, and the request goes on."""
        found = _FORM.fullmatch(header.strip()) if header else None
        if found is None or found[1] == "ff" or not int(found[2], 16) or not int(found[3], 16) or (found[1] == "00" and found[5]):
            return None
        return cls(found[2], found[3], bool(int(found[4], 16) & 1))

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]] | None) -> TraceContext | None:
        """Of a gRPC call."""
        for key, value in metadata or ():
            if key == HEADER and isinstance(value, str):
                return cls.parse(value)
        return None

    @property
    def header(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For a gRPC call."""
        return ((HEADER, self.header),)

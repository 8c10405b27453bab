"""Parses server-sent events from bytes that may be cut anywhere."""

from __future__ import annotations

from ...protocol.errors import InvalidRequest

MAX_EVENT_BYTES = 2**24


class EventParser:
    """feed() takes bytes as they come and returns the data of the events that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Raises InvalidRequest for a line that does not end within 16 MiB."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise InvalidRequest(f"the server's event stream has a line of more than {MAX_EVENT_BYTES} bytes; is it an event stream?")
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line and self._lines:  # an event ends with an empty line
                events.append(b"\n".join(self._lines))
                self._lines.clear()
        return events

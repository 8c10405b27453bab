"""The proxy's own books of what it placed on a member, so that the next placement sees it before any report does.

place ─► + tokens     grow ─► + tokens (decode: a token was sent)     end ─► - tokens (prefill done, decode ended, given up)
   decode: begin ─► it runs in the batch
"""

from __future__ import annotations

from dataclasses import dataclass


class LoadBook:
    """Placed tokens of one member. Reports of the member refine the sum and never raise it above the books."""

    def __init__(self) -> None:
        self.num_tokens = 0  # placed and not ended
        self.num_requests = 0
        self.num_running_tokens = 0  # of those, begun
        self.num_running = 0
        self.version = 0  # changes with every entry and report
        self._num_reports = 0
        self._reported_tokens = 0
        # tokens placed since the last report and in the interval before it: the last report, on its way
        # while they were placed, may not know them
        self._unreported = [0, 0]

    def place(self, num_tokens: int) -> Booking:
        booking = Booking(self, 0, self._num_reports)
        self.num_requests += 1
        self._add(booking, num_tokens)
        return booking

    def report(self, num_outstanding_tokens: int) -> None:
        self.version += 1
        self._num_reports += 1
        self._reported_tokens = num_outstanding_tokens
        self._unreported = [0, self._unreported[0]]

    @property
    def num_left_tokens(self) -> int:
        """As the member counts down what it has done of the placed tokens; placed in full where it has not reported yet."""
        if self._num_reports == 0:
            return self.num_tokens
        return min(self.num_tokens, self._reported_tokens + sum(self._unreported))

    def _add(self, booking: Booking, num_tokens: int) -> None:
        self.version += 1
        booking.num_tokens += num_tokens
        self.num_tokens += num_tokens
        if booking.running:
            self.num_running_tokens += num_tokens
        age = self._num_reports - booking.report_number
        if age < len(self._unreported):
            self._unreported[age] += num_tokens


@dataclass(slots=True)
class Booking:
    book: LoadBook
    num_tokens: int
    report_number: int
    ended: bool = False
    running: bool = False

    def grow(self, num_tokens: int) -> None:
        if not self.ended:
            self.book._add(self, num_tokens)

    def begin(self) -> None:
        """Its tokens run in the member's batch from now on. Once; further calls change nothing."""
        if not (self.running or self.ended):
            self.running = True
            self.book.version += 1
            self.book.num_running += 1
            self.book.num_running_tokens += self.num_tokens

    def end(self) -> None:
        """Once; further calls change nothing."""
        if not self.ended:
            self.ended = True
            self.book._add(self, -self.num_tokens)
            self.book.num_requests -= 1
            self.book.num_running -= self.running

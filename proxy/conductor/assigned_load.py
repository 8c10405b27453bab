"""What the proxy has placed on a member. The next placement sees it before the member's own report shows it.

place ─► + tokens     grow ─► + tokens (decode: a token was sent)     end ─► - tokens (prefill done, decode ended, aborted)
   decode: begin ─► it runs in the batch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class AssignedLoad:
    """Placed tokens of one member. The member's reports refine the sum and never raise it above what was placed.

    on_change: runs after every change and report.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.num_tokens = 0  # placed and not ended
        self.num_requests = 0
        self.num_running_tokens = 0  # of requests whose decode has begun
        self.num_running = 0
        self.on_change = on_change
        self._num_reports = 0
        self._reported_tokens = 0
        # tokens placed since the last report, and in the interval before it: the last report may have been under way
        # already when they were placed, and not include them
        self._unreported = [0, 0]

    def place(self, num_tokens: int) -> Assignment:
        assignment = Assignment(self, 0, self._num_reports)
        self.num_requests += 1
        self.add(assignment, num_tokens)
        return assignment

    def report(self, num_outstanding_tokens: int) -> None:
        self._num_reports += 1
        self._reported_tokens = num_outstanding_tokens
        self._unreported = [0, self._unreported[0]]
        self.on_change()

    @property
    def num_left_tokens(self) -> int:
        """Placed tokens that are not done yet, by the member's own count. Before its first report: all placed tokens."""
        if self._num_reports == 0:
            return self.num_tokens
        return min(self.num_tokens, self._reported_tokens + sum(self._unreported))

    def add(self, assignment: Assignment, num_tokens: int) -> None:
        """For Assignment alone."""
        assignment.num_tokens += num_tokens
        self.num_tokens += num_tokens
        if assignment.running:
            self.num_running_tokens += num_tokens
        age = self._num_reports - assignment.report_number
        if age < len(self._unreported):
            self._unreported[age] += num_tokens
        self.on_change()


@dataclass(slots=True)
class Assignment:
    assigned: AssignedLoad
    num_tokens: int
    report_number: int
    ended: bool = False
    running: bool = False

    def grow(self, num_tokens: int) -> None:
        if not self.ended:
            self.assigned.add(self, num_tokens)

    def begin(self) -> None:
        """Its tokens run in the member's batch from now on. Further calls do nothing."""
        if not (self.running or self.ended):
            self.running = True
            self.assigned.num_running += 1
            self.assigned.num_running_tokens += self.num_tokens
            self.assigned.on_change()

    def end(self) -> None:
        """Further calls do nothing."""
        if not self.ended:
            self.ended = True
            self.assigned.num_requests -= 1
            self.assigned.num_running -= self.running
            self.assigned.add(self, -self.num_tokens)

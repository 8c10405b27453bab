"""One request as the client saw it, and its measures.

A *gap* is the time between two tokens. Tokens of one chunk come together: a chunk of k tokens is one gap before it and k - 1 gaps of
zero. Servers seldom say how many tokens are in which chunk, but usage gives their total. The set of gaps depends on the total alone:
the times between chunks, and a zero for every token beyond the number of chunks. Mean TPOT and tail are therefore exact if usage is
sent. Without it a chunk counts as one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Outcome = Literal["ok", "refused", "error", "timed_out", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "refused", "error", "timed_out", "cancelled")
TAIL_SHARE = 10  # the tail is the longest tenth


@dataclass(slots=True)
class Sample:
    """Times are seconds after the request was sent. due_s counts from the window's start, late_s from due_s."""

    index: int
    request_id: str
    endpoint: int
    due_s: float
    late_s: float
    num_input_tokens: int  # as planned
    num_output_tokens: int
    measured: bool = True
    outcome: Outcome = "error"
    error: str = ""
    status: int = 0
    retry_after_s: float | None = None
    arrivals_s: list[float] = field(default_factory=list[float])  # of chunks that brought tokens
    e2e_s: float = 0.0  # until the end of the stream, in whatever way
    finish_reason: str = ""
    prompt_tokens: int | None = None  # by the server's count, like the next two
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    phases: dict[str, Any] | None = None  # Halfmoon's own record

    @property
    def num_tokens(self) -> int:
        return self.completion_tokens if self.completion_tokens is not None else len(self.arrivals_s)

    @property
    def ttft_s(self) -> float | None:
        return self.arrivals_s[0] if self.arrivals_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None without a second token."""
        if self.num_tokens < 2 or not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """num_tokens - 1 gaps. The zeros of tokens that came together are last."""
        between = [later - earlier for earlier, later in pairwise(self.arrivals_s)]
        return between + [0.0] * (self.num_tokens - len(self.arrivals_s))

    @property
    def tail_itl_s(self) -> float | None:
        """Mean of the longest tenth of gaps, of at least one gap."""
        gaps = sorted(self.gaps_s)
        if not gaps:
            return None
        longest = gaps[-max(1, len(gaps) // TAIL_SHARE) :]
        return sum(longest) / len(longest)

    def as_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["arrivals_s"] = [round(value, 6) for value in self.arrivals_s]
        derived = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "tail_itl_s": self.tail_itl_s}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in (plain | derived).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sample:
        return cls(**{name: values[name] for name in cls.__slots__ if name in values})

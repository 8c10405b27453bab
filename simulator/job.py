"""One request on its way through the simulated cluster, and what is kept of it.

arrived ─► placed ─► prefill starts ─► prefill done ─► first token ─► last token        or rejected, where and why
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..engine.sequence import Sequence
from ..proxy.conductor.backlog import PrefillTask
from .node_cache import Run
from .trace import TraceRequest

Outcome = Literal["", "done", "rejected_at_arrival", "rejected_at_decode"]


@dataclass(slots=True, eq=False)
class Job:
    index: int
    request: TraceRequest
    keys: list[bytes]  # keys of its full blocks
    prefill_on: str = ""  # names of instances
    decode_on: str = ""
    left_on_ssd: frozenset[str] = frozenset()  # nodes whose SSD is not read for it
    fetch_from: str = ""  # node whose store holds more of the prefix
    prefill_sequence: Sequence | None = None
    run: Run | None = None  # pinned cache of the prefill node
    predicted_ttft_s: float = -1.0
    promised_ttft_s: float = -1.0
    exposed_s: float = 0.0
    predicted_prefill_s: float = 0.0
    handoff: tuple[float, str] = 0.0, ""  # predicted bytes that the prefill does not hide, and the kind of link; 0: it decodes there, too
    task: PrefillTask | None = None  # in the proxy's books, until its prefill is over
    prefill_cost_s: float = 0.0  # seconds of instance time that its chunks took
    attempt_cost_s: float = 0.0  # the part of it that the present attempt took
    num_expected_tokens: int = 0  # cached: as the proxy thought, then as the instance found
    num_cached_tokens: int = 0
    num_sent_tokens: int = 0  # output tokens sent before a failure
    prefill_start_s: float = -1.0
    prefill_done_s: float = -1.0
    kv_arrived_s: float = 0.0
    first_token_s: float = -1.0
    done_s: float = -1.0
    attempt: int = 1
    wasted_prefill_s: float = 0.0  # spent on attempts that failed, or before a rejection that came after the prefill
    outcome: Outcome = ""
    reason: str = ""
    token_runs: list[tuple[str, int, int]] = field(
        default_factory=list[tuple[str, int, int]]
    )  # steps of an instance, each of which gave it a token
    starts: list[float] = field(
        default_factory=list[float]
    )  # when decoding began, each time with a token from the prefill: once, and once more for each failure

    @property
    def num_output_tokens_sent(self) -> int:
        return len(self.starts) + sum(end - first for _, first, end in self.token_runs)

    @property
    def num_tokens(self) -> int:
        """To prefill: the prompt, and after a failure what was sent already."""
        return self.request.num_input_tokens + self.num_sent_tokens

"""How long recent steps took, and over what. A few of them go into each load report; the proxy learns to predict from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..engine.sequence import StepChunk
from ..engine.step_budget import work_of
from ..protocol.v1 import control_pb2

INTERVAL_S = 0.02  # between two samples: about ten for each report
NUM_KEPT = 16


class StepSamples:
    """note() runs on the engine's thread, take() on any."""

    def __init__(self) -> None:
        self._kept: deque[control_pb2.StepSample] = deque(maxlen=NUM_KEPT)
        self._last = float("-inf")

    def note(self, chunks: Sequence[StepChunk], began: float, ended: float) -> None:
        """began, ended: of time.monotonic()."""
        if not chunks or ended - self._last < INTERVAL_S:
            return
        self._last = ended
        work = work_of(chunks)
        self._kept.append(
            control_pb2.StepSample(
                num_sequences=work.num_decodes,
                num_kv_tokens=work.num_context_tokens,
                num_prefill_tokens=work.num_chunk_tokens,
                prefill_attention=work.attention,
                seconds=ended - began,
            )
        )

    def take(self) -> list[control_pb2.StepSample]:
        """The samples since the last call."""
        found: list[control_pb2.StepSample] = []
        while self._kept:
            found.append(self._kept.popleft())
        return found

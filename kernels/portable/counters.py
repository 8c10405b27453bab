"""Counters in device memory that kernels find zero and leave zero, so that no launch has to clear them."""

from __future__ import annotations

import torch

NUM_COUNTERS = 65536
_CAPTURED = -1
_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}


def zeroed_counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros, at least `count`, for the current stream: one buffer a stream, and one for all that CUDA graphs hold.

    Graphs that use it are therefore to be replayed one at a time on a device. A capture before any call outside of one takes memory of
    its graph's own pool. Raises ValueError for more than NUM_COUNTERS.
    """
    if count > NUM_COUNTERS:
        raise ValueError(f"{count} counters are wanted and {NUM_COUNTERS} are kept; split the batch")
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    stream = _CAPTURED if capturing else torch.cuda.current_stream(device).cuda_stream
    buffer = _buffers.get((device, stream))
    if buffer is None:
        buffer = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        if capturing:
            return buffer
        _buffers[device, stream] = buffer
        _buffers.setdefault((device, _CAPTURED), torch.zeros_like(buffer))
    return buffer

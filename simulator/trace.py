"""A trace of requests in Mooncake's format: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, …]}     one id a block of 512 tokens, chained
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..protocol.errors import ConfigError

BLOCK_SIZE = 512  # tokens a hash id stands for


class TraceRequest(NamedTuple):
    arrival_s: float
    num_input_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...]

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Only full blocks are shared; the trailing partial one has no key."""
        return self.block_ids[: self.num_input_tokens // BLOCK_SIZE]


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    sha256: str  # hash of the lines, decompressed
    requests: tuple[TraceRequest, ...]  # by arrival

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0


def read_trace(path: Path) -> Trace:
    """.jsonl or .jsonl.xz. Raises ConfigError for a missing file and for a line that is not a request, with its number."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"no trace at {path}; check --trace") from error
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ConfigError(f"{path} is not an xz file: {error}") from error
    requests = [_parse(line, number, path) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    if not requests:
        raise ConfigError(f"{path} holds no request")
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(path.name.split(".")[0], hashlib.sha256(data).hexdigest(), tuple(requests))


def _parse(line: bytes, number: int, path: Path) -> TraceRequest:
    try:
        row = json.loads(line)
        request = TraceRequest(row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}:{number} is not a request with timestamp, input_length, output_length and hash_ids: {error!r}"
        ) from error
    if request.num_input_tokens < 1 or request.num_output_tokens < 1 or len(request.block_ids) * BLOCK_SIZE < request.num_input_tokens:
        raise ConfigError(f"{path}:{number} has {request}; lengths must be at least 1, and every {BLOCK_SIZE} tokens need a hash id")
    return request


class Ceiling(NamedTuple):
    """What an infinite cache could give, blocks inserted right after their look-up."""

    blocks_ratio: float
    tokens_ratio: float


def ideal_hits(requests: Iterable[TraceRequest]) -> Ceiling:
    """Counts as the trace's authors do: every hash id is a block, the partial one included; at most all of a prompt's tokens."""
    seen: set[int] = set()
    num_blocks = num_hit_blocks = num_tokens = num_hit_tokens = 0
    for request in requests:
        run = 0
        for block in request.block_ids:
            if block not in seen:
                break
            run += 1
        seen.update(request.block_ids)
        num_blocks += len(request.block_ids)
        num_hit_blocks += run
        num_tokens += request.num_input_tokens
        num_hit_tokens += min(run * BLOCK_SIZE, request.num_input_tokens)
    return Ceiling(num_hit_blocks / num_blocks if num_blocks else 0.0, num_hit_tokens / num_tokens if num_tokens else 0.0)

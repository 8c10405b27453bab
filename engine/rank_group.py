"""What the ranks of a tensor-parallel group do together: sums and gathers on the device, NCCL on CUDA and gloo on CPU.

rank 0  worker's process ─┐
rank 1  own process      ─┼─ all_reduce after o and down, and of the embedding; gather of the head's logits
  …                       ┘
Every rank makes the same calls in the same order. All are of one machine: nothing of it listens anywhere but on loopback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import FileStore, Store

from .shard import Shard

LOOPBACK = "127.0.0.1"


class Meeting(NamedTuple):
    """Where the ranks of a group find each other: a file that does not exist yet, in a folder of this user."""

    shard: Shard
    file: Path


class RankGroup:
    """For one thread. On CUDA the calls are given to the current stream, and a graph may hold them."""

    def __init__(self, meeting: Meeting, device: torch.device) -> None:
        """Waits for all ranks."""
        self.shard = shard = meeting.shard
        store = FileStore(str(meeting.file), shard.size)
        self._group: Any = (_gloo if device.type == "cpu" else _nccl)(store, shard, device)
        self.total(0, device)  # every rank is there

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        self._group.allreduce([tensor]).wait()
        return tensor

    def gather_columns(self, part: torch.Tensor) -> torch.Tensor:
        """part: [rows, columns / ranks] of each rank; [rows, columns] on every rank."""
        parts = part.new_empty((self.shard.size, *part.shape))
        self._group._allgather_base(parts.view(-1), part.reshape(-1)).wait()
        return parts.transpose(0, 1).reshape(len(part), self.shard.size * part.shape[1])

    def least(self, number: int, device: torch.device) -> int:
        """Of the ranks' numbers."""
        return min(self._numbers(number, device))

    def total(self, number: int, device: torch.device) -> int:
        return sum(self._numbers(number, device))

    def _numbers(self, number: int, device: torch.device) -> list[int]:
        return self.gather_columns(torch.tensor([[number]], dtype=torch.int64, device=device))[0].tolist()


def _gloo(store: Store, shard: Shard, device: torch.device) -> Any:
    from torch.distributed import ProcessGroupGloo

    options = getattr(ProcessGroupGloo, "_Options")()  # noqa: B009  # not in torch's stubs
    options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    return ProcessGroupGloo(store, shard.rank, shard.size, options)


def _nccl(store: Store, shard: Shard, device: torch.device) -> Any:
    from torch.distributed import ProcessGroupNCCL

    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # NCCL reads it, and by itself would listen on the outward interface
    torch.cuda.set_device(device)
    return ProcessGroupNCCL(store, shard.rank, shard.size, ProcessGroupNCCL.Options())

"""What the kernels ask of the device they run on. Asked once: the answers do not change, and asking costs microseconds."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448


@lru_cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still ends (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def early_launch(device: torch.device) -> dict[str, bool]:
    """Launch options and the kernel's EARLY. Such a kernel calls gdc_wait() before it touches what others write, and
    gdc_launch_dependents() as soon as it runs: the next one is then resident, its weights on their way, when this one ends.
    """
    return {"EARLY": True, "launch_pdl": True} if starts_early(device) else {"EARLY": False}

"""What a cluster that has started holds, in words: how long a request may be, and what keeps it from being longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc.aio

from ..client import Control
from ..protocol.channel import open_channel
from ..protocol.grpc_errors import from_rpc_error
from ..protocol.roles import ROLE_NAMES, decodes, prefills
from ..protocol.v1 import control_pb2, control_pb2_grpc
from .checks.finding import Finding, ok
from .checks.machine import arena_too_small

CALL_TIMEOUT_S = 10.0


async def read_status(control: Control) -> control_pb2.StatusReply:
    """The whole status; the SDK's own leaves out schemas and capacities. Raises a HalfmoonError."""
    try:
        async with open_channel(control.address, control.credentials) as channel:
            return await control_pb2_grpc.ControlStub(channel).Status(control_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, f"the proxy's control at {control.address}") from error


def served_len(members: Sequence[control_pb2.StatusReply.Member]) -> int:
    """Tokens of prompt and answer together that every worker takes; 0 without one."""
    return min((member.info.max_model_len for member in members if member.info.max_model_len), default=0)


def describe_capacity(members: Sequence[control_pb2.StatusReply.Member], wanted_len: int) -> list[Finding]:
    """Findings about length, pages and arenas. wanted_len: what the model and the configuration allow; 0 where nobody knows."""
    workers = [member for member in members if _role(member) != "store" and member.info.max_model_len]
    stores = [member for member in members if _role(member) == "store" and member.info.kv_capacity_tokens]
    length = served_len(members)
    found = [_length(workers, length, wanted_len)] if workers else []
    hands_off = any(_ever(prefills, one) and _ever(decodes, two) for one in workers for two in workers if one is not two)
    return found + [_arena(store, length, hands_off) for store in stores if length]


def _length(workers: Sequence[control_pb2.StatusReply.Member], length: int, wanted_len: int) -> Finding:
    shortest = min(workers, key=lambda worker: worker.info.max_model_len).info
    if length >= wanted_len:
        return ok("length", f"prompt and answer up to {length} tokens; a worker's pages hold {shortest.kv_capacity_tokens}")
    what = (
        f"requests are capped at {length} tokens and not {wanted_len}: the pages of {shortest.id} hold {shortest.kv_capacity_tokens} tokens"
    )
    section = "prefill" if shortest.role == control_pb2.ROLE_PREFILL else "decode"
    return Finding("length", "warning", what, f"raise {section}.kv_capacity_tokens, or set model.max_model_len to what you need")


def _arena(store: control_pb2.StatusReply.Member, length: int, hands_off: bool) -> Finding:
    num_tokens = store.info.kv_capacity_tokens
    if hands_off and num_tokens < length:
        return Finding("arena", "fault", f"{store.info.id}: {arena_too_small(num_tokens, length)}", "raise store.arena_bytes")
    return ok("arena", f"{store.info.id} holds {num_tokens} tokens of KV, {num_tokens / length:.1f} prompts of {length}")


def _ever(does: Callable[[str], bool], member: control_pb2.StatusReply.Member) -> bool:
    """In the role that it has, or in the one that it began with: roles may flow."""
    return does(_role(member)) or does(ROLE_NAMES.get(member.info.role, "unknown"))


def _role(member: control_pb2.StatusReply.Member) -> str:
    return ROLE_NAMES.get(member.role or member.info.role, "unknown")

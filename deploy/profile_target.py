"""The cluster to profile: its members, what it reports of itself, and whether it can be measured."""

from __future__ import annotations

from dataclasses import dataclass

import grpc.aio

from ..client import AsyncClient, Control
from ..protocol.channel import open_channel
from ..protocol.credentials import Credentials
from ..protocol.errors import ConfigError, Overloaded
from ..protocol.grpc_errors import from_rpc_error
from ..protocol.roles import ROLE_NAMES
from ..protocol.schema import KVSchema
from ..protocol.v1 import control_pb2, kvstore_pb2, kvstore_pb2_grpc
from .capacity import read_status
from .profile_fit import Facts

CALL_TIMEOUT_S = 5.0
MIN_BLOCKS = 4  # in a model's context, so that prefixes can be told from none


@dataclass(frozen=True, slots=True)
class Target:
    facts: Facts
    vocab_size: int
    max_model_len: int
    block_size: int
    num_prefill: int
    num_decode: int
    node_of: dict[str, str]  # worker -> machine


async def look(client: AsyncClient, control: Control) -> Target:
    """Finds the members and checks that they can be measured. Raises as profile()."""
    models = await client.models()  # first, because the SDK tries again for a while; the calls below do not
    status = await read_status(control)
    if status.num_queued or status.num_running:
        raise Overloaded(
            f"{status.num_queued} requests wait and {status.num_running} run at {client.address}; profile a cluster that is idle"
        )
    infos = {role: [member.info for member in status.members if member.role == role] for role in ROLE_NAMES}
    prefill, decode, stores = infos[control_pb2.ROLE_PREFILL], infos[control_pb2.ROLE_DECODE], infos[control_pb2.ROLE_STORE]
    if not (prefill and decode and stores):
        raise ConfigError(
            f"{client.address} has {len(prefill)} prefill workers, {len(decode)} decode workers and {len(stores)} stores; a profile needs "
            "one of each, for hand-offs are measured too (workers of both roles do not tell what was which; where the "
            "policy changes roles, set proxy.rebalance_s to 0)"
        )
    schema = KVSchema.from_proto(decode[0].schema)
    max_model_len = min(info.max_model_len for info in (*prefill, *decode))
    if max_model_len < MIN_BLOCKS * schema.block_size:
        raise ConfigError(
            f"the model takes {max_model_len} tokens, which is less than {MIN_BLOCKS} blocks of {schema.block_size}: too short to measure "
            "prefixes; serve it with a smaller model.block_size or a larger model.max_model_len"
        )
    nodes = [info.node_id for info in (*prefill, *decode)]
    kv_bytes = schema.block_bytes // schema.block_size
    facts = Facts(
        name=f"{status.model} on {decode[0].device or 'cpu'}",
        kv_bytes_per_token=kv_bytes,
        num_layers=schema.num_layers,
        kv_capacity_tokens=min(info.kv_capacity_tokens for info in decode),
        cache_tokens=min([await _arena_bytes(info.address, control.credentials) for info in stores]) // kv_bytes,
        shares_cores=decode[0].device.startswith("cpu") and len(set(nodes)) < len(nodes),
    )
    node_of = {info.id: info.node_id for info in (*prefill, *decode)}
    return Target(facts, models[0].vocab_size, max_model_len, schema.block_size, len(prefill), len(decode), node_of)


async def _arena_bytes(address: str, credentials: Credentials) -> int:
    try:
        async with open_channel(address, credentials) as channel:
            stats = await kvstore_pb2_grpc.KVStoreStub(channel).Stats(kvstore_pb2.StatsRequest(), timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, f"the KV store at {address}; run the profile on a machine of the cluster") from error
    return stats.num_bytes_arena

"""A process on the machine of a cluster, with its addresses and none of its credentials. Prints what each attempt got, as JSON.

python attacker.py '{"grpc": …, "control": …, "workers": […], "stores": […], "schema": HEX of a KVSchema}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from halfmoon.protocol.v1 import (
    common_pb2,
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

TIMEOUT_S = 60.0
GUESSES = (
    (),
    (("halfmoon-token", ""),),
    (("halfmoon-token", "guessed-guessed-guessed-guessed-guessed"),),
    (("authorization", "Bearer x"),),
)
Attempts = Iterator[tuple[str, Callable[..., Any]]]


def at_control(channel: grpc.Channel, schema: common_pb2.KVSchema) -> Attempts:
    stub: Any = control_pb2_grpc.ControlStub(channel)
    info = control_pb2.MemberInfo(
        id="prefill-0", incarnation="mine", role=control_pb2.ROLE_PREFILL, address="127.0.0.1:1", store_address="127.0.0.1:1", schema=schema
    )
    yield "join in a worker's place", lambda **how: next(stub.Join(iter([control_pb2.MemberReport(info=info)]), **how))
    yield "drain the cluster", lambda **how: stub.Drain(control_pb2.DrainRequest(timeout_s=0), **how)
    yield "read the status", lambda **how: stub.Status(control_pb2.StatusRequest(), **how)
    yield "read of another's request", lambda **how: stub.Explain(control_pb2.ExplainRequest(request_id="victim"), **how)


def at_store(channel: grpc.Channel, schema: common_pb2.KVSchema) -> Attempts:
    stub: Any = kvstore_pb2_grpc.KVStoreStub(channel)
    key = b"k" * 16
    handoff = common_pb2.HandoffId(id="victim", epoch=1)
    hello = kvstore_pb2.AttachRequest(hello=kvstore_pb2.AttachRequest.Hello(client_id="evil", node_id="", schema=schema))
    prefix = kvstore_pb2.BlockKeys(keys=[key])
    cache = kvstore_pb2.ReserveRequest.PURPOSE_CACHE
    replicate = kvstore_pb2.ReplicateRequest(block_keys=[key], source_address="127.0.0.1:1", deadline_s=5)
    abort = kvstore_pb2.AbortRequest(handoff=handoff, reason=common_pb2.Error(code="internal_error", message="x"))
    yield "attach to a store", lambda **how: next(stub.Attach(iter([hello]), **how))
    yield "watch what is cached", lambda **how: next(stub.Watch(kvstore_pb2.WatchRequest(), **how))
    yield "look for a prefix", lambda **how: stub.Lookup(kvstore_pb2.LookupRequest(block_keys=[key]), **how)
    yield "read KV", lambda **how: next(stub.Fetch(kvstore_pb2.FetchRequest(session_id="s", prefix=prefix), **how))
    yield "write KV", lambda **how: stub.Reserve(kvstore_pb2.ReserveRequest(session_id="s", purpose=cache, block_keys=[key]), **how)
    yield "push KV", lambda **how: stub.Push(iter([kvstore_pb2.PushRequest(lease_id="l")]), **how)
    yield "seal KV", lambda **how: stub.Seal(kvstore_pb2.SealRequest(lease_id="l"), **how)
    yield "drop KV", lambda **how: stub.Release(kvstore_pb2.ReleaseRequest(lease_id="l", corrupt_blocks=[0]), **how)
    yield "abort a hand-off", lambda **how: stub.Abort(abort, **how)
    yield "replicate from outside", lambda **how: next(stub.Replicate(replicate, **how))
    yield "have an SSD read", lambda **how: stub.Promote(kvstore_pb2.PromoteRequest(block_keys=[key]), **how)
    yield "read a store's figures", lambda **how: stub.Stats(kvstore_pb2.StatsRequest(), **how)


def at_worker(channel: grpc.Channel) -> Attempts:
    prefill: Any = worker_pb2_grpc.PrefillWorkerStub(channel)
    decode: Any = worker_pb2_grpc.DecodeWorkerStub(channel)
    spec = common_pb2.SequenceSpec(request_id="mine", token_ids=[5], num_prompt_tokens=1)
    local = worker_pb2.DecodeRequest(sequence=spec, local_prefill=True)
    yield "prefill past the proxy", lambda **how: prefill.Prefill(worker_pb2.PrefillRequest(sequence=spec), **how)
    yield "decode past the proxy", lambda **how: next(decode.Decode(local, **how))
    yield "read all tokens", lambda **how: next(decode.Tokens(worker_pb2.TokensRequest(feed_id="f"), **how))
    yield "stop another's request", lambda **how: decode.Stop(worker_pb2.StopRequest(request_id="victim"), **how)


def at_clients_port(channel: grpc.Channel) -> Attempts:
    control: Any = control_pb2_grpc.ControlStub(channel)
    inference: Any = inference_pb2_grpc.InferenceStub(channel)
    yield "drain at the clients' port", lambda **how: control.Drain(control_pb2.DrainRequest(timeout_s=0), **how)
    yield "join at the clients' port", lambda **how: next(control.Join(iter([control_pb2.MemberReport()]), **how))

    def cancel(**how: Any) -> str:
        return "FOUND" if inference.Cancel(inference_pb2.CancelRequest(request_id="victim"), **how).found else "NOT_FOUND"

    yield "cancel another's request", cancel


def outcome(attempt: Callable[..., Any], metadata: Any) -> str:
    try:
        reply = attempt(timeout=TIMEOUT_S, metadata=metadata)
        return reply if isinstance(reply, str) else "DONE"
    except grpc.RpcError as error:
        return error.code().name  # type: ignore[attr-defined]


def main() -> None:
    target = json.loads(sys.argv[1])
    schema = common_pb2.KVSchema.FromString(bytes.fromhex(target["schema"]))
    ports: list[tuple[str, Callable[[grpc.Channel], Attempts]]] = [
        (target["control"], lambda channel: at_control(channel, schema)),
        *((address, lambda channel: at_store(channel, schema)) for address in target["stores"]),
        *((address, at_worker) for address in target["workers"]),
        (target["grpc"], at_clients_port),
    ]
    found: dict[str, list[str]] = {}
    for address, attempts in ports:
        with grpc.insecure_channel(address) as channel:
            for name, attempt in attempts(channel):
                found.setdefault(name, []).extend({outcome(attempt, metadata) for metadata in GUESSES})
    print(json.dumps({name: sorted(set(outcomes)) for name, outcomes in found.items()}))


if __name__ == "__main__":
    main()

"""A process on the machine of a cluster, with its addresses and none of its credentials. Prints what each attempt got, as JSON.

python attacker.py '{"grpc": …, "http": …, "control": …, "workers": […], "stores": […], "data": […], "schema": HEX of a KVSchema}'

authority: PEM, where the cluster has TLS; it is no secret. asks_for_keys: clients need one, so that nobody without one times a prefix.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from halfmoon.kvstore.data_wire import HELLO, MAGIC, REPLY, TOKEN_BYTES, Status
from halfmoon.protocol.tls import MEMBER_NAME
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


def time_a_prefix(channel: grpc.Channel) -> Attempts:
    """Whoever may ask, may time: the same prompt twice, and what it costs the second time."""
    stub: Any = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GenerateRequest(prompt="a prompt of somebody else", max_tokens=1)
    yield "time a prefix", lambda **how: next(stub.Generate(request, **how))


def time_a_prefix_by_http(address: str, authority: str) -> str:
    scheme, context = ("https", ssl.create_default_context(cadata=authority)) if authority else ("http", None)
    body = json.dumps({"prompt": "a prompt of somebody else", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{scheme}://{address}/v1/completions", body, {"content-type": "application/json"})
    try:
        return str(urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context).status)
    except urllib.error.HTTPError as error:
        return str(error.code)


def data_connection(address: str, authority: str) -> str:
    """To read and write a store's slots: begins with the token of a session."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), TIMEOUT_S) as plain:
            connection = plain
            if authority:
                connection = ssl.create_default_context(cadata=authority).wrap_socket(plain, server_hostname=MEMBER_NAME)
            connection.sendall(HELLO.pack(MAGIC, bytes(TOKEN_BYTES)))
            reply = connection.recv(REPLY.size)
    except (ssl.SSLError, ConnectionError):
        return "CLOSED"
    return Status(reply[0]).name if reply else "CLOSED"


def opened(address: str, authority: str, name: str) -> grpc.Channel:
    """name: in the server's certificate; "": the address's."""
    if not authority:
        return grpc.insecure_channel(address)
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.encode()), options)


def outcome(attempt: Callable[..., Any], metadata: Any) -> str:
    try:
        reply = attempt(timeout=TIMEOUT_S, metadata=metadata)
        return reply if isinstance(reply, str) else "DONE"
    except grpc.RpcError as error:
        return error.code().name  # type: ignore[attr-defined]


def main() -> None:
    target = json.loads(sys.argv[1])
    schema = common_pb2.KVSchema.FromString(bytes.fromhex(target["schema"]))
    authority, asks_for_keys = target.get("authority", ""), target.get("asks_for_keys", False)
    ports: list[tuple[str, str, Callable[[grpc.Channel], Attempts]]] = [
        (target["control"], MEMBER_NAME, lambda channel: at_control(channel, schema)),
        *((address, MEMBER_NAME, lambda channel: at_store(channel, schema)) for address in target["stores"]),
        *((address, MEMBER_NAME, at_worker) for address in target["workers"]),
        (target["grpc"], "", at_clients_port),
        *([(target["grpc"], "", time_a_prefix)] if asks_for_keys else []),
    ]
    found: dict[str, list[str]] = {}
    for address, name, attempts in ports:
        with opened(address, authority, name) as channel:
            for what, attempt in attempts(channel):
                found.setdefault(what, []).extend({outcome(attempt, metadata) for metadata in GUESSES})
    found["move KV by a data connection"] = [data_connection(address, authority) for address in target["data"]]
    if asks_for_keys:
        found["time a prefix by HTTP"] = [time_a_prefix_by_http(target["http"], authority)]
    print(json.dumps({name: sorted(set(outcomes)) for name, outcomes in found.items()}))


if __name__ == "__main__":
    main()

"""The processes around the measured proxy: scripted workers and a store, HTTP and gRPC clients. Each obeys the other end of a pipe.

parent ── ("go", 64, 0.1) ──► workers: 64 tokens to every open call, a step each 0.1 s ── "done" ──► parent
parent ── ("open", kind, 32, …) ──► clients ── "started", all have their first token ── "over", all have the last ──► parent
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvicorn

from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.config import ModelOptions, ProxyConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.membership import stay_joined
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import (
    common_pb2,
    control_pb2,
    inference_pb2,
    inference_pb2_grpc,
    kvstore_pb2,
    kvstore_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from halfmoon.proxy.server import ProxyServer

SCHEMA = KVSchema(model_fingerprint="front", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=64)
LAST_TEXT = "\u00a7"  # what every answer ends with, and nothing else holds
HEARTBEAT_S = 0.001


def run(work: Coroutine[Any, Any, None], loop: str) -> None:
    """loop: asyncio or uvloop."""
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    else:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)


async def command(pipe: Connection) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, pipe.recv)


# the proxy


def proxy_process(pipe: Connection, loop: str, folder: str) -> None:
    run(_proxy(pipe, folder), loop)


async def _proxy(pipe: Connection, folder: str) -> None:
    """Obeys cpu (-> seconds of this process), watch and watched (-> longest gaps of the event loop between them), end."""
    config = ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0, policy="least_loaded")
    server = ProxyServer(config=config, options=ModelOptions(), model_folder=Path(folder), schema=SCHEMA)
    endpoints = await server.start()
    server.warm_up()
    pipe.send((*endpoints, server.credentials))
    watch: asyncio.Task[tuple[float, float]] | None = None
    over = asyncio.Event()
    while (what := await command(pipe)) != "end":
        if what == "cpu":
            pipe.send(time.process_time())
        elif what == "watch":
            over.clear()
            watch = asyncio.create_task(_longest_gaps_s(over))
            pipe.send("watching")
        else:
            over.set()
            assert watch is not None
            pipe.send(await watch)
    await server.stop(0.0)


async def _longest_gaps_s(over: asyncio.Event) -> tuple[float, float]:
    """By the clock, and in CPU time of this process: its other threads may hold the interpreter, too."""
    longest_s = longest_cpu_s = 0.0
    last, last_cpu = time.perf_counter(), time.process_time()
    while not over.is_set():
        await asyncio.sleep(HEARTBEAT_S)
        now, now_cpu = time.perf_counter(), time.process_time()
        longest_s, last = max(longest_s, now - last - HEARTBEAT_S), now
        longest_cpu_s, last_cpu = max(longest_cpu_s, now_cpu - last_cpu), now_cpu
    return longest_s, longest_cpu_s


# the floor: what the two servers cost by themselves


def bare_process(pipe: Connection, loop: str) -> None:
    run(_bare(pipe), loop)


async def _bare(pipe: Connection) -> None:
    """Streams of ready-made messages with nothing behind them: cpu, ("go", …) and finish as the proxy and the workers have them."""
    steps = BareSteps()
    server, port = create_server("127.0.0.1", 0)
    handler = grpc.unary_stream_rpc_method_handler(
        steps.serve_grpc, inference_pb2.GenerateRequest.FromString, inference_pb2.GenerateReply.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("halfmoon.v1.Inference", {"Generate": handler}),))
    await server.start()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        steps.serve_http, interface="asgi3", http="httptools", ws="none", lifespan="off", log_config=None, access_log=False
    )
    http = uvicorn.Server(config)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    pipe.send((f"127.0.0.1:{listener.getsockname()[1]}", f"127.0.0.1:{port}"))
    while (what := await command(pipe)) != "end":
        if what == "cpu":
            pipe.send(time.process_time())
        elif what == "finish":
            steps.give("")
        else:
            _, num_tokens, period_s = what
            for index in range(num_tokens):
                steps.give(" word" if index < num_tokens - 1 else LAST_TEXT)
                await asyncio.sleep(period_s)
            pipe.send("done")
    http.should_exit = True
    await serving
    await server.stop(0)


class BareSteps:
    """give(text): to every open stream, as messages of the size that the proxy's have; "" ends them."""

    def __init__(self) -> None:
        self._queues: dict[asyncio.Queue[str], None] = {}

    def give(self, text: str) -> None:
        for queue in self._queues:
            queue.put_nowait(text)

    async def _texts(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._queues[queue] = None
        yield " first"
        while text := await queue.get():
            yield text
        del self._queues[queue]

    async def serve_grpc(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        token = common_pb2.TokenOutput(token_id=9)
        async for text in self._texts():
            await context.write(inference_pb2.GenerateReply(delta=inference_pb2.GenerateReply.Delta(text=text, tokens=[token])))

    async def serve_http(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        pad = "x" * 200
        async for text in self._texts():
            body = f'data: {{"{pad}":"{text}"}}\n\n'.encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


# the workers


def workers_process(
    pipe: Connection, loop: str, control_address: str, credentials: Credentials, token_ids: list[int], last_token_ids: list[int]
) -> None:
    run(_workers(pipe, control_address, credentials, token_ids, last_token_ids), loop)


async def _workers(
    pipe: Connection, control_address: str, credentials: Credentials, token_ids: list[int], last_token_ids: list[int]
) -> None:
    peers = Peers(token_ids)
    members = await peers.start(control_address, credentials)
    pipe.send("joined")
    while (what := await command(pipe)) != "end":
        if what == "finish":
            peers.finish()
        else:
            _, num_tokens, period_s = what
            await peers.decode(num_tokens - len(last_token_ids), period_s, last_token_ids)
            pipe.send("done")
    for member in members:
        member.cancel()
    await asyncio.gather(*members, return_exceptions=True)
    await peers.server.stop(None)


class Peers(worker_pb2_grpc.PrefillWorkerServicer, worker_pb2_grpc.DecodeWorkerServicer, kvstore_pb2_grpc.KVStoreServicer):
    """A prefill worker, a decode worker and a store in one server. A call whose request names no feed gets its tokens one by one."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._feeds: dict[str, asyncio.Queue[Any]] = {}
        self._calls: dict[tuple[str, int], None] = {}  # those whose tokens go into a feed
        self._queues: dict[asyncio.Queue[int], None] = {}  # of the other ones
        self._finished = asyncio.Event()
        self._num_sent = 1

    async def start(self, control_address: str, credentials: Credentials) -> list[asyncio.Task[None]]:
        self.server, port = create_server("127.0.0.1", 0, credentials=credentials)
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, self.server)
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, self.server)
        kvstore_pb2_grpc.add_KVStoreServicer_to_server(self, self.server)
        await self.server.start()
        address = f"127.0.0.1:{port}"
        joined: list[asyncio.Event] = []
        members: list[asyncio.Task[None]] = []
        for name, role in (("store", control_pb2.ROLE_STORE), ("prefill", control_pb2.ROLE_PREFILL), ("decode", control_pb2.ROLE_DECODE)):
            info = control_pb2.MemberInfo(
                id=f"{name}-0",
                incarnation=uuid.uuid4().hex,
                role=role,
                address=address,
                node_id="node-0",
                store_id="store-0",
                store_address=address,
                max_model_len=2**21 if name != "store" else 0,
                kv_capacity_tokens=2**24,
                schema=SCHEMA.to_proto() if name != "store" else None,
                pid=os.getpid(),
            )
            joined.append(asyncio.Event())
            joining = stay_joined(control_address, info, control_pb2.MemberLoad, joined[-1].set, credentials=credentials)
            members.append(asyncio.create_task(joining))
        await asyncio.gather(*(event.wait() for event in joined))
        return members

    async def decode(self, num_tokens: int, period_s: float, last_token_ids: list[int]) -> None:
        """A step gives each call one token. The last ones end the answer's text."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for index in range(num_tokens + len(last_token_ids)):
            token_id = last_token_ids[index - num_tokens] if index >= num_tokens else self._token_ids[index % len(self._token_ids)]
            for queue in self._queues:
                queue.put_nowait(token_id)
            for feed_id, feed in self._feeds.items():
                calls = [call for name, call in self._calls if name == feed_id]
                if calls:
                    feed.put_nowait(worker_pb2.StepTokens(calls=calls, token_ids=[token_id] * len(calls)))
            due += period_s
            await asyncio.sleep(max(due - loop.time(), 0.0))
        self._num_sent = 1 + num_tokens + len(last_token_ids)

    def finish(self) -> None:
        self._finished.set()
        self._finished = asyncio.Event()
        self._num_sent = 1

    async def Tokens(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        feed = self._feeds[request.feed_id] = asyncio.Queue()
        await context.write(worker_pb2.StepTokens())
        while True:
            await context.write(await feed.get())

    async def Prefill(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> worker_pb2.PrefillReply:
        return worker_pb2.PrefillReply(state=self._state(request.sequence))

    async def Decode(self, request: worker_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        finished = self._finished
        call: int = getattr(request, "call", 0)
        await context.write(worker_pb2.DecodeReply(admitted=worker_pb2.DecodeReply.Admitted(state=self._state(request.sequence))))
        if request.sequence.sampling.max_tokens > 1:
            if call:
                self._calls[request.feed_id, call] = None
                await finished.wait()
                del self._calls[request.feed_id, call]
            else:
                await self._write_tokens(context, finished)
        elif not call:
            await self._write(context, self._token_ids[0])
        end = worker_pb2.DecodeReply.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
        if call:
            end.num_tokens = self._num_sent if request.sequence.sampling.max_tokens > 1 else 1
        await context.write(worker_pb2.DecodeReply(finished=end))

    async def _write_tokens(self, context: Any, finished: asyncio.Event) -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()
        self._queues[queue] = None
        queue.put_nowait(self._token_ids[0])
        end = asyncio.create_task(finished.wait())
        while not end.done():
            token = asyncio.ensure_future(queue.get())
            await asyncio.wait((end, token), return_when=asyncio.FIRST_COMPLETED)
            if not token.done():
                token.cancel()
                break
            await self._write(context, token.result())
        del self._queues[queue]

    async def _write(self, context: Any, token_id: int) -> None:
        tokens = worker_pb2.DecodeReply.Tokens(tokens=[common_pb2.TokenOutput(token_id=token_id)])
        await context.write(worker_pb2.DecodeReply(tokens=tokens))

    async def Watch(self, request: kvstore_pb2.WatchRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(kvstore_pb2.WatchReply(snapshot=True))
        await asyncio.Event().wait()

    async def Abort(self, request: kvstore_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> kvstore_pb2.AbortReply:
        return kvstore_pb2.AbortReply(found=True)

    def _state(self, sequence: common_pb2.SequenceSpec) -> common_pb2.HandoffState:
        first = common_pb2.TokenOutput(token_id=self._token_ids[0])
        phases = common_pb2.PrefillPhases(prefill_s=0.01, transport="shm")
        return common_pb2.HandoffState(num_tokens=len(sequence.token_ids), first_token=first, phases=phases)


# the clients


def clients_process(pipe: Connection, loop: str, http_address: str, grpc_address: str) -> None:
    run(_clients(pipe, http_address, grpc_address), loop)


async def _clients(pipe: Connection, http_address: str, grpc_address: str) -> None:
    clients = Clients(pipe, http_address, grpc_address)
    while (what := await command(pipe)) != "end":
        await clients.open(*what[1:])
        pipe.send(clients.num_messages)


class Clients:
    def __init__(self, pipe: Connection, http_address: str, grpc_address: str) -> None:
        self._pipe = pipe
        self._http_address = http_address
        self._grpc_address = grpc_address

    async def open(self, face: str, num_streams: int, max_tokens: int) -> None:
        """Until every answer has ended. face: http (a connection for each stream) or grpc (a channel for all)."""
        self.num_messages = 0
        self._waiting = {"started": num_streams, "over": num_streams}
        if face == "http":
            await asyncio.gather(*(self._http(max_tokens) for _ in range(num_streams)))
        else:
            async with open_channel(self._grpc_address) as channel:
                await asyncio.gather(*(self._grpc(channel, max_tokens) for _ in range(num_streams)))

    def _reached(self, what: str) -> None:
        self._waiting[what] -= 1
        if self._waiting[what] == 0:
            self._pipe.send(what)

    async def _http(self, max_tokens: int) -> None:
        host, port = self._http_address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"prompt": [5] * 8, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        started = over = False
        end = b"data: [DONE]"
        tail = b""
        while end not in tail:
            part = await reader.read(2**16)
            assert part, tail
            tail = tail[-20:] + part
            self.num_messages += part.count(b"data: {")
            if not started and b"data: {" in tail:
                started = True
                self._reached("started")
            if not over and LAST_TEXT.encode() in tail:
                over = True
                self._reached("over")
        writer.close()

    async def _grpc(self, channel: grpc.aio.Channel, max_tokens: int) -> None:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        tokens = inference_pb2.TokenIds(token_ids=[5] * 8)
        started = False
        async for reply in stub.Generate(inference_pb2.GenerateRequest(tokens=tokens, max_tokens=max_tokens, ignore_eos=True)):
            if reply.HasField("delta"):
                self.num_messages += 1
                if not started:
                    started = True
                    self._reached("started")
                if LAST_TEXT in reply.delta.text:
                    self._reached("over")

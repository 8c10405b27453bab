"""Test peers of the router: real gRPC servers on loopback that speak Control, PrefillWorker, DecodeWorker and KVStore.

Their behaviour is a script of the test; the hand-off between them is a future on the shared board. Tokens are a function of
the prompt and the output index alone, so that a replay which lost or repeated one shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import types
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from halfmoon.protocol.channel import create_server
from halfmoon.protocol.config import ProxyConfig
from halfmoon.protocol.errors import HalfmoonError, HandoffAborted
from halfmoon.protocol.grpc_errors import error_from_proto, stream_boundary, unary_boundary
from halfmoon.protocol.membership import stay_joined
from halfmoon.protocol.roles import ROLE_NAMES, ROLE_NUMBERS
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.timing.step_limits import StepLimits
from halfmoon.protocol.v1 import common_pb2, control_pb2, control_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from halfmoon.proxy.control_service import ControlService
from halfmoon.proxy.members.cluster import Cluster
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.request import Finished, ProxyRequest, Tokens
from halfmoon.proxy.requests.router import Router
from halfmoon.proxy.requests.token_stream import TokenStream
from halfmoon.tests.feeds import Feeds
from halfmoon.tests.loop_gap import LoopTurns, counted_turns

EOS = 2
SCHEMA = KVSchema(model_fingerprint="test", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
incarnations = itertools.count(1)


def token_at(prompt: Sequence[int], index: int) -> int:
    """Output token number `index` of a prompt; never an EOS."""
    return (sum(prompt) * 31 + index * index * 7 + index) % 1000 + 10


async def nothing(*_: Any) -> None:
    return None


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


class Board:
    """Hand-offs by (id, epoch), as the stores of a real cluster hold them."""

    def __init__(self) -> None:
        self.handoffs: dict[tuple[str, int], asyncio.Future[common_pb2.HandoffState]] = defaultdict(
            lambda: asyncio.get_running_loop().create_future()
        )

    def at(self, handoff: common_pb2.HandoffId) -> asyncio.Future[common_pb2.HandoffState]:
        return self.handoffs[handoff.id, handoff.epoch]


class Peer:
    """One process of the cluster: a gRPC server and a Join stream, which die together or one by one."""

    def __init__(self, role: str, number: int, board: Board, store: StorePeer | None = None) -> None:
        self.role, self.id, self.board, self.store = role, f"{role}-{number}", board, store
        self.schema, self.load = SCHEMA, control_pb2.MemberLoad()
        self.requests: list[Any] = []
        self.arrived = asyncio.Event()  # a request has come
        self.cancelled = asyncio.Event()  # a call was cancelled under its handler
        self.joined = asyncio.Event()
        self.max_model_len, self.kv_capacity_tokens, self.port = 512, 0, 0  # 0: not known
        self.roles: list[control_pb2.Role] = []  # that it can take on
        self.step_limits: StepLimits | None = None  # None: it does not say
        self.taken: list[str] = []
        self.refusal: HalfmoonError | None = None  # of every order
        self.broken: asyncio.Future[control_pb2.Broken] = asyncio.get_running_loop().create_future()

    async def start(self, proxy_address: str) -> None:
        self.server, port = create_server("127.0.0.1", self.port)
        self.register(self.server)
        await self.server.start()
        self.address = f"127.0.0.1:{port}"
        self.port = port if self.role == "store" else 0  # a store comes back on the same one, where its node's workers look for it
        store = self.store or self
        info = control_pb2.MemberInfo(
            id=self.id,
            incarnation=f"{self.id}.{next(incarnations)}",
            role=ROLE_NUMBERS[self.role],
            roles=self.roles,
            address=self.address,
            node_id="node",
            store_id=store.id,
            store_address=store.address,
            max_model_len=self.max_model_len,
            kv_capacity_tokens=self.kv_capacity_tokens,
            schema=self.schema.to_proto() if self.role != "store" else None,
            step_limits=control_pb2.StepLimits(**self.step_limits._asdict()) if self.step_limits else None,
        )
        self.info = info
        joining = stay_joined(proxy_address, info, lambda: self.load, self.joined.set, self._take_role, self.broken)
        self.member = asyncio.create_task(joining)

    def register(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    def _take_role(self, role: control_pb2.Role) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.taken.append(ROLE_NAMES[role])

    def breaks(self, *request_ids: str) -> None:
        """It says that it broke, and what it computed then, and leaves; its calls hang."""
        self.broken.set_result(control_pb2.Broken(reason="the context is gone", request_ids=request_ids))

    async def leave(self) -> None:
        """The Join stream ends; the gRPC server lives on."""
        self.member.cancel()
        await asyncio.gather(self.member, return_exceptions=True)

    async def kill(self) -> None:
        await self.leave()
        await self.server.stop(None)

    @contextlib.contextmanager
    def _noting_cancel(self) -> Iterator[None]:
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    def _arrive(self, request: Any) -> None:
        self.requests.append(request)
        self.arrived.set()


class PrefillPeer(Peer, worker_pb2_grpc.PrefillWorkerServicer):
    phases = common_pb2.PrefillPhases(queue_s=0.25, prefix_load_s=0.5, prefill_s=0.75, push_s=0.125, num_bytes_pushed=1000, transport="shm")
    num_cached_tokens = 4
    before_seal: Callable[[worker_pb2.PrefillRequest], Awaitable[None]] = staticmethod(nothing)
    before_scored: Callable[[int], Awaitable[None]] = staticmethod(nothing)  # with the index of the prompt's token; it is sealed
    before_reply: Callable[[], Awaitable[None]] = staticmethod(nothing)  # the hand-off is sealed

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, server)

    @unary_boundary
    async def Prefill(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> worker_pb2.PrefillReply:
        self._arrive(request)
        with self._noting_cancel():
            return await self._prefill(request)

    @unary_boundary
    async def PrefillWithLogprobs(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        self._arrive(request)
        with self._noting_cancel():
            reply = await self._prefill(request)
            for index in range(1, request.sequence.num_prompt_tokens):
                await self.before_scored(index)
                part = common_pb2.PromptLogprobs(start=index, logprobs=[-float(index)], ranks=[1])
                await context.write(worker_pb2.PrefillReply(prompt_logprobs=part))
            await context.write(reply)

    async def _prefill(self, request: worker_pb2.PrefillRequest) -> worker_pb2.PrefillReply:
        await self.before_seal(request)
        num_tokens = len(request.sequence.token_ids)
        state = common_pb2.HandoffState(num_tokens=num_tokens, num_cached_tokens=self.num_cached_tokens, phases=self.phases)
        handoff = self.board.at(request.handoff)
        if not handoff.done():
            handoff.set_result(state)
        await self.before_reply()
        return worker_pb2.PrefillReply(state=state)


class DecodePeer(Peer, worker_pb2_grpc.DecodeWorkerServicer):
    before_token: Callable[[int], Awaitable[None]] = staticmethod(nothing)  # with the token's output index
    before_finished: Callable[[], Awaitable[None]] = staticmethod(nothing)
    before_admission: Callable[[], Awaitable[None]] = staticmethod(nothing)  # of a prompt that it computes itself

    def __init__(self, role: str, number: int, board: Board, store: StorePeer | None = None) -> None:
        super().__init__(role, number, board, store)
        self.stops: dict[str, asyncio.Event] = {}
        self.feeds = Feeds()
        self.finished = asyncio.Event()  # a call has said so
        self.tokens_first = False  # all of them, before the admission

    def register(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, server)

    @stream_boundary
    async def Decode(self, request: worker_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[worker_pb2.DecodeReply]:
        self._arrive(request)
        with self._noting_cancel():
            async for reply in self._decode(request):
                yield reply

    async def _decode(self, request: worker_pb2.DecodeRequest) -> AsyncIterator[worker_pb2.DecodeReply]:
        sequence = request.sequence
        stop = self.stops[sequence.request_id] = asyncio.Event()
        if request.local_prefill:
            await self.before_admission()
            phases = common_pb2.PrefillPhases(queue_s=0.25, prefix_load_s=0.5, prefill_s=0.75, transport="local")
            state = common_pb2.HandoffState(num_tokens=len(sequence.token_ids), num_cached_tokens=8, phases=phases)
        else:
            # shielded: the board's future is shared, a cancelled call must not cancel it
            state = await asyncio.shield(self.board.at(request.handoff))
        prompt = list(sequence.token_ids[: sequence.num_prompt_tokens])
        first = len(sequence.token_ids) - len(prompt)
        await self.before_token(first)
        state.first_token.token_id = token_at(prompt, first)
        admitted = worker_pb2.DecodeReply(admitted=worker_pb2.DecodeReply.Admitted(state=state))
        if not self.tokens_first:
            yield admitted
        reason, num_tokens = common_pb2.FINISH_REASON_LENGTH, 1
        for index in range(first + 1, sequence.sampling.max_tokens):
            await self.before_token(index)
            if stop.is_set():
                reason = common_pb2.FINISH_REASON_STOP
                break
            num_tokens += 1
            self.feeds.give(request, common_pb2.TokenOutput(token_id=token_at(prompt, index)))
        if self.tokens_first:
            await asyncio.sleep(0.1)  # so that they are there before it
            yield admitted
        await self.before_finished()
        phases = common_pb2.DecodePhases(first_decode_s=0.0625, decode_s=0.03125, num_preemptions=1)
        yield worker_pb2.DecodeReply(finished=worker_pb2.DecodeReply.Finished(reason=reason, phases=phases, num_tokens=num_tokens))
        self.finished.set()

    @unary_boundary
    async def Tokens(self, request: worker_pb2.TokensRequest, context: grpc.aio.ServicerContext) -> None:
        await self.feeds.serve(request, context)

    @unary_boundary
    async def Stop(self, request: worker_pb2.StopRequest, context: grpc.aio.ServicerContext) -> worker_pb2.StopReply:
        stop = self.stops.get(request.request_id)
        if stop is not None:
            stop.set()
        return worker_pb2.StopReply(found=stop is not None)


class BothPeer(PrefillPeer, DecodePeer):
    """A worker of both halves, as every real one is."""

    def __init__(self, role: str, number: int, board: Board, store: StorePeer | None = None) -> None:
        super().__init__(role, number, board, store)
        self.roles = [ROLE_NUMBERS[name] for name in ("prefill", "decode", "both")]

    def register(self, server: grpc.aio.Server) -> None:
        PrefillPeer.register(self, server)
        DecodePeer.register(self, server)


class UnreadPeer(Peer):
    """A worker that takes its requests as bytes, and gives every one the single token 9. What reading a long prompt costs stays out."""

    before_answer: Callable[[], Awaitable[Any]] = staticmethod(nothing)

    def register(self, server: grpc.aio.Server) -> None:
        handlers = {
            "PrefillWorker": {"Prefill": grpc.unary_unary_rpc_method_handler(self._prefill)},
            "DecodeWorker": {
                "Decode": grpc.unary_stream_rpc_method_handler(self._decode),
                "Tokens": grpc.unary_stream_rpc_method_handler(self._tokens),
            },
        }
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(f"halfmoon.v1.{service}", found) for service, found in handlers.items()]
        )

    async def _prefill(self, request: bytes, context: Any) -> bytes:
        self._arrive(request)
        return worker_pb2.PrefillReply().SerializeToString()

    async def _decode(self, request: bytes, context: Any) -> None:
        self._arrive(request)
        await self.before_answer()
        state = common_pb2.HandoffState(first_token=common_pb2.TokenOutput(token_id=9))
        admitted = worker_pb2.DecodeReply.Admitted(state=state)
        await context.write(worker_pb2.DecodeReply(admitted=admitted).SerializeToString())
        finished = worker_pb2.DecodeReply.Finished(reason=common_pb2.FINISH_REASON_LENGTH, num_tokens=1)
        await context.write(worker_pb2.DecodeReply(finished=finished).SerializeToString())

    async def _tokens(self, request: bytes, context: Any) -> None:
        await context.write(worker_pb2.StepTokens().SerializeToString())
        await asyncio.Event().wait()


class StorePeer(Peer, kvstore_pb2_grpc.KVStoreServicer):
    """An in-memory source of Watch, and the hand-offs' abort."""

    def __init__(self, role: str, number: int, board: Board, store: StorePeer | None = None) -> None:
        super().__init__(role, number, board, store)
        self.aborts: list[tuple[common_pb2.HandoffId, HalfmoonError]] = []
        self.aborted = asyncio.Event()
        self.held: list[bytes] = []
        self.sequence = 0
        self.watchers: list[asyncio.Queue[kvstore_pb2.WatchReply | None]] = []
        self.num_watches = 0

    def register(self, server: grpc.aio.Server) -> None:
        kvstore_pb2_grpc.add_KVStoreServicer_to_server(self, server)

    def publish(self, stored: list[bytes] = (), evicted: list[bytes] = (), skip: int = 0) -> None:
        """skip: changes that get lost before this one."""
        self.held = [*(key for key in self.held if key not in evicted), *stored]
        self.sequence += 1 + skip
        for watcher in self.watchers:
            watcher.put_nowait(kvstore_pb2.WatchReply(sequence=self.sequence, stored=stored, evicted=evicted))

    @stream_boundary
    async def Watch(self, request: kvstore_pb2.WatchRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[kvstore_pb2.WatchReply]:
        self.num_watches += 1
        changes: asyncio.Queue[kvstore_pb2.WatchReply | None] = asyncio.Queue()
        self.watchers.append(changes)
        yield kvstore_pb2.WatchReply(sequence=self.sequence, snapshot=True, stored=self.held)
        while (change := await changes.get()) is not None:
            yield change

    @unary_boundary
    async def Abort(self, request: kvstore_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> kvstore_pb2.AbortReply:
        reason = error_from_proto(request.reason)
        self.aborts.append((request.handoff, reason))
        self.aborted.set()
        handoff = self.board.at(request.handoff)
        if not handoff.done():
            handoff.set_exception(HandoffAborted(f"aborted: {reason.message}"))
            handoff.exception()  # nobody may be waiting
        return kvstore_pb2.AbortReply(found=True)


class Bench:
    """A proxy core with its Control listener, and peers that joined it."""

    def __init__(self, config: ProxyConfig, eos_token_ids: frozenset[int]) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ProxyMetrics(self.registry)
        self.cluster = Cluster(self.metrics)
        self.router = Router(config, self.cluster, self.metrics, eos_token_ids=eos_token_ids)
        self.board = Board()
        self.peers: list[Peer] = []
        self.stores: list[StorePeer] = []
        self.prefills: list[PrefillPeer] = []
        self.decodes: list[DecodePeer] = []
        self.boths: list[BothPeer] = []
        self.unread: list[UnreadPeer] = []
        self._ids = itertools.count(1)

    async def start(self) -> None:
        self.server, port = create_server("127.0.0.1", 0)
        control_pb2_grpc.add_ControlServicer_to_server(ControlService(self.router, "test-model"), self.server)
        await self.server.start()
        self.address = f"127.0.0.1:{port}"

    async def add(
        self,
        role: str,
        store: StorePeer | None = None,
        *,
        schema: KVSchema = SCHEMA,
        unread: bool = False,
        step_limits: StepLimits | None = None,
    ) -> Any:
        """unread: a worker that takes its requests as bytes."""
        kinds = {
            "prefill": (PrefillPeer, self.prefills),
            "decode": (DecodePeer, self.decodes),
            "both": (BothPeer, self.boths),
            "store": (StorePeer, self.stores),
        }
        kind, known = (UnreadPeer, self.unread) if unread else kinds[role]
        peer = kind(role, len(known), self.board, store)
        known.append(peer)
        peer.schema, peer.step_limits = schema, step_limits
        await self.join(peer)
        return peer

    async def join(self, peer: Peer) -> None:
        self.peers.append(peer)
        peer.joined.clear()
        await peer.start(self.address)
        await asyncio.wait_for(peer.joined.wait(), 60)

    async def stop(self) -> None:
        await self.router.close()
        for peer in self.peers:
            await peer.kill()
        await self.cluster.close()
        await self.server.stop(None)

    def request(
        self,
        prompt: list[int] | None = None,
        *,
        max_tokens: int = 6,
        timeout_s: float = 600.0,
        priority: int = 0,
        slo: tuple[float | None, float | None] = (None, None),
        **sampling: Any,
    ) -> ProxyRequest:
        params = SamplingParams(max_tokens=max_tokens, seed=7, **sampling)
        token_ids = prompt or list(range(20, 30))
        return ProxyRequest(f"request-{next(self._ids)}", token_ids, params, timeout_s, priority, ttft_slo_s=slo[0], tpot_slo_s=slo[1])

    def sample(self, name: str, **labels: str) -> float:
        """Over all series that have these labels, whatever others they have."""
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    def assert_at_rest(self) -> None:
        """No request under way, no token assigned to any member."""
        assert (self.router.num_queued, self.router.num_running) == (0, 0)
        for assigned in (lambda member: member.context, lambda member: member.backlog.assigned):
            assert {member.id: assigned(member).num_tokens for member in self.cluster.members.values() if assigned(member).num_tokens} == {}


async def read(stream: TokenStream) -> tuple[list[int], Finished]:
    """Every token id, and Finished."""
    token_ids: list[int] = []
    finished: list[Finished] = []
    async for event in stream:
        assert not finished, "something came behind Finished"
        if isinstance(event, Tokens):
            token_ids += event.token_ids
        else:
            finished.append(event)
    return token_ids, finished[0]


async def take(stream: TokenStream, num_tokens: int) -> list[int]:
    """The next tokens, in whatever events they come."""
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        event = await anext(stream)
        assert isinstance(event, Tokens)
        token_ids += event.token_ids
    assert len(token_ids) == num_tokens, "more came than there should be"
    return token_ids


def answer(request: ProxyRequest) -> list[int]:
    """The tokens that a request must get, whatever happens to its workers."""
    return [token_at(request.token_ids, index) for index in range(request.sampling.max_tokens)]


MakeBench = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def make_bench() -> AsyncIterator[MakeBench]:
    """make_bench(num_prefill, num_decode, num_both, policy=..., **proxy config) -> Bench, with one store for all its workers."""
    benches: list[Bench] = []

    async def make(
        num_prefill: int = 1,
        num_decode: int = 1,
        num_both: int = 0,
        eos_token_ids: frozenset[int] = frozenset({EOS}),
        step_limits: StepLimits | None = None,
        **config: Any,
    ) -> Bench:
        bench = Bench(ProxyConfig(**{"policy": "least_loaded", **config}), eos_token_ids)
        benches.append(bench)
        await bench.start()
        store = await bench.add("store")
        for role, num_workers in (("prefill", num_prefill), ("decode", num_decode), ("both", num_both)):
            for _ in range(num_workers):
                await bench.add(role, store, step_limits=step_limits)
        return bench

    yield make
    for bench in benches:
        await bench.stop()


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    """One prefill worker, one decode worker, one store."""
    return await make_bench()


@pytest.fixture
def loop_turns() -> Callable[[], contextlib.AbstractAsyncContextManager[LoopTurns]]:
    return counted_turns


@pytest.fixture
def peers() -> Any:
    """The helpers above, for tests (importlib mode has no module to import them from)."""
    return types.SimpleNamespace(read=read, take=take, answer=answer, forever=forever, token_at=token_at, EOS=EOS, SCHEMA=SCHEMA)

"""A store, a prefill and a decode worker in this process on loopback, and transformers to compare with."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaConfig, LlamaForCausalLM

from halfmoon.deploy.worker import make_worker
from halfmoon.engine.worker_life import WorkerAddress
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.config import DecodeConfig, ModelOptions, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.errors import HalfmoonError, RequestCancelled
from halfmoon.protocol.grpc_errors import from_rpc_error
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2, control_pb2, control_pb2_grpc, worker_pb2, worker_pb2_grpc
from halfmoon.proxy.control_service import ControlService
from halfmoon.proxy.members.cluster import Cluster as ProxyCluster
from halfmoon.proxy.metrics import ProxyMetrics
from halfmoon.proxy.requests.router import Router

BLOCK_SIZE = 8
VOCAB_SIZE = 160
MAX_MODEL_LEN = 256
EOS = 2
ARENA_BYTES = 4 * 2**20


@pytest.fixture(scope="session", autouse=True)
def _calibrated_once(calibrated_once: None) -> None:
    """For every worker of these tests."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A tiny random Llama in fp32, as a folder and as transformers' model."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=EOS,
        dtype="float32",
    )
    reference = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    reference.save_pretrained(folder)
    return folder, reference


@pytest.fixture(scope="session")
def greedy(model: tuple[Path, LlamaForCausalLM]) -> Callable[[list[int], int], list[int]]:
    """transformers' greedy continuation, past any end-of-sequence token. What was computed once is kept."""
    kept: dict[tuple[int, ...], list[int]] = {}

    def generate(token_ids: list[int], num_tokens: int) -> list[int]:
        with torch.inference_mode():
            prompt = torch.tensor([token_ids])
            found: Any = model[1].generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=VOCAB_SIZE,  # never drawn
                pad_token_id=0,
            )
        return found[0, len(token_ids) :].tolist()

    def greedy(token_ids: list[int], num_tokens: int) -> list[int]:
        prompt = tuple(token_ids)
        if len(kept.get(prompt, [])) < num_tokens:
            kept[prompt] = generate(token_ids, num_tokens)
        return kept[prompt][:num_tokens]

    return greedy


@dataclass
class Answer:
    """What one request gave."""

    token_ids: list[int] = field(default_factory=list)
    tokens: list[common_pb2.TokenOutput] = field(default_factory=list)
    num_messages: int = 0
    admitted: worker_pb2.DecodeReply.Admitted | None = None
    finished: worker_pb2.DecodeReply.Finished | None = None
    state: common_pb2.HandoffState | None = None  # as prefill replied it


class Members(control_pb2_grpc.ControlServicer):
    """The proxy's end of Join: knows who is joined and the last load of each."""

    def __init__(self) -> None:
        self.address = ""
        self.infos: dict[str, control_pb2.MemberInfo] = {}
        self.loads: dict[str, control_pb2.MemberLoad] = {}
        self.broken: dict[str, control_pb2.Broken] = {}

    async def Join(self, request_iterator: Any, context: Any) -> AsyncIterator[control_pb2.MemberOrder]:
        name = ""
        try:
            async for report in request_iterator:
                if report.HasField("info"):
                    name = report.info.id
                    self.infos[name] = report.info
                    yield control_pb2.MemberOrder(accepted=True)
                if report.HasField("broken"):
                    self.broken[name] = report.broken
                self.loads[name] = report.load
        finally:
            self.infos.pop(name, None)


class Cluster:
    """One store, one prefill and one decode worker, or some of both roles. Plays the proxy: speaks to the workers by gRPC alone."""

    def __init__(self, folder: Path, transport: str, members: Members, views: Any) -> None:
        self.views = views
        self.options = ModelOptions(path=str(folder), device="cpu", block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
        self.transport: Any = transport
        self.members = members
        self.num_requests = 0
        self._exits = contextlib.AsyncExitStack()
        self._configs: dict[str, Any] = {}  # make_worker's

    async def start(
        self,
        *,
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        arena_bytes: int = ARENA_BYTES,
        port: int = 0,
        flip_pushed_bytes: bool = False,
        both: int = 0,
        store: dict[str, Any] | None = None,
        **options: Any,
    ) -> Cluster:
        """both: so many workers of both roles in the place of the two. Prompts go to the first one, answers come from the last.
        store: more of its configuration. options: of the model, instead of these tests' own."""
        self.store = await started_store("node-a", port=port, arena_bytes=arena_bytes, **(store or {}))
        configs = self._configs = {
            "options": dataclasses.replace(self.options, **options),
            "prefill": PrefillConfig(transport=self.transport, **{"max_tokens_per_step": 64, **(prefill or {})}),
            "decode": DecodeConfig(transport=self.transport, **(decode or {})),
        }
        names: Any = [(f"both-{number}", "both") for number in range(both)] or [("prefill-0", "prefill"), ("decode-0", "decode")]
        self.workers = [make_worker(self.worker_address(name), role=role, **configs) for name, role in names]
        for worker in self.workers:
            await worker.start()
        self.prefill = self.views.WorkerView(self.workers[0], self.workers[0].prefill)
        self.decode = self.views.WorkerView(self.workers[-1], self.workers[-1].decode)
        if flip_pushed_bytes:
            self.views.flip_pushed_bytes(self.workers[0].stores.own.client)
        self._channels = {worker: await self._channel(worker.address) for worker in self.workers}
        self.prefill_stub, self.decode_stub = self.stub_pair(self.workers[0], self.workers[-1])
        return self

    async def add_decode(self) -> None:
        """Answers come from another decode worker from now on, decode-1."""
        worker = await self.add("decode-1", "decode")
        self.decode = self.views.WorkerView(worker, worker.decode)
        self.prefill_stub, self.decode_stub = self.stub_pair(self.workers[0], worker)

    async def add(self, worker_id: str, role: Any, **decode: Any) -> Any:
        """One more worker. decode: of its configuration, where it is another than the others'."""
        configs = {**self._configs, "decode": dataclasses.replace(self._configs["decode"], **decode)}
        worker = make_worker(self.worker_address(worker_id), role=role, **configs)
        await worker.start()
        self.workers.append(worker)
        self._channels[worker] = await self._channel(worker.address)
        return worker

    def stub_pair(self, prefill: Any, decode: Any) -> tuple[Any, Any]:
        """Which worker computes prompts, and which one answers."""
        return worker_pb2_grpc.PrefillWorkerStub(self._channels[prefill]), worker_pb2_grpc.DecodeWorkerStub(self._channels[decode])

    async def stop(self) -> None:
        await self._exits.aclose()
        await asyncio.gather(*(worker.stop(0.0) for worker in self.workers), self.store.stop(0.0))

    def worker_address(self, worker_id: str) -> WorkerAddress:
        return WorkerAddress(
            worker_id=worker_id,
            node_id="node-a",
            host="127.0.0.1",
            store_address=self.store.address,
            proxy_address=self.members.address,
        )

    async def _channel(self, address: str) -> Any:
        return await self._exits.enter_async_context(open_channel(address))

    def sequence(
        self,
        token_ids: list[int],
        *,
        num_prompt_tokens: int = 0,
        deadline_s: float = 600.0,
        suspect: bool = False,
        tpot_slo_s: float = 0.0,
        root: bytes = b"",
        **sampling: Any,
    ) -> Any:
        self.num_requests += 1
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
        return common_pb2.SequenceSpec(
            request_id=f"r{self.num_requests}",
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            sampling=params.to_proto(),
            deadline_s=deadline_s,
            suspect=suspect,
            tpot_slo_s=tpot_slo_s,
            root=root,
        )

    def start_prefill(self, sequence: Any, *, epoch: int = 1, store_address: str = "") -> Any:
        request = worker_pb2.PrefillRequest(
            sequence=sequence,
            handoff=common_pb2.HandoffId(id=sequence.request_id, epoch=epoch),
            store_address=store_address or self.store.address,
        )
        return self.prefill_stub.Prefill(request)

    async def new_store(self) -> None:
        """In the place of the one that has died."""
        host, port = self.store.address.split(":")
        self.store = await started_store("node-a", host, int(port))

    async def error_of(self, call: Any) -> HalfmoonError:
        """What a call fails with, as a client of Halfmoon sees it."""
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    pass
            else:
                await call
        return from_rpc_error(failure.value, "worker")

    def start_decode(self, sequence: Any, *, epoch: int = 1, local: bool = False, **fields: Any) -> Any:
        """fields: more of the request's."""
        handoff = common_pb2.HandoffId(id=sequence.request_id, epoch=epoch)
        return self.decode_stub.Decode(worker_pb2.DecodeRequest(sequence=sequence, handoff=handoff, local_prefill=local, **fields))

    def answer(self) -> Answer:
        return Answer()

    async def read(self, call: Any, answer: Answer) -> Answer:
        async for reply in call:
            event = reply.WhichOneof("event")
            if event == "admitted":
                answer.admitted = reply.admitted
            elif event == "tokens":
                answer.num_messages += 1
                answer.tokens += reply.tokens.tokens
                answer.token_ids += [token.token_id for token in reply.tokens.tokens]
            else:
                answer.finished = reply.finished
        return answer

    async def run(self, token_ids: list[int], **sampling: Any) -> Answer:
        """Both legs of a request, as the proxy would start them."""
        sequence = self.sequence(token_ids, **sampling)
        decode = self.start_decode(sequence)
        prefill = self.start_prefill(sequence)
        answer = Answer(state=(await prefill).state)
        return await self.read(decode, answer)

    async def run_local(self, token_ids: list[int], **sampling: Any) -> Answer:
        """The one leg of a request whose prompt the decode worker computes."""
        return await self.read(self.start_decode(self.sequence(token_ids, **sampling), local=True), Answer())

    async def any_mix(
        self, rng: random.Random, texts: list[list[int]], max_tokens: int, num_rounds: int, num_at_once: int, is_right: Callable[..., bool]
    ) -> None:
        """Beginnings of the texts, of any length, as prompts: computed by the one who answers or handed off, every third one's client gone
        in the middle. is_right: of a prompt and its answer."""
        for _ in range(num_rounds):
            await asyncio.gather(*(self._run_or_leave(rng, texts, max_tokens, rng.randrange(1000), is_right) for _ in range(num_at_once)))

    async def _run_or_leave(
        self, rng: random.Random, texts: list[list[int]], max_tokens: int, index: int, is_right: Callable[..., bool]
    ) -> None:
        tokens = rng.choice(texts)[: rng.randrange(1, len(texts[0]))]
        local, num_tokens = index % 2 == 0, rng.randrange(1, max_tokens)
        if index % 3:
            run = self.run_local if local else self.run
            assert is_right(tokens, (await run(tokens, max_tokens=num_tokens)).token_ids, num_tokens)
            return
        sequence = self.sequence(tokens, max_tokens=60)
        calls = [self.start_decode(sequence, local=local), *([] if local else [self.start_prefill(sequence)])]
        for call in rng.sample(calls, len(calls)):
            await asyncio.sleep(rng.random() * 0.05)
            call.cancel()
        await self.decode.worker.stores.own.client.abort(sequence.request_id, 1, RequestCancelled("the client went away"))

    async def every_page_is_free(self) -> None:
        await self.at_rest()
        for worker in self.workers:
            allocator = worker.allocator
            assert not allocator._num_users and len(allocator._idle) == allocator.num_cached
            assert len(allocator._free) + len(allocator._idle) == allocator.num_pages

    async def at_rest(self) -> None:
        """Until no worker holds a sequence or is in a step, and the store holds no lease; fails after 60 s, naming what is left."""
        deadline = time.monotonic() + 60.0
        while held := self.held():
            assert time.monotonic() < deadline, f"still held: {held}"
            await asyncio.sleep(0.01)

    def held(self) -> dict[str, Any]:
        stats, found = self.store.stats(), {}
        for worker in self.workers:
            halves = (worker.prefill.scheduler.at_rest, worker.decode.scheduler.at_rest)
            if not all(halves) or worker.allocator.num_free != worker.allocator.num_pages:
                found[worker.worker_id] = worker.allocator.num_pages - worker.allocator.num_free
            if worker.steps.front.oldest is not None:
                found[f"{worker.worker_id}'s step"] = worker.steps.front.oldest
        if stats.num_leases or stats.num_handoffs or stats.num_bytes_leased:
            found["store"] = (stats.num_leases, stats.num_handoffs, stats.num_bytes_leased)
        assert stats.num_bytes_arena == stats.num_bytes_leased + stats.num_bytes_cached + stats.num_bytes_free
        return found


async def started_store(node_id: str, host: str = "127.0.0.1", port: int = 0, arena_bytes: int = ARENA_BYTES, **config: Any) -> StoreServer:
    store = StoreServer(StoreConfig(arena_bytes=arena_bytes, **config), node_id=node_id)
    await store.start(host, port)
    return store


@pytest.fixture
async def elsewhere() -> AsyncIterator[StoreServer]:
    """Another node's store."""
    store = await started_store("node-b")
    yield store
    await store.stop(0.0)


@pytest.fixture
async def members() -> AsyncIterator[Members]:
    found = Members()
    server, port = create_server("127.0.0.1", 0)
    control_pb2_grpc.add_ControlServicer_to_server(found, server)
    await server.start()
    found.address = f"127.0.0.1:{port}"
    yield found
    await server.stop(0.0)


@dataclass
class Proxy:
    cluster: ProxyCluster
    router: Router

    def know_store(self, store: StoreServer) -> None:
        info = control_pb2.MemberInfo(
            id=store.store_id, incarnation="first", role=control_pb2.ROLE_STORE, node_id="node-a", store_id=store.store_id
        )
        info.address = info.store_address = store.address
        self.cluster.join(info, control_pb2.MemberLoad(), control_pb2.ROLE_STORE)


@contextlib.asynccontextmanager
async def running_proxy(members: Members, **config: Any) -> AsyncIterator[Proxy]:
    metrics = ProxyMetrics(CollectorRegistry())
    cluster = ProxyCluster(metrics)
    # the store that know_store joins sends no reports
    router = Router(ProxyConfig(avoid_after_s=600.0, leave_after_s=600.0, **config), cluster, metrics, eos_token_ids=frozenset())
    server, port = create_server("127.0.0.1", 0)
    control_pb2_grpc.add_ControlServicer_to_server(ControlService(router, "tiny"), server)
    await server.start()
    members.address = f"127.0.0.1:{port}"
    yield Proxy(cluster, router)
    await router.close()
    await cluster.close()
    await server.stop(0.0)


@pytest.fixture
async def proxy(members: Members) -> AsyncIterator[Proxy]:
    """The real end of Join, and the router behind it, in the place of the fake one."""
    async with running_proxy(members) as proxy:
        yield proxy


@pytest.fixture
async def make_proxy(members: Members) -> AsyncIterator[Callable[..., Any]]:
    """make_proxy(**proxy config) -> the same, with another configuration. To be made before the cluster."""
    async with contextlib.AsyncExitStack() as exits:

        async def make(**config: Any) -> Proxy:
            return await exits.enter_async_context(running_proxy(members, **config))

        yield make


@pytest.fixture
async def make_cluster(model: tuple[Path, LlamaForCausalLM], members: Members, worker_views: Any) -> AsyncIterator[Callable[..., Any]]:
    """make_cluster(transport="auto", folder=the model's, **Cluster.start's) -> a running Cluster, stopped after the test."""
    async with contextlib.AsyncExitStack() as exits:

        async def make(transport: str = "auto", folder: Path | None = None, **settings: Any) -> Cluster:
            cluster = await Cluster(folder or model[0], transport, members, worker_views).start(**settings)
            exits.push_async_callback(cluster.stop)
            return cluster

        yield make

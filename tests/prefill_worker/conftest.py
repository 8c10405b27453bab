"""Stores and prefill workers in this process on loopback; the tests play proxy and decode worker."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfmoon.deploy.worker import make_worker
from halfmoon.engine.engine import Engine
from halfmoon.engine.sequence import Sequence, StepChunk
from halfmoon.engine.worker_life import WorkerAddress
from halfmoon.kvstore.client import StoreClient
from halfmoon.kvstore.server import StoreServer
from halfmoon.protocol.blocks import block_keys, root_key
from halfmoon.protocol.channel import create_server, open_channel
from halfmoon.protocol.config import DecodeConfig, ModelOptions, PrefillConfig, StoreConfig
from halfmoon.protocol.sampling import SamplingParams
from halfmoon.protocol.v1 import common_pb2, control_pb2, control_pb2_grpc, worker_pb2, worker_pb2_grpc

BLOCK_SIZE = 8


@pytest.fixture(scope="session", autouse=True)
def _calibrated_once(calibrated_once: None) -> None:
    """For every worker of these tests."""


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """A tiny random Llama in fp32."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
        dtype="float32",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelOptions(path=str(folder), device="cpu", block_size=BLOCK_SIZE)


class Reference(NamedTuple):
    """A prompt in one forward pass: its KV as fp32 [layer, block, numbers of a block's layer], and its greedy token."""

    kv: np.ndarray
    token_id: int


class Handoff(NamedTuple):
    state: common_pb2.HandoffState
    kv: np.ndarray  # as Reference.kv


class Site:
    """One store and one prefill worker beside it."""

    def __init__(self, store: StoreServer, worker: Any, stub: Any) -> None:
        self.store = store
        self.worker = worker
        self.stub = stub

    def start(self, token_ids: list[int], name: str, *, into: Site | None = None, **fields: Any) -> Any:
        """A Prefill call. into: whose store the hand-off goes to. fields: of the SequenceSpec or the request."""
        hint = fields.pop("prefix", None)
        spec: dict[str, Any] = {"num_prompt_tokens": len(token_ids), "deadline_s": 600.0, **fields}
        sequence = common_pb2.SequenceSpec(
            request_id=name, token_ids=token_ids, sampling=SamplingParams(temperature=0.0).to_proto(), **spec
        )
        return self.stub.Prefill(
            worker_pb2.PrefillRequest(
                sequence=sequence,
                handoff=common_pb2.HandoffId(id=name, epoch=1),
                store_address=(into or self).store.address,
                prefix=hint,
            )
        )

    def keys(self, token_ids: list[int]) -> list[bytes]:
        return block_keys(root_key(self.worker.engine.schema.fingerprint), token_ids, BLOCK_SIZE)

    async def client(self, name: str = "decode-x") -> StoreClient:
        return await StoreClient.attach(self.store.address, client_id=name, node_id="node-t", schema=self.worker.engine.schema)

    async def fetch(self, name: str, *, wait_s: float = 60.0) -> Handoff:
        """Reads a hand-off as a decode worker would, and ends it."""
        schema, client = self.worker.engine.schema, await self.client()
        try:
            reader = await client.fetch(name, 1, wait_s)
            kv = np.zeros((schema.num_layers, reader.num_blocks, schema.layer_bytes), dtype=np.uint8)
            async for layer, first_block, blocks, num_layers in reader.slices():
                rows = np.stack(list(blocks)).reshape(len(blocks), num_layers, -1)
                kv[layer : layer + num_layers, first_block : first_block + len(blocks)] = rows.transpose(1, 0, 2)
            await reader.release()
            assert reader.state is not None
            return Handoff(reader.state, kv.view(np.float32))
        finally:
            await client.close()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.worker.metrics.registry.get_sample_value(name, labels)


class Proxy(control_pb2_grpc.ControlServicer):
    """The proxy's end of Join: takes everybody."""

    async def Join(self, request_iterator: Any, context: Any) -> AsyncIterator[control_pb2.MemberOrder]:
        async for report in request_iterator:
            if report.HasField("info"):
                yield control_pb2.MemberOrder(accepted=True)


@pytest.fixture
async def proxy_address() -> AsyncIterator[str]:
    server, port = create_server("127.0.0.1", 0)
    control_pb2_grpc.add_ControlServicer_to_server(Proxy(), server)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0.0)


@pytest.fixture
async def make_site(options: ModelOptions, proxy_address: str, worker_views: Any) -> AsyncIterator[Any]:
    """make_site(node_id="node-t", store=None, transport="auto", **PrefillConfig fields) -> a running Site."""
    running: list[Any] = []
    async with contextlib.AsyncExitStack() as exits:

        async def make(
            node_id: str = "node-t",
            *,
            store: StoreServer | None = None,
            name: str = "prefill-0",
            flip_pushed_bytes: bool = False,
            prefix_cache_hbm: bool = True,
            **config: Any,
        ) -> Site:
            if store is None:
                store = StoreServer(StoreConfig(arena_bytes=4 * 2**20), node_id=node_id)
                await store.start("127.0.0.1")
                running.append(store)
            worker = make_worker(
                WorkerAddress(
                    worker_id=name,
                    node_id=node_id,
                    host="127.0.0.1",
                    store_address=store.address,
                    proxy_address=proxy_address,
                ),
                role="prefill",
                options=dataclasses.replace(options, prefix_cache_hbm=prefix_cache_hbm),
                prefill=PrefillConfig(**{"max_tokens_per_step": 64, **config}),
                decode=DecodeConfig(),
            )
            await worker.start()
            if flip_pushed_bytes:
                worker_views.flip_pushed_bytes(worker.stores.own.client)
            running.append(worker)
            channel = await exits.enter_async_context(open_channel(worker.address))
            return Site(store, worker_views.WorkerView(worker, worker.prefill), worker_pb2_grpc.PrefillWorkerStub(channel))

        yield make
    await asyncio.gather(*(server.stop(0.0) for server in running))


@pytest.fixture(scope="session")
def reference(options: ModelOptions) -> Any:
    """reference(token_ids) -> Reference, by an engine of its own in one chunk."""
    engine = Engine.load(options, kv_capacity_tokens=256, num_threads=1)

    def compute(token_ids: list[int]) -> Reference:
        engine.cache.data.zero_()
        num_blocks = -(-len(token_ids) // BLOCK_SIZE)
        sequence = Sequence("reference", token_ids, len(token_ids), SamplingParams(temperature=0.0), pages=list(range(num_blocks)))
        logits = engine.forward([StepChunk(sequence, 0, len(token_ids))])
        layers = [engine.cache.read_bytes(layer, sequence.pages) for layer in range(engine.schema.num_layers)]
        return Reference(np.stack(layers).view(np.float32), int(logits[0].argmax()))

    return compute

"""A small tokenizer with a chat template, and a proxy with scripted workers behind it. Offered as fixtures by conftest.py."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from halfmoon.client import Control
from halfmoon.protocol.channel import create_server
from halfmoon.protocol.config import PORTS, ModelOptions, ProxyConfig
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import HalfmoonError
from halfmoon.protocol.grpc_errors import unary_boundary
from halfmoon.protocol.membership import stay_joined
from halfmoon.protocol.schema import KVSchema
from halfmoon.protocol.v1 import common_pb2, control_pb2, kvstore_pb2, kvstore_pb2_grpc, worker_pb2, worker_pb2_grpc
from halfmoon.proxy.server import ProxyServer
from halfmoon.proxy.text.tokenizer import Tokenizer
from halfmoon.tests.feeds import Feeds

VOCAB_SIZE = 400
FACE_TOKEN = "the-token-of-a-cluster-of-scripted-workers"
FACE_SCHEMA = KVSchema(model_fingerprint="faces", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8, block_size=16)
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS_CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    '{{- \'\\n</tools>\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' }}"
    "{{- message.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
"""In the form of Qwen3's: tools, calls and their results, reasoning."""
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Once upon a time there was a token that became a word, and a word that became an answer.",
    "naïve café, 日本語 and 한국어, emoji 😀👍🏽 and numbers 0123456789",
]


def write_model_folder(folder: Path, chat_template: str = CHATML, *, max_model_len: int = 512) -> Path:
    """A model folder without weights: config, a byte-level BPE of some 400 tokens with BOS, a ChatML template."""
    folder.mkdir()
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken", "special": True},
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "vocab_size": backend.get_vocab_size(),
        "eos_token_id": 1,
        "max_position_embeddings": max_model_len,
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ANSWER = "The quick brown fox, 日本語 and 😀 jumps over the lazy dog."
Script = Callable[[common_pb2.SequenceSpec], list[int]]


def prompt_scores(sequence: common_pb2.SequenceSpec, size: int = 3) -> list[common_pb2.PromptLogprobs]:
    """Token i of a prompt has the log probability -i / 8 and the rank i; the r-th likeliest is the r-th token behind it, with -r / 4."""
    parts: list[common_pb2.PromptLogprobs] = []
    for start in range(1, sequence.num_prompt_tokens, size):
        part = common_pb2.PromptLogprobs(start=start)
        for index in range(start, min(start + size, sequence.num_prompt_tokens)):
            part.logprobs.append(-index / 8)
            part.ranks.append(index)
            for rank in range(sequence.sampling.num_prompt_logprobs):
                part.top_token_ids.append((sequence.token_ids[index] + rank) % VOCAB_SIZE)
                part.top_logprobs.append(-rank / 4)
        parts.append(part)
    return parts


class ScriptedWorkers(worker_pb2_grpc.PrefillWorkerServicer, worker_pb2_grpc.DecodeWorkerServicer, kvstore_pb2_grpc.KVStoreServicer):
    """A prefill worker, a decode worker and a store as gRPC peers in one server; what is decoded is the test's script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[common_pb2.SequenceSpec] = []
        self.arrived = threading.Event()
        self.cancelled = threading.Event()  # a Decode call was cancelled under its handler
        self.stopped: list[str] = []
        self.gate_at: int | None = None  # output index before which decode waits for the gate, or for Stop
        self.gate_for: Callable[[common_pb2.SequenceSpec], bool] = lambda sequence: True
        self.gate = asyncio.Event()
        self.fail_at: dict[int, HalfmoonError] = {}  # output index -> what decode raises there
        self.logprob: Callable[[int], float] = lambda index: -0.5 * (index + 1)
        self._stops: dict[str, asyncio.Event] = {}
        self._feeds = Feeds()

    async def start(self, control_address: str, credentials: Credentials, max_model_len: int = 512) -> None:
        self._server, port = create_server("127.0.0.1", 0, credentials=credentials)
        worker_pb2_grpc.add_PrefillWorkerServicer_to_server(self, self._server)
        worker_pb2_grpc.add_DecodeWorkerServicer_to_server(self, self._server)
        kvstore_pb2_grpc.add_KVStoreServicer_to_server(self, self._server)
        await self._server.start()
        address = f"127.0.0.1:{port}"
        joined: list[asyncio.Event] = []
        self._members: list[asyncio.Task[None]] = []
        for name, role in (("store", control_pb2.ROLE_STORE), ("prefill", control_pb2.ROLE_PREFILL), ("decode", control_pb2.ROLE_DECODE)):
            info = control_pb2.MemberInfo(
                id=f"{name}-0",
                incarnation=uuid.uuid4().hex,
                role=role,
                address=address,
                node_id="node-0",
                store_id="store-0",
                store_address=address,
                max_model_len=max_model_len if name != "store" else 0,
                schema=FACE_SCHEMA.to_proto() if name != "store" else None,
                device="cpu",
                pid=os.getpid(),
            )
            joined.append(asyncio.Event())
            load = control_pb2.MemberLoad(num_running=1, num_waiting=2, kv_usage_ratio=0.25)
            joining = stay_joined(control_address, info, lambda load=load: load, joined[-1].set, credentials=credentials)
            self._members.append(asyncio.create_task(joining))
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in joined)), 60)

    async def stop(self) -> None:
        for member in self._members:
            member.cancel()
        await asyncio.gather(*self._members, return_exceptions=True)
        await self._server.stop(None)

    @unary_boundary
    async def Prefill(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> worker_pb2.PrefillReply:
        return worker_pb2.PrefillReply(state=self._state(request.sequence))

    @unary_boundary
    async def PrefillWithLogprobs(self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext) -> None:
        for part in prompt_scores(request.sequence):
            await context.write(worker_pb2.PrefillReply(prompt_logprobs=part))
        await context.write(worker_pb2.PrefillReply(state=self._state(request.sequence)))

    @unary_boundary
    async def Decode(self, request: worker_pb2.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        sequence = request.sequence
        self.requests.append(sequence)
        self.arrived.set()
        stop = self._stops[sequence.request_id] = asyncio.Event()
        try:
            finished = await self._decode(request, context, stop)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await context.write(worker_pb2.DecodeReply(finished=finished))

    async def _decode(self, request: worker_pb2.DecodeRequest, context: Any, stop: asyncio.Event) -> worker_pb2.DecodeReply.Finished:
        """The first token goes with the admission, the others into the feed."""
        sequence = request.sequence
        answer = self.script(sequence)
        for index, token_id in enumerate(answer[: sequence.sampling.max_tokens]):
            if index == self.gate_at and self.gate_for(sequence):
                waiting = [asyncio.ensure_future(event.wait()) for event in (self.gate, stop)]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for one in waiting:
                    one.cancel()
            if index in self.fail_at:
                raise self.fail_at[index]
            if stop.is_set():
                return worker_pb2.DecodeReply.Finished(reason=common_pb2.FINISH_REASON_STOP, num_tokens=index)
            token = self._token(sequence, index, token_id)
            if index == 0:
                state = self._state(sequence)
                state.first_token.CopyFrom(token)
                await context.write(worker_pb2.DecodeReply(admitted=worker_pb2.DecodeReply.Admitted(state=state)))
            else:
                self._feeds.give(request, token)
        stopped = len(answer) <= sequence.sampling.max_tokens
        reason = common_pb2.FINISH_REASON_STOP if stopped else common_pb2.FINISH_REASON_LENGTH
        return worker_pb2.DecodeReply.Finished(reason=reason, num_tokens=min(len(answer), sequence.sampling.max_tokens))

    def _token(self, sequence: common_pb2.SequenceSpec, index: int, token_id: int) -> common_pb2.TokenOutput:
        token = common_pb2.TokenOutput(token_id=token_id)
        if sequence.sampling.HasField("num_logprobs"):
            token.logprob = self.logprob(index)
            for rank in range(sequence.sampling.num_logprobs):
                token.top_logprobs.add(token_id=(token_id + rank) % VOCAB_SIZE, logprob=self.logprob(index + rank))
        return token

    @unary_boundary
    async def Tokens(self, request: worker_pb2.TokensRequest, context: grpc.aio.ServicerContext) -> None:
        await self._feeds.serve(request, context)

    @unary_boundary
    async def Stop(self, request: worker_pb2.StopRequest, context: grpc.aio.ServicerContext) -> worker_pb2.StopReply:
        self.stopped.append(request.request_id)
        found = self._stops.get(request.request_id)
        if found is not None:
            found.set()
        return worker_pb2.StopReply(found=found is not None)

    @unary_boundary
    async def Watch(self, request: kvstore_pb2.WatchRequest, context: grpc.aio.ServicerContext) -> None:
        await context.write(kvstore_pb2.WatchReply(snapshot=True))
        await asyncio.Event().wait()

    @unary_boundary
    async def Abort(self, request: kvstore_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> kvstore_pb2.AbortReply:
        return kvstore_pb2.AbortReply(found=True)

    def _state(self, sequence: common_pb2.SequenceSpec) -> common_pb2.HandoffState:
        phases = common_pb2.PrefillPhases(prefill_s=0.75, transport="shm", num_bytes_pushed=1000)
        return common_pb2.HandoffState(num_tokens=len(sequence.token_ids), num_cached_tokens=4, phases=phases)


class Face:
    """A ProxyServer and its scripted workers on an event loop of their own thread, for blocking clients as for async ones."""

    def __init__(self, model_folder: Path, tokenizer: Tokenizer, options: ModelOptions | None = None, **config: Any) -> None:
        self.tokenizer = tokenizer
        self._options = options or ModelOptions()
        self.answer = tokenizer.encode(ANSWER, add_special_tokens=False)
        self._loop = uvloop.new_event_loop()  # the one that Ray gives its actors
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._config = ProxyConfig(**{**dict.fromkeys(PORTS, 0), "policy": "least_loaded", **config})
        self._folder = model_folder
        self.call(self._start())
        self.reset()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def reset(self) -> None:
        """The workers as they were: ANSWER for everyone, and an end-of-sequence token."""
        self.call(self._reset())

    def says(self, *answers: str) -> None:
        """One after the other, then the last one for ever; each character is a token where the tokenizer has no longer one."""
        left = list(answers)

        def script(sequence: Any) -> list[int]:
            text = left.pop(0) if len(left) > 1 else left[0]
            return [*self.tokenizer.encode(text, add_special_tokens=False), 1]

        self.workers.script = script

    def open_gate(self) -> None:
        self._loop.call_soon_threadsafe(self.workers.gate.set)

    @property
    def num_under_way(self) -> int:
        return self.server.router.num_queued + self.server.router.num_running

    def stop(self) -> None:
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self.server = ProxyServer(
            config=self._config, options=self._options, model_folder=self._folder, schema=FACE_SCHEMA, credentials=Credentials(FACE_TOKEN)
        )
        endpoints = await self.server.start()
        self.http, self.grpc, self.metrics = f"http://{endpoints.http}", endpoints.grpc, f"http://{endpoints.metrics}"
        self.control = Control(endpoints.control, FACE_TOKEN)
        self.workers = ScriptedWorkers(lambda sequence: [*self.answer, 1])
        await self.workers.start(endpoints.control, self.server.credentials, self.server.card.max_model_len)

    async def _reset(self) -> None:
        workers = self.workers
        workers.gate.set()
        workers.gate = asyncio.Event()
        workers.gate_at = None
        workers.gate_for = lambda sequence: True
        workers.fail_at = {}
        workers.script = lambda sequence: [*self.answer, 1]
        workers.requests.clear()
        workers.stopped.clear()
        workers.arrived.clear()
        workers.cancelled.clear()

    async def _stop(self) -> None:
        self.workers.gate.set()
        await self.server.stop(0.0)
        await self.workers.stop()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

"""What the front costs: how long its event loop stands still while large requests come in, CPU time a streamed token, and a placement.

    halfmoon bench front --json front.json                 7 minutes on two busy cores; --parts gaps,tokens,placement takes some of it

The proxy runs in a process of its own, as do scripted workers (no engine: a step is a timer) and the clients, over real HTTP and
gRPC on loopback.

Gap:   a heartbeat on the proxy's event loop; its longest delay while one request with a large prompt is served from end to end. By the
       clock, which on a busy machine is also other processes' doing, and in CPU time of the proxy between two beats.
Token: once every stream has its first token, the workers give each a token a step; the proxy's process time (user + system, all
       its threads) from before the first of those steps until every client has the last token, over the tokens. A step lasts
       --step-us-per-stream times the streams, so that nothing piles up and no two tokens share a message. No heartbeat meanwhile.
Floor: the same streams of the same sizes from a process that has the two servers and nothing else, in turn with the proxy's.
Placement: front_placement.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import front_placement
from front_peers import LAST_TEXT, bare_process, clients_process, proxy_process, workers_process
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from halfmoon.protocol.channel import open_channel
from halfmoon.protocol.v1 import inference_pb2, inference_pb2_grpc

VOCAB_SIZE = 32_000
MAX_MODEL_LEN = 2**20 + 2**16
NUM_CHARS = 500_000  # some 128 k tokens
NUM_IDS = 1_000_000
LEAST_STEPS, MOST_STEPS = 16, 400  # of a run
PARTS = ("gaps", "tokens", "placement")
PACKAGES = ("grpcio", "protobuf", "uvicorn", "uvloop", "httptools", "fastapi", "pydantic", "tokenizers")


def corpus(num_bytes: int) -> list[str]:
    """The standard library's own sources."""
    folder, texts = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(folder.glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore").replace(LAST_TEXT, ""))
        num_bytes -= len(texts[-1])
        if num_bytes < 0:
            break
    return texts


def write_model(folder: Path) -> Tokenizer:
    """A model folder without weights: a byte-level BPE of VOCAB_SIZE tokens, as Llama 3's and Qwen's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(corpus(2_000_000), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": VOCAB_SIZE, "eos_token_id": 0, "max_position_embeddings": MAX_MODEL_LEN, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return tokenizer


class Process:
    """A process at the other end of a pipe."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments))
        self._process.start()

    def ask(self, what: Any) -> Any:
        self.pipe.send(what)
        return self.pipe.recv()

    def expect(self, what: str) -> None:
        found = self.pipe.recv()
        assert found == what, f"{found} came instead of {what}"

    def end(self) -> None:
        self.pipe.send("end")
        self._process.join(20)
        self._process.terminate()


class Front:
    def __init__(self, loop: str, folder: Path, tokenizer: Tokenizer) -> None:
        self.proxy = Process(proxy_process, loop, str(folder))
        self.http_address, self.grpc_address, control_address, self.metrics_address, credentials = self.proxy.pipe.recv()
        answer = [one for one in tokenizer.encode(corpus(1)[0][:20_000]).ids if tokenizer.decode([one]).isascii()][:500]
        last = tokenizer.encode(LAST_TEXT).ids
        self.workers = Process(workers_process, loop, control_address, credentials, answer, last)
        self.workers.expect("joined")
        self.clients = Process(clients_process, loop, self.http_address, self.grpc_address)

    def end(self) -> None:
        for process in (self.clients, self.workers, self.proxy):
            process.end()

    def idle_share(self) -> float:
        """CPU seconds a second, of the proxy with members and without requests."""
        cpu_s, begun = self.proxy.ask("cpu"), time.perf_counter()
        time.sleep(3.0)
        return (self.proxy.ask("cpu") - cpu_s) / (time.perf_counter() - begun)

    def token_cost(self, face: str, num_streams: int, num_tokens: int, step_s: float, watch: bool = False) -> dict[str, float]:
        """watch: the event loop's gaps, too. The heartbeat costs CPU time of its own, so that the two are not measured together."""
        self.clients.pipe.send(("open", face, num_streams, num_tokens + 1))
        self.clients.expect("started")
        time.sleep(0.5)  # what opening the streams left to do
        if watch:
            self.proxy.ask("watch")
        cpu_s, wall_s = self.proxy.ask("cpu"), time.perf_counter()
        self.workers.pipe.send(("go", num_tokens, step_s))
        self.workers.expect("done")
        self.clients.expect("over")
        cpu_s, wall_s = self.proxy.ask("cpu") - cpu_s, time.perf_counter() - wall_s
        gap_s, gap_cpu_s = self.proxy.ask("watched") if watch else (0.0, 0.0)
        self.workers.pipe.send("finish")
        num_messages = self.clients.pipe.recv()
        total = num_streams * num_tokens
        return {
            "cpu_us_per_token": 1e6 * cpu_s / total,
            "tokens_per_s": total / wall_s,
            "messages_per_token": num_messages / total,
            "longest_gap_ms": 1e3 * gap_s,
            "longest_gap_cpu_ms": 1e3 * gap_cpu_s,
        }

    def gap(self, send: Callable[[], None]) -> dict[str, float]:
        self.proxy.ask("watch")
        cpu_s, begun = self.proxy.ask("cpu"), time.perf_counter()
        send()
        wall_s, cpu_s = time.perf_counter() - begun, self.proxy.ask("cpu") - cpu_s
        gap_s, gap_cpu_s = self.proxy.ask("watched")
        found = {"longest_gap_ms": gap_s, "longest_gap_cpu_ms": gap_cpu_s, "request_ms": wall_s, "proxy_cpu_ms": cpu_s}
        return {name: 1e3 * seconds for name, seconds in found.items()}

    def post(self, prompt: Any) -> None:
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "ignore_eos": True}).encode()
        url, headers = f"http://{self.http_address}/v1/completions", {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
            assert json.loads(reply.read())["usage"]["completion_tokens"] == 1

    def scrape(self) -> None:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=60) as reply:
            reply.read()

    def generate(self, **prompt: Any) -> None:
        async def call() -> None:
            async with open_channel(self.grpc_address) as channel:
                stub: Any = inference_pb2_grpc.InferenceStub(channel)
                request = inference_pb2.GenerateRequest(max_tokens=1, ignore_eos=True, **prompt)
                replies = [reply async for reply in stub.Generate(request, timeout=60)]
                assert replies[-1].finished.usage.num_completion_tokens == 1

        asyncio.run(call())


class Floor:
    """The two servers alone."""

    def __init__(self, loop: str) -> None:
        self.process = Process(bare_process, loop)
        self.clients = Process(clients_process, loop, *self.process.pipe.recv())

    def end(self) -> None:
        self.clients.end()
        self.process.end()

    def token_cost_us(self, face: str, num_streams: int, num_tokens: int, step_s: float) -> float:
        self.clients.pipe.send(("open", face, num_streams, num_tokens + 1))
        self.clients.expect("started")
        time.sleep(0.5)
        cpu_s = self.process.ask("cpu")
        self.process.pipe.send(("go", num_tokens, step_s))
        self.process.expect("done")
        self.clients.expect("over")
        cpu_s = self.process.ask("cpu") - cpu_s
        self.process.pipe.send("finish")
        self.clients.pipe.recv()
        return 1e6 * cpu_s / (num_streams * num_tokens)


def gaps(front: Front) -> dict[str, dict[str, float]]:
    text = "".join(corpus(NUM_CHARS))[:NUM_CHARS]
    rng = random.Random(0)
    token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(NUM_IDS)]
    front.post("warm " * 200)
    front.generate(prompt="warm " * 200)
    sends: dict[str, Callable[[], None]] = {
        "nothing": lambda: time.sleep(1.0),
        "HTTP, 500 k characters": lambda: front.post(text),
        "HTTP, 128 k token ids": lambda: front.post(token_ids[:128_000]),
        "HTTP, 1 M token ids": lambda: front.post(token_ids),
        "gRPC, 500 k characters": lambda: front.generate(prompt=text),
        "gRPC, 128 k token ids": lambda: front.generate(tokens=inference_pb2.TokenIds(token_ids=token_ids[:128_000])),
        "gRPC, 1 M token ids": lambda: front.generate(tokens=inference_pb2.TokenIds(token_ids=token_ids)),
        "GET /metrics": front.scrape,
    }
    found: dict[str, dict[str, float]] = {}
    for name, send in sends.items():
        runs = [front.gap(send) for _ in range(3)]
        found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        found[name]["worst_gap_ms"] = max(run["longest_gap_ms"] for run in runs)
        progress(f"{name}: {json.dumps(found[name])}")
    return found


def environment(loop: str) -> dict[str, Any]:
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.machine(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "event_loop": loop,
        "versions": versions,
        "commit": commit,
    }


def show(document: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        "request", "gap, CPU", "gap, clock", "worst", "request", "proxy CPU", title="the event loop stands still, ms, medians of 3"
    )
    for name, row in document["gaps"].items():
        values = (row[key] for key in ("longest_gap_cpu_ms", "longest_gap_ms", "worst_gap_ms", "request_ms", "proxy_cpu_ms"))
        table.add_row(name, *(f"{value:.1f}" for value in values))
    console.print(table)
    table = Table("face", "streams", "CPU us/token", "runs", "floor", "tokens/s", "messages/token", "gap ms", title="a streamed token")
    table.caption = f"an idle proxy takes {document['idle_cpu_share']:.2%} of a core, which is in these figures"
    for row in document["tokens"]:
        runs = " ".join(f"{value:.0f}" for value in row["runs_us"])
        rest = (f"{row['floor_us']:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['messages_per_token']:.2f}", f"{row['longest_gap_ms']:.1f}")
        table.add_row(row["face"], str(row["streams"]), f"{row['cpu_us_per_token']:.1f}", runs, *rest)
    console.print(table)
    table = Table("workers", "policy", "admission", "queued", "p50", "p99", title="a placement with its bookkeeping, ms of CPU time")
    for row in document["placement"].get("placement", []):
        table.add_row(f"{row['size']} + {row['size']}", *(str(row[key]) for key in ("policy", "admission", "num_queued", "p50", "p99")))
    console.print(table)


def token_row(front: Front, floor: Floor, face: str, num_streams: int, arguments: argparse.Namespace) -> dict[str, Any]:
    step_s = max(0.005, 1e-6 * arguments.step_us_per_stream * num_streams)
    num_tokens = min(max(LEAST_STEPS, arguments.tokens // num_streams), MOST_STEPS)
    runs, floors = [], []
    for _ in range(arguments.runs):
        runs.append(front.token_cost(face, num_streams, num_tokens, step_s))
        floors.append(floor.token_cost_us(face, num_streams, num_tokens, step_s))
    row: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    watched = front.token_cost(face, num_streams, num_tokens, step_s, watch=True)
    row |= {key: watched[key] for key in ("longest_gap_ms", "longest_gap_cpu_ms")}
    row |= {"face": face, "streams": num_streams, "runs_us": [run["cpu_us_per_token"] for run in runs]}
    row |= {"floor_us": statistics.median(floors), "floor_runs_us": floors}
    progress(json.dumps(row))
    return row


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {"environment": environment(arguments.loop), "arguments": vars(arguments) | {"json": None}}
    document |= {"gaps": {}, "tokens": [], "idle_cpu_share": 0.0, "placement": {}}
    if "gaps" in arguments.parts or "tokens" in arguments.parts:
        measure_streams(arguments, document)
    if "placement" in arguments.parts:
        document["placement"] = asyncio.run(front_placement.measure(arguments.sizes, progress))
    return document


def measure_streams(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_model(Path(folder))
        front, floor = Front(arguments.loop, Path(folder), tokenizer), Floor(arguments.loop)
        try:
            if "gaps" in arguments.parts:
                document["gaps"] = gaps(front)
            if "tokens" in arguments.parts:
                document["idle_cpu_share"] = front.idle_share()
                pairs = [(face, num_streams) for face in arguments.faces for num_streams in arguments.streams]
                document["tokens"] = [token_row(front, floor, face, num_streams, arguments) for face, num_streams in pairs]
        finally:
            front.end()
            floor.end()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--streams", type=numbers, default=[1, 32, 256])
    parser.add_argument("--faces", type=lambda text: text.split(","), default=["http", "grpc"])
    parser.add_argument("--tokens", type=int, default=4000, help=f"in a run; {LEAST_STEPS} to {MOST_STEPS} a stream")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--sizes", type=numbers, default=[10, 1000], help="of placement: prefill workers, and as many decode workers")
    parser.add_argument("--step-us-per-stream", type=int, default=800)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    document = measure(arguments)
    show(document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()

"""Servers as arms of a comparison: what each is, how it is started, and how nothing of it is left.

vllm:CHUNK         a vLLM server on each GPU, prefill chunks of so many tokens
coupled:CHUNK      Halfmoon, a worker a GPU that does both, prefill tokens of a decode step
coupled@MS         the same with chunks sized for steps of so many milliseconds; coupled: as Halfmoon is shipped
1p1d, 2p1d:STEP    Halfmoon, prefill and decode workers, tokens of a prefill step
adaptive:1p1d      the same, placed by policy adaptive under the first SLO
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shapes import SHAPES, write_shape, write_tokenizer

MARK = "HALFMOON_BENCH_ARM"  # in the environment of every process of an arm, whoever started it
STOP_S = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))
MEMORY_SLACK_MIB = 600
PORTS = range(20_000, 30_000)
CHILD_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false", "VLLM_USE_FLASHINFER_SAMPLER": "0",
}  # fmt: skip


class ArmFailed(Exception):
    """It did not start; says why."""


@dataclass(frozen=True)
class Model:
    folder: str  # empty: Halfmoon's demo model
    max_model_len: int  # 0: what the model was made for
    dummy: bool
    name: str = "m"


@dataclass(frozen=True)
class Process:
    arguments: tuple[str, ...]
    url: str
    ready_path: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Spec:
    """An arm: its name, its processes, or why it can't be run here."""

    name: str
    processes: tuple[Process, ...] = ()
    absent: str = ""
    takes_slo: bool = False
    """Of each request."""


def make_specs(
    names: Sequence[str], *, num_gpus: int, device: str, model: Model, settings: Sequence[str], slo: tuple[float, float]
) -> list[Spec]:  # fmt: skip
    """Raises SystemExit for a name that has none of the forms."""
    return [_spec(name, num_gpus, device, model, settings, slo) for name in names]


def _spec(name: str, num_gpus: int, device: str, model: Model, settings: Sequence[str], slo: tuple[float, float]) -> Spec:
    found = re.fullmatch(r"(vllm|coupled)(?::(\d+)|@(\d+))?|(adaptive:)?(\d+)p(\d+)d(?::(\d+))?", name)
    if found is None or name.startswith("vllm@"):
        raise SystemExit(f"no arm {name!r}; write vllm:CHUNK, coupled, coupled:CHUNK, coupled@MS, 1p1d, 1p1d:STEP or adaptive:1p1d")
    kind, chunk, step_ms, adaptive, num_prefill, num_decode, step = found.groups()
    if kind == "vllm":
        return _vllm(name, num_gpus, device, model, int(chunk or 2048))
    keys = [f"decode.num_workers={num_gpus if kind else num_decode}", f"prefill.num_workers={0 if kind else num_prefill}"]
    if not kind and int(num_prefill) + int(num_decode) > num_gpus:
        return Spec(name, absent=f"it needs {int(num_prefill) + int(num_decode)} GPUs, there are {num_gpus}")
    keys += [f"decode.max_prefill_tokens_per_step={chunk}", "decode.tpot_target_s=0"] if chunk else []  # a constant
    keys += [f"decode.tpot_target_s={int(step_ms) / 1e3}"] if step_ms else []
    keys += [f"prefill.max_tokens_per_step={step}"] if step else []
    policy = [f"proxy.ttft_slo_s={slo[0]}", f"proxy.tpot_slo_s={slo[1]}", "proxy.policy=adaptive"] if adaptive else []
    keys += policy or ["proxy.policy=cache_aware" if kind else "proxy.policy=kvcache_centric"]
    return _halfmoon(name, [*keys, *settings], num_gpus, device, model)


def _halfmoon(name: str, keys: Sequence[str], num_gpus: int, device: str, model: Model) -> Spec:
    http_port, *others = _free_ports(4)
    ports = [
        f"proxy.{key}={port}"
        for key, port in zip(("http_port", "grpc_port", "control_port", "metrics_port"), (http_port, *others), strict=True)
    ]
    keys = [
        f"model.path={model.folder}", f"model.name={model.name}", f"model.device={device}", f"model.max_model_len={model.max_model_len}",
        f"model.load_format={'dummy' if model.dummy else 'auto'}", *ports, *keys,
    ]  # fmt: skip
    script = str(Path(__file__).with_name("serving_halfmoon.py"))
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[:num_gpus])} if device == "cuda" else {}
    return Spec(name, (Process((sys.executable, script, *keys), f"http://127.0.0.1:{http_port}", "/ready", environment),), takes_slo=True)


def _vllm(name: str, num_gpus: int, device: str, model: Model, chunk: int) -> Spec:
    if device != "cuda" or importlib.util.find_spec("vllm") is None:
        return Spec(name, absent="vLLM can't be imported" if device == "cuda" else "vLLM is run on GPUs only")
    if not model.folder:
        return Spec(name, absent="vLLM needs --model or --shape")
    processes: list[Process] = []
    for gpu, port in zip(visible_gpus(), _free_ports(num_gpus), strict=False):
        options = {
            "--model": model.folder, "--served-model-name": model.name, "--dtype": "bfloat16", "--gpu-memory-utilization": "0.88",
            "--max-num-batched-tokens": str(chunk), "--max-num-seqs": "256", "--host": "127.0.0.1", "--port": str(port),
        }  # fmt: skip
        options |= {"--load-format": "dummy"} if model.dummy else {}
        options |= {"--max-model-len": str(model.max_model_len)} if model.max_model_len else {}
        flags = [part for pair in options.items() for part in pair]
        command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags)
        processes.append(Process(command, f"http://127.0.0.1:{port}", "/health", {"CUDA_VISIBLE_DEVICES": gpu}))
    return Spec(name, tuple(processes))


@contextmanager
def running(spec: Spec, logs: Path, start_timeout_s: float, show: Callable[[str], None]) -> Iterator[float]:
    """Yields the seconds until every process was ready; on the way out no process and no GPU memory of the arm is left.

    Raises ArmFailed where one ends or is not ready in time, with the end of its log.
    """
    mark = uuid.uuid4().hex
    memory_before = gpu_memory_mib()
    started: list[tuple[subprocess.Popen[bytes], Process, Path]] = []
    began = time.monotonic()
    try:
        for number, process in enumerate(spec.processes):
            log = logs / f"{re.sub(r'[^a-z0-9]+', '-', spec.name)}-{number}.log"
            environment = {**os.environ, **CHILD_ENVIRONMENT, **process.environment, MARK: mark}
            with log.open("wb") as file:
                child = subprocess.Popen(
                    process.arguments, env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                )  # fmt: skip
            started.append((child, process, log))
        for child, process, log in started:
            _await_ready(child, process, log, began + start_timeout_s)
        yield time.monotonic() - began
    finally:
        for line in stop([child for child, _, _ in started], mark, memory_before):
            show(f"{spec.name}: {line}")


def _await_ready(child: subprocess.Popen[bytes], process: Process, log: Path, deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(process.url + process.ready_path, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError, http.client.HTTPException):
            pass  # not yet
        try:
            code = child.wait(timeout=0.5)  # the pause between two looks, ended by the process's end
        except subprocess.TimeoutExpired:
            if time.monotonic() < deadline:
                continue
            raise ArmFailed(f"not ready in time; {_end_of(log)}") from None
        raise ArmFailed(f"ended with {code} before it was ready; {_end_of(log)}")


def stop(children: Sequence[subprocess.Popen[bytes]], mark: str, memory_before: Sequence[int]) -> list[str]:
    """What was left after a plain interrupt, and what was done about it; empty where all went well."""
    told: list[str] = []
    known = family([child.pid for child in children if child.poll() is None])  # while those are alive that began them

    def alive() -> list[int]:
        now = _processes()
        same = {pid for pid, start in known.items() if pid in now and now[pid].start == start}
        # a child is a zombie, and so not among them, until it is polled
        return sorted(same | {child.pid for child in children if child.poll() is None} | set(marked(mark)))

    for number, wait_s in STOP_S:
        left = alive()
        if not left:
            break
        if number == signal.SIGINT:
            left = [child.pid for child in children if child.poll() is None]  # each stops what it has begun
        else:
            told.append(f"processes {', '.join(map(str, left))} were still there: {number.name}")
        for pid in left:
            _signal(pid, number)
        _await(lambda: not alive(), wait_s)
    if left := alive():
        told.append(f"processes {', '.join(map(str, left))} could not be ended")
    if not _await(lambda: _returned(memory_before), 30.0):
        told.append(f"GPU memory is {gpu_memory_mib()} MiB, it was {list(memory_before)} MiB")
    return told


class ProcessStat(NamedTuple):
    parent: int
    start: int  # in the kernel's ticks: a pid may come again, with another start


def family(roots: Sequence[int]) -> dict[int, int]:
    """These processes and all that descend from them, with their starts."""
    now = _processes()
    found = {pid: now[pid].start for pid in roots if pid in now}
    while more := {pid: stat.start for pid, stat in now.items() if stat.parent in found and pid not in found}:
        found |= more
    return found


def _processes() -> dict[int, ProcessStat]:
    """All that live; zombies do not."""
    found: dict[int, ProcessStat] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] != "Z":
            found[int(folder.name)] = ProcessStat(int(fields[1]), int(fields[19]))
    return found


def marked(mark: str) -> list[int]:
    """Live processes that carry the arm's mark, whatever became of those that started them. One that has changed its title may have
    written over it."""
    found: list[int] = []
    wanted = f"{MARK}={mark}".encode()
    for pid in _processes():
        try:
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue  # it ended meanwhile, or is another user's
    return found


def gpu_memory_mib() -> list[int]:
    """In use, of each GPU that this process may use; empty where there is none."""
    gpus = ",".join(visible_gpus())
    return [int(line) for line in _nvidia_smi("-i", gpus, "--query-gpu=memory.used", "--format=csv,noheader,nounits")] if gpus else []


def count_gpus() -> int:
    return len(_nvidia_smi("--query-gpu=index", "--format=csv,noheader"))


def make_model(shape: str, folder: Path) -> str:
    """config.json and a tokenizer that Halfmoon and vLLM both read; the weights are made up when it is loaded."""
    write_shape(shape, folder)
    write_tokenizer(shape, folder)
    bos, eos = SHAPES[shape]["bos_token_id"], SHAPES[shape]["eos_token_id"]
    card = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": SHAPES[shape]["max_position_embeddings"]}
    tokens = {"unk_token": "t0", "bos_token": f"t{bos}", "eos_token": f"t{eos}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(card | tokens))
    return str(folder)


def visible_gpus() -> list[str]:
    """Names of those that this process may use."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return told.split(",") if told else [str(number) for number in range(count_gpus())]


def _returned(before: Sequence[int]) -> bool:
    return all(now <= was + MEMORY_SLACK_MIB for now, was in zip(gpu_memory_mib(), before, strict=True))


def _await(done: Callable[[], bool], wait_s: float) -> bool:
    """Processes and devices of others send no message: they are looked at twice a second."""
    deadline = time.monotonic() + wait_s
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _nvidia_smi(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _free_ports(num: int) -> list[int]:
    """Below those that the kernel gives away: a worker or Ray would have one before the server that it is meant for."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == num:
            break
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
    return found


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{log} ends with:\n" + "\n".join(lines[-15:])

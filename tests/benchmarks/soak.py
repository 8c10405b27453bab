"""A soak of a whole cluster: requests with known answers in a closed loop, and faults of processes and clients at random, in pairs too.

    halfmoon bench soak --minutes 2 --seed 7 --faults kill,stop,wedge,store,proxy,flip,leave,slow,cancel,deadline,malformed --out soak.json

kill, stop, wedge    a worker: SIGKILL; SIGSTOP for seconds; a step that does not end for seconds
flip                 a worker's role, while a hand-off is under way, and back
store, proxy         killed, or stopped for seconds
leave, slow, cancel, deadline, malformed                     what clients do
At the end, and every REST_S seconds with all clients silent: everyone is back, nobody holds anything, and the books add up. No answer
was wrong by a token, none hung, none failed that a replay could have saved, and no log has a traceback. Else the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import random
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from faulty_cluster import NUM_MEMBERS, LiveCluster, Process, configuration, live_cluster
from known_answers import known_cases
from measure import environment, show
from soak_clients import CLIENT_FAULTS, Failure, Load

from halfmoon.protocol.roles import WorkerRole

PROCESS_FAULTS = ("kill", "stop", "wedge", "store", "proxy", "flip")
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
NUM_CASES = 22
REST_S = 40.0
GAP_S = 3.0  # between two faults of processes, at the mean
PAIR_SHARE = 0.3
BACK_S = 120.0  # for everybody to be back
AT_REST_S = 20.0
RECONNECT_S = 2.0  # after a proxy's death: clients' channels are not tried again at once, and a short deadline ends before that
MAX_ATTEMPTS = 3  # as ProxyConfig has it
MAX_NEW_FDS, MAX_NEW_MIB = 24, 96.0  # of proxy and store, from the first rest to the last


class Window(NamedTuple):
    """A fault of a process, until all members were back."""

    what: str
    began: float  # of time.monotonic()
    ended: float


class Faults:
    """What happens to processes. Each is a method named after it, which returns once it is healed as far as it can heal it."""

    def __init__(self, cluster: LiveCluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self.counts: Counter[str] = Counter()
        self.windows: list[Window] = []

    async def commit(self, kind: str) -> None:
        began, named = time.monotonic(), [kind]
        with contextlib.suppress(LookupError):  # who is to be hurt is down already
            await getattr(self, f"_{kind}")(named)
            self.counts[named[-1]] += 1
        self.windows.append(Window(named[-1], began, time.monotonic()))

    async def _kill(self, named: list[str]) -> None:
        worker = self._rng.choice(WORKERS)
        named.append(f"kill {worker[:-2]}")
        await self._cluster.kill(worker)

    async def _stop(self, named: list[str]) -> None:
        worker = self._rng.choice(WORKERS)
        named.append(f"stop {worker[:-2]}")
        await self._stop_for(worker, self._rng.uniform(0.5, 8.0))

    async def _wedge(self, named: list[str]) -> None:
        worker, seconds = self._rng.choice(WORKERS), self._rng.uniform(1.0, 8.0)
        named.append(f"wedge {worker[:-2]}")
        await self._cluster.pid(worker)
        await self._cluster.wedge(worker, seconds)
        await asyncio.sleep(seconds)

    async def _store(self, named: list[str]) -> None:
        await self._kill_or_stop("store-0", named)

    async def _proxy(self, named: list[str]) -> None:
        await self._kill_or_stop("proxy", named)

    async def _kill_or_stop(self, member_id: str, named: list[str]) -> None:
        kills = self._rng.random() < 0.5
        named.append(f"{'kill' if kills else 'stop'} {member_id.removesuffix('-0')}")
        if kills:
            await self._cluster.kill(member_id)
            if member_id == "proxy":  # its requests are lost, and nobody can be served before a decode worker has joined again
                await self._cluster.until(lambda members: any(name.startswith("decode") for name in members), BACK_S)
                await asyncio.sleep(RECONNECT_S)
        else:
            await self._stop_for(member_id, self._rng.uniform(0.5, 6.0))

    async def _flip(self, named: list[str]) -> None:
        """A worker takes on another role while a hand-off is under way, if one comes, and its own again."""
        worker = self._rng.choice(WORKERS)
        role: WorkerRole = "prefill" if worker.startswith("prefill") else "decode"
        named.append(f"flip {role}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                while not await self._cluster.num_handoffs():
                    await asyncio.sleep(0.01)
        try:
            await self._cluster.set_role(worker, "decode" if role == "prefill" else "prefill")
            await asyncio.sleep(self._rng.uniform(0.0, 1.0))
        finally:
            await self._cluster.role_is(worker, role, BACK_S)

    async def _stop_for(self, member_id: str, seconds: float) -> None:
        async with self._cluster.stopped(member_id):
            await asyncio.sleep(seconds)


class Soak:
    def __init__(self, cluster: LiveCluster, load: Load, kinds: Sequence[str], rng: random.Random) -> None:
        self._cluster, self._load, self._kinds, self._rng = cluster, load, kinds, rng
        self.faults = Faults(cluster, rng)
        self.leaks: list[str] = []
        self.processes: list[dict[str, Process]] = []

    async def run(self, minutes: float) -> None:
        end = time.monotonic() + 60.0 * minutes
        while time.monotonic() < end:
            self._load.resume()
            await self._trouble(min(end, time.monotonic() + REST_S))
            await self._rest()

    async def _trouble(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            while (left_s := until - time.monotonic()) > 0:
                await asyncio.sleep(min(left_s, self._rng.expovariate(1.0 / GAP_S)))
                if self._kinds and len(await self._cluster.incarnations()) >= NUM_MEMBERS - 2:
                    group.create_task(self._commit())

    async def _commit(self) -> None:
        kinds = self._rng.choices(self._kinds, k=2 if self._rng.random() < PAIR_SHARE else 1)
        async with asyncio.TaskGroup() as group:
            for kind in kinds:
                group.create_task(self.faults.commit(kind))
                await asyncio.sleep(self._rng.uniform(0.0, 0.5))

    async def _rest(self) -> None:
        """All clients silent: everyone comes back, and nobody holds anything."""
        await self._load.paused()
        if await self._cluster.all_back(BACK_S) is None:
            self._leaked(f"only {sorted(await self._cluster.incarnations())} came back")
        began, left = time.monotonic(), "nothing looked at"
        while left and time.monotonic() - began < AT_REST_S:
            await asyncio.sleep(0.1)
            left = await self._cluster.not_at_rest()
        if left:
            self._leaked(left)
        self.processes.append(await self._cluster.processes())
        show(
            f"  at rest: {self.faults.counts.total()} faults of processes, {self._load.faults.total()} of clients, {dict(self._load.ended)}"
        )

    def _leaked(self, what: str) -> None:
        self.leaks.append(what)
        show(f"LEAK {what}")


def unexplained(failures: Sequence[Failure], windows: Sequence[Window]) -> list[str]:
    """Failures that a replay should have hidden: the proxy was not killed beside them, nor was each attempt lost to another fault."""
    found: list[str] = []
    for failure in failures:
        beside = [window.what for window in windows if window.began <= failure.ended and failure.began <= window.ended]
        used_up = f"attempt {MAX_ATTEMPTS} of {MAX_ATTEMPTS}" in failure.what and len(beside) >= MAX_ATTEMPTS
        if "kill proxy" not in beside and not used_up:
            found.append(f"{failure.what} (beside {', '.join(beside) or 'no fault'})")
    return found


def growth(processes: Sequence[dict[str, Process]]) -> list[str]:
    """Of processes that lived from the first rest to the last. A worker's memory grows until all its pages have been used."""
    found: list[str] = []
    for name, first in processes[0].items():
        last = processes[-1].get(name)
        if last is None or last.pid != first.pid:
            continue
        if last.num_fds - first.num_fds > MAX_NEW_FDS:
            found.append(f"{name}: {first.num_fds} descriptors, then {last.num_fds}")
        if name in ("proxy", "store-0") and last.rss_mib - first.rss_mib > MAX_NEW_MIB:
            found.append(f"{name}: {first.rss_mib} MiB, then {last.rss_mib}")
    return found


async def soak(options: argparse.Namespace, kinds: Sequence[str]) -> dict[str, Any]:
    rng = random.Random(options.seed)
    show(f"seed {options.seed}")
    async with live_cluster(configuration()) as cluster:
        async with cluster.client() as client:
            cases = await known_cases(client, rng, NUM_CASES)
        client_kinds = [kind for kind in kinds if kind in CLIENT_FAULTS]
        supervisor = cluster.supervisor
        load = Load(supervisor.grpc_address, supervisor.http_address, cases, client_kinds, options.share, rng)
        show("the cluster serves")
        run = Soak(cluster, load, [kind for kind in kinds if kind in PROCESS_FAULTS], rng)
        began = time.monotonic()
        async with load.running(options.streams):
            await run.run(options.minutes)
        tracebacks = cluster.tracebacks()
    verdict = {
        "wrong": load.wrong,
        "hangs": load.hangs,
        "failures": unexplained(load.failures, run.faults.windows),
        "leaks": run.leaks,
        "growth": growth(run.processes),
        "tracebacks": tracebacks,
    }
    return {
        "ok": not any(verdict.values()),
        "seed": options.seed,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "faults": {**run.faults.counts, **load.faults},
        "num_process_faults": run.faults.counts.total(),
        "num_client_faults": load.faults.total(),
        "outcomes": load.ended,
        "num_requests": load.ended.total(),
        "num_tokens_checked": load.num_tokens,
        "num_replayed": load.num_replayed,
        "longest_request_s": round(load.longest_s, 2),
        "verdict": verdict,
        "excused": len(load.failures) - len(verdict["failures"]),
        "processes": [{name: one._asdict() for name, one in found.items()} for found in (run.processes[0], run.processes[-1])],
        "environment": environment()
        | {name: version(name) for name in ("ray", "grpcio", "protobuf")}
        | {"python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="of load; a cluster takes half a minute to start")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--faults", default=",".join(PROCESS_FAULTS + CLIENT_FAULTS))
    parser.add_argument("--streams", type=int, default=8, help="clients at a time")
    parser.add_argument("--share", type=float, default=0.4, help="of requests whose client commits a fault")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds = [kind for kind in options.faults.split(",") if kind]
    if unknown := set(kinds) - {*PROCESS_FAULTS, *CLIENT_FAULTS}:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; there are {', '.join(PROCESS_FAULTS + CLIENT_FAULTS)}")
    options.seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    found = asyncio.run(soak(options, kinds))
    show(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    if not found["ok"]:
        raise SystemExit(f"seed {options.seed}: " + ", ".join(f"{len(what)} {name}" for name, what in found["verdict"].items() if what))


if __name__ == "__main__":
    main()

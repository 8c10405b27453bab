"""How long a cluster takes to get over a fault: kill, stop and wedge of workers, the store and the proxy, one after another.

    halfmoon bench recovery --rounds 3 --faults kill,stop,wedge --out recovery.json

noticed         until the proxy has left the member; of the proxy itself, until the supervisor says so
first success   until an answer is there to a probe that was sent after the fault; a probe of a new prompt goes out each PROBE_S
slowest probe   of those that were sent after the fault; one that fails counts as failed
back            until all are members again: after a kill from the kill on, else from the moment on at which the process goes on
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from faulty_cluster import NUM_MEMBERS, LiveCluster, configuration, live_cluster
from measure import environment, show

from halfmoon.client import AsyncClient
from halfmoon.protocol.errors import HalfmoonError

FAULTS = (
    *(("kill", member_id) for member_id in ("prefill-0", "decode-0", "store-0", "proxy")),
    *(("stop", member_id) for member_id in ("prefill-0", "decode-0", "store-0", "proxy")),
    *(("wedge", member_id) for member_id in ("prefill-0", "decode-0", "store-0", "proxy")),
)
HOLD_S = 6.0  # of a stop and of a wedge
PROBE_S, PROBE_LEN, PROBE_TOKENS = 0.25, 100, 4
BACK_S = 120.0


class Row(NamedTuple):
    """Seconds; None: not within BACK_S, or nothing to notice."""

    noticed_s: float | None
    first_success_s: float | None
    slowest_probe_s: float
    num_failed: int
    back_s: float | None


class Probe(NamedTuple):
    began: float  # of time.monotonic()
    ended: float
    answered: bool


class Probes:
    """Requests at a steady rate, whatever became of those before."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._rng = random.Random()
        self.ended: list[Probe] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(self._send(group))
            yield
            sending.cancel()

    async def _send(self, group: asyncio.TaskGroup) -> None:
        while True:
            group.create_task(self._probe())
            await asyncio.sleep(PROBE_S)

    async def _probe(self) -> None:
        prompt = [self._rng.randrange(10, 1000) for _ in range(PROBE_LEN)]
        began = time.monotonic()
        try:
            await self._client.generate(token_ids=prompt, max_tokens=PROBE_TOKENS, ignore_eos=True, timeout_s=60.0)
            answered = True
        except HalfmoonError:
            answered = False
        self.ended.append(Probe(began, time.monotonic(), answered))


async def measured(cluster: LiveCluster, client: AsyncClient, told: Told, kind: str, member_id: str) -> Row:
    probes, known = Probes(client), await cluster.incarnations()
    async with probes.running():
        await asyncio.sleep(4 * PROBE_S)
        noticing = asyncio.create_task(noticed(cluster, told, member_id, known.get(member_id)))
        began, healed = await hurt(cluster, kind, member_id)
        back = await cluster.until(lambda members: is_back(members, known, member_id if kind == "kill" else ""), BACK_S)
        back_s = None if back is None else time.monotonic() - healed
        await asyncio.sleep(2 * PROBE_S)
        noticing.cancel()
    seen = (await asyncio.gather(noticing, return_exceptions=True))[0]
    after = [probe for probe in probes.ended if probe.began >= began]
    return Row(
        noticed_s=seen - began if isinstance(seen, float) else None,
        first_success_s=min((probe.ended - began for probe in after if probe.answered), default=None),
        slowest_probe_s=max(probe.ended - probe.began for probe in after),
        num_failed=sum(not probe.answered for probe in after),
        back_s=back_s,
    )


def is_back(members: dict[str, str], known: dict[str, str], killed: str) -> bool:
    """Whether all are there, of the killed one another process. The proxy is no member: it is back where it tells of the others."""
    return len(members) == NUM_MEMBERS and (killed not in known or members[killed] != known[killed])


async def noticed(cluster: LiveCluster, told: Told, member_id: str, incarnation: str | None) -> float:
    """When; of time.monotonic()."""
    if member_id == "proxy":
        return await told.next(member_id)
    await cluster.until(lambda members: bool(members) and members.get(member_id) != incarnation, BACK_S, 0.02)
    return time.monotonic()


async def hurt(cluster: LiveCluster, kind: str, member_id: str) -> tuple[float, float]:
    """When it began, and from when on it can come back."""
    if kind == "kill":
        await cluster.kill(member_id)
        return (began := time.monotonic()), began
    if kind == "stop":
        async with cluster.stopped(member_id):
            began = time.monotonic()
            await asyncio.sleep(HOLD_S)
        return began, time.monotonic()
    await cluster.wedge(member_id, HOLD_S)
    began = time.monotonic()
    await asyncio.sleep(HOLD_S)
    return began, time.monotonic()


class Told:
    """What the supervisor says of members."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[float]] = {}

    def notify(self, member_id: str, event: str) -> None:
        waiting = self._waiting.pop(member_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(time.monotonic())

    async def next(self, member_id: str) -> float:
        self._waiting[member_id] = asyncio.get_running_loop().create_future()
        return await self._waiting[member_id]


async def recovery(num_rounds: int, kinds: Sequence[str]) -> dict[str, list[Row]]:
    faults = [(kind, member_id) for kind, member_id in FAULTS if kind in kinds]
    told, rows = Told(), {f"{kind} {member_id}": [] for kind, member_id in faults}
    async with live_cluster(configuration(policy="round_robin"), told.notify) as cluster, cluster.client() as client:
        for _ in range(num_rounds):
            for kind, member_id in faults:
                row = await measured(cluster, client, told, kind, member_id)
                rows[f"{kind} {member_id}"].append(row)
                show(f"  {kind} {member_id}: {row}")
    return rows


def table(rows: dict[str, list[Row]]) -> str:
    """Median and largest of the rounds."""
    lines = ["| fault | noticed | first success | slowest probe | failed probes | back |", "|---|---|---|---|---|---|"]
    for name, found in rows.items():
        columns = [spread([row[index] for row in found]) for index in (0, 1, 2)]
        lines.append(
            f"| {name} | {' | '.join(columns)} | {sum(row.num_failed for row in found)} | {spread([row.back_s for row in found])} |"
        )
    return "\n".join(lines)


def spread(seconds: list[float | None]) -> str:
    known = [one for one in seconds if one is not None]
    if len(known) < len(seconds):
        return "never" if not known else f"never in {len(seconds) - len(known)} of {len(seconds)}"
    return f"{statistics.median(known):.2f} s" + (f" ({max(known):.2f})" if len(known) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--faults", default="kill,stop,wedge")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = asyncio.run(recovery(options.rounds, options.faults.split(",")))
    show(table(rows))
    if options.out:
        found = {"rows": {name: [row._asdict() for row in found] for name, found in rows.items()}, "environment": environment()}
        found["environment"] |= {name: version(name) for name in ("ray", "grpcio")} | {"python": platform.python_version()}
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

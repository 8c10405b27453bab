"""Clients of a soak: a closed loop of requests with known answers over three faces, some of which misbehave.

request ─► grpc · sse · json ─► tokens as they come ─► compared with the answer, whatever else becomes of it
           leave · slow · cancel · deadline · malformed: what the client does to it
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from known_answers import Case
from measure import show

from halfmoon.client import AsyncClient, Delta
from halfmoon.protocol.errors import DeadlineExceeded, HalfmoonError, InvalidRequest, RequestCancelled

CLIENT_FAULTS = ("leave", "slow", "cancel", "deadline", "malformed")
FACES = ("grpc", "sse", "json")
TIMEOUT_S, GRACE_S = 120.0, 5.0  # a request's own; beyond which it hangs
MALFORMED: tuple[dict[str, Any], ...] = (
    {"prompt": []},
    {"prompt": [10**9]},
    {"prompt": [11], "max_tokens": 10**7},
    {"prompt": [11], "temperature": -1},
    {"prompt": [11], "top_p": 1e-46, "temperature": 1.0},
    {"prompt": [11], "repetition_penalty": 1e-38},
    {"prompt": [11], "n": 0},
)


class Failure(NamedTuple):
    """A request that ended with an error which its client did not cause."""

    began: float  # of time.monotonic()
    ended: float
    what: str


class Refused(Exception):
    """An HTTP status that is not 200."""


class Load:
    """num_streams clients, each of which sends a request when its last one has ended.

    Args:
        kinds: faults that clients may commit.
        share: of requests that have one.
    """

    def __init__(
        self, grpc_address: str, http_address: str, cases: Sequence[Case], kinds: Sequence[str], share: float, rng: random.Random
    ) -> None:
        self._grpc_address = grpc_address
        self._cases, self._kinds, self._share, self._rng = cases, kinds, share if kinds else 0.0, rng
        self._http = httpx.AsyncClient(base_url=f"http://{http_address}", timeout=None, limits=httpx.Limits(max_connections=None))
        self._open = asyncio.Event()
        self._open.set()
        self._num_under_way = 0
        self._idle = asyncio.Event()
        self.faults: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.hangs: list[str] = []
        self.failures: list[Failure] = []
        self.num_tokens = 0
        self.num_replayed = 0
        self.longest_s = 0.0

    @asynccontextmanager
    async def running(self, num_streams: int) -> AsyncIterator[None]:
        async with AsyncClient(self._grpc_address) as client, asyncio.TaskGroup() as group:
            streams = [group.create_task(self._stream(client)) for _ in range(num_streams)]
            try:
                yield
            finally:
                await self.paused()
                for stream in streams:
                    stream.cancel()
        await self._http.aclose()

    async def paused(self) -> None:
        """Returns once no request is under way, and none begins before resume()."""
        self._open.clear()
        if self._num_under_way:
            self._idle.clear()
            await self._idle.wait()

    def resume(self) -> None:
        self._open.set()

    async def _stream(self, client: AsyncClient) -> None:
        while True:
            await self._open.wait()
            self._num_under_way += 1
            try:
                await self._request(client)
            finally:
                self._num_under_way -= 1
                if not self._num_under_way:
                    self._idle.set()

    async def _request(self, client: AsyncClient) -> None:
        case, face = self._rng.choice(self._cases), self._rng.choice(FACES)
        fault = self._rng.choice(self._kinds) if self._rng.random() < self._share else ""
        if fault in ("cancel", "deadline"):
            face = "grpc"
        began = time.monotonic()
        work = self._malformed() if fault == "malformed" else getattr(self, f"_{face}")(client, case, fault)
        task = asyncio.ensure_future(work)
        left = fault == "leave" and not (await asyncio.wait({task}, timeout=self._patience_s()))[0]
        if left:
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=TIMEOUT_S + GRACE_S)
        if fault and (fault != "leave" or left):
            self.faults[fault] += 1
        if not done:
            self.hangs.append(f"{face} {fault}, prompt of {len(case.prompt)}")
            show(f"HANG {self.hangs[-1]}")
            task.cancel()
        await self._ended(task, face, fault, began)

    def _patience_s(self) -> float:
        """A millisecond is before the placement, a hundred in a prefix load or a prefill, seconds in the answer."""
        return 10 ** self._rng.uniform(-3.0, 0.5)

    async def _ended(self, task: asyncio.Future[Any], face: str, fault: str, began: float) -> None:
        ended, outcome = time.monotonic(), "right"
        self.longest_s = max(self.longest_s, ended - began)
        try:
            await task
        except asyncio.CancelledError:
            outcome = "left" if fault == "leave" else "hung"
        except (HalfmoonError, Refused, httpx.HTTPError) as error:
            outcome = getattr(error, "code", type(error).__name__)
            if not _asked_for(error, fault):
                outcome += ", not asked for"
                what = f"{face} {fault or 'sound'}: {type(error).__name__}: {error}"[:800]
                self.failures.append(Failure(began, ended, what))
        self.ended[outcome] += 1

    # faces

    async def _grpc(self, client: AsyncClient, case: Case, fault: str) -> None:
        timeout_s = 10 ** self._rng.uniform(-2.5, 0.0) if fault == "deadline" else TIMEOUT_S
        stream = client.stream(
            token_ids=list(case.prompt), max_tokens=len(case.answer), ignore_eos=True, timeout_s=timeout_s, **case.sampling
        )
        token_ids: list[int] = []
        cancelling = self._cancel_later(client, stream) if fault == "cancel" else None
        try:
            async for event in stream:
                token_ids += event.token_ids if isinstance(event, Delta) else ()
                await self._linger(fault)
            phases = (await stream.completion()).phases
            self.num_replayed += phases.num_attempts > 1
            self._check(case, token_ids, f"grpc {fault}, {phases.num_attempts} attempts, {phases.placement_reason}", whole=True)
        finally:
            stream.close()
            if cancelling is not None:
                cancelling.cancel()
            self._check(case, token_ids, f"grpc {fault}", whole=False)

    def _cancel_later(self, client: AsyncClient, stream: Any) -> asyncio.Task[None]:
        async def cancel() -> None:
            await asyncio.sleep(self._patience_s())
            if stream.request_id is not None:
                with contextlib.suppress(HalfmoonError):
                    await client.cancel(stream.request_id)

        return asyncio.create_task(cancel())

    def _body(self, case: Case, *, stream: bool) -> dict[str, Any]:
        return {"prompt": list(case.prompt), "max_tokens": len(case.answer), "ignore_eos": True, "stream": stream, **case.sampling}

    async def _sse(self, client: AsyncClient, case: Case, fault: str) -> None:
        text, done = "", False
        async with self._http.stream("POST", "/v1/completions", json=self._body(case, stream=True)) as response:
            if response.status_code != 200:
                raise Refused(f"{response.status_code} {(await response.aread()).decode()[:600]}")
            try:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise Refused(f"in the stream: {chunk['error']}")
                        text += chunk["choices"][0]["text"] if chunk["choices"] else ""
                    await self._linger(fault)
            finally:
                self._check_text(case, text, f"sse {fault}", whole=done)
            if not done:
                raise Refused("the stream ended without [DONE]")

    async def _json(self, client: AsyncClient, case: Case, fault: str) -> None:
        response = await self._http.post("/v1/completions", json=self._body(case, stream=False))
        if response.status_code != 200:
            raise Refused(f"{response.status_code} {response.text[:600]}")
        self._check_text(case, response.json()["choices"][0]["text"], "json", whole=True)

    async def _malformed(self) -> None:
        body = {"max_tokens": 4, **self._rng.choice(MALFORMED)}
        response = await self._http.post("/v1/completions", json=body)
        if response.status_code != 400:
            raise Refused(f"{body} got {response.status_code} {response.text[:200]}")

    async def _linger(self, fault: str) -> None:
        if fault == "slow" and self._rng.random() < 0.2:
            await asyncio.sleep(0.3 * self._rng.random())

    # verdicts

    def _check(self, case: Case, found: Sequence[int], where: str, *, whole: bool) -> None:
        """whole: it has to be all of the answer, or else a beginning of it."""
        self.num_tokens += len(found) if not whole else 0
        if tuple(found) == case.answer or (not whole and tuple(found) == case.answer[: len(found)]):
            return
        pairs = zip(found, case.answer, strict=False)
        at = next((index for index, (one, right) in enumerate(pairs) if one != right), min(len(found), len(case.answer)))
        self._told_wrong(
            f"{where}: prompt of {len(case.prompt)}, seed {case.seed}: {len(found)} of {len(case.answer)} tokens, differs at {at}"
        )

    def _check_text(self, case: Case, found: str, where: str, *, whole: bool) -> None:
        if found == case.text or (not whole and case.text.startswith(found)):
            return
        self._told_wrong(f"{where}: prompt of {len(case.prompt)}, seed {case.seed}: {found[-40:]!r} for {case.text[-40:]!r}")

    def _told_wrong(self, what: str) -> None:
        self.wrong.append(what)
        show(f"WRONG {what}")


def _asked_for(error: Exception, fault: str) -> bool:
    """Whether the client's own fault explains it."""
    if fault == "deadline":
        return isinstance(error, DeadlineExceeded)
    if fault == "cancel":
        return isinstance(error, (RequestCancelled, InvalidRequest))
    return False

"""Sends a request to an endpoint and reads its stream into a Sample. Every request ends in exactly one class.

ok         the stream came to its end
refused    429; Retry-After is noted, and nothing is sent again
error      any other status, an error in the stream, a stream that breaks off, no connection
timed_out  not over within the limit; the connection is closed
cancelled  the client left on purpose, half-way
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from ...protocol.errors import ConfigError
from .chunks import ChunkReader, error_text
from .plan import LoadRequest
from .sample import Sample
from .sse import EventParser
from .words import to_text

KEEPALIVE_S = 2.0  # shorter than servers keep idle connections (uvicorn: 5 s)
MAX_ERROR_BYTES = 2000

Api = Literal["completions", "chat"]
Prompts = Literal["tokens", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendOptions:
    model: str
    api: Api = "completions"
    prompts: Prompts = "tokens"
    timeout_s: float = 600.0
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    api_key: str = ""

    def __post_init__(self) -> None:
        if self.api not in ("completions", "chat") or self.prompts not in ("tokens", "text"):
            raise ConfigError(f"api {self.api!r} and prompts {self.prompts!r}; choose of completions, chat and of tokens, text")
        if self.api == "chat" and self.prompts == "tokens":
            raise ConfigError("chat takes text and no token ids: --prompts text")
        if self.timeout_s <= 0:
            raise ConfigError(f"a time-out of {self.timeout_s:g} s ends every request; it must be above 0")


def encode_body(request: LoadRequest, options: SendOptions) -> bytes:
    """Encodes the bodies before the run, because a long prompt takes milliseconds."""
    body: dict[str, Any] = {
        "model": options.model, "max_tokens": request.num_output_tokens, "temperature": 0.0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.api == "chat":
        body["messages"] = [{"role": "user", "content": to_text(request.token_ids)}]
    else:
        body["prompt"] = request.token_ids.tolist() if options.prompts == "tokens" else to_text(request.token_ids)
    return json.dumps(body | dict(options.extra_body)).encode()


class Sender:
    """
    Args:
        urls: of the endpoints, with or without "/v1" at the end.
        run_id: begins every request's x-request-id.
    """

    def __init__(self, session: aiohttp.ClientSession, urls: Sequence[str], options: SendOptions, run_id: str) -> None:
        path = "/chat/completions" if options.api == "chat" else "/completions"
        self._session = session
        self._urls = [base_url(url) + path for url in urls]
        self._options = options
        self._run_id = run_id
        self._headers = {"content-type": "application/json", **authorization(options.api_key)}

    @property
    def num_endpoints(self) -> int:
        return len(self._urls)

    def body(self, request: LoadRequest) -> bytes:
        return encode_body(request, self._options)

    async def send(self, request: LoadRequest, body: bytes, endpoint: int, late_s: float) -> Sample:
        """Never raises for anything that the server does. Cancelling the task closes the connection."""
        sample = Sample(
            request.index, f"{self._run_id}-{request.index}", endpoint, request.due_s, late_s, len(request.token_ids),
            request.num_output_tokens, request.measured,
        )  # fmt: skip
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._exchange(request, body, sample, sent)
        except TimeoutError:
            sample.outcome, sample.error = "timed_out", f"not over after {self._options.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            sample.outcome, sample.error = "error", f"{type(error).__name__}: {error}"[:500]
        sample.e2e_s = time.perf_counter() - sent
        return sample

    async def _exchange(self, request: LoadRequest, body: bytes, sample: Sample, sent: float) -> None:
        headers = self._headers | {"x-request-id": sample.request_id}
        async with self._session.post(self._urls[sample.endpoint], data=body, headers=headers) as response:
            sample.status = response.status
            if response.status != 200:
                await _refused(response, sample)
                return
            parser, reader = EventParser(), ChunkReader(sample)
            async for data in response.content.iter_any():
                now_s = time.perf_counter() - sent
                for event in parser.feed(data):
                    reader.take(event, now_s)
                if request.cancel_after is not None and len(sample.arrivals_s) >= request.cancel_after:
                    sample.outcome = "cancelled"
                    response.close()
                    return
        if sample.error:
            sample.outcome = "error"
        elif not reader.done and not sample.finish_reason:
            sample.outcome, sample.error = "error", "the stream ended without [DONE] and without a finish_reason"
        elif not sample.arrivals_s:
            sample.outcome, sample.error = "error", "the stream ended without a token"
        else:
            sample.outcome = "ok"


async def _refused(response: aiohttp.ClientResponse, sample: Sample) -> None:
    text = (await response.content.read(MAX_ERROR_BYTES)).decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        body = json.loads(text)
        text = error_text(body.get("error") or body)
    sample.error = f"{response.status}: {text}"[:500]
    sample.outcome = "refused" if response.status == 429 else "error"
    # a date is allowed too, but no inference server sends one
    with contextlib.suppress(ValueError):
        sample.retry_after_s = float(response.headers["retry-after"]) if "retry-after" in response.headers else None


@asynccontextmanager
async def open_session() -> AsyncGenerator[aiohttp.ClientSession, None]:
    """A session without limits of its own on connections or time."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
        yield session


def base_url(url: str) -> str:
    """ "127.0.0.1:8000" -> "http://127.0.0.1:8000/v1"."""
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def authorization(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}

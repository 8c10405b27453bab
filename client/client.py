"""The SDK for threads: Client("host:port"). client/async_client.py is its mirror image for asyncio.

Client ── generate() ─► Completion
       ── stream()   ─► Stream ─► Admitted, Delta …, Finished     left early: cancelled in the whole cluster
       ── models() · cancel() · status() · explain()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, Unpack

import grpc

from ..protocol.channel import channel_credentials
from ..protocol.credentials import Credentials
from ..protocol.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from .access import Control, Metadata, checked_address, key_metadata, require_control
from .attempts import Attempts, ClosedFlag
from .cluster_status import ClusterStatus, Model
from .completion import Collector, Completion, Delta, Event, event_from_proto
from .explanation import Explanation
from .helper_thread import HelperThread
from .options import GenerateOptions, build_request, checked_timeout_s, with_options

CALL_TIMEOUT_S = 10.0
Reply = TypeVar("Reply")


class Stream(Iterator[Event]):
    """The events of one request. Closing it, leaving its `with`, dropping it, or Ctrl-C while it is read cancels the request everywhere."""

    def __init__(
        self,
        stub: Any,
        request: inference_pb2.GenerateRequest,
        peer: str,
        client: ClosedFlag,
        helper: HelperThread,
        metadata: Metadata = (),
    ) -> None:
        self._stub = stub
        self._helper = helper
        self._metadata = metadata
        self._client = client
        self._request = request
        self._attempts = Attempts(peer, request.timeout_s if request.HasField("timeout_s") else None)
        self._collector = Collector()
        self._closed = False
        self._call = self._start()

    @property
    def request_id(self) -> str | None:
        """None before the first event."""
        return self._collector.admitted.request_id if self._collector.admitted else None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        """Raises an error of protocol/errors.py."""
        while not self._closed:
            try:
                event = event_from_proto(self._helper.run(next, self._call))
            except StopIteration:
                self._closed = True
            except grpc.RpcError as error:
                if self._closed:  # by another thread, while this one waited
                    break
                time.sleep(self._attempts.delay_after(error, replied=self._collector.admitted is not None))
                self._call = self._start()
            except BaseException:  # of a signal's handler: the event that was awaited is lost
                self.close()
                raise
            else:
                self._collector.add(event)
                return event
        raise StopIteration

    def text(self) -> Iterator[str]:
        """The new text only, piece by piece. For requests of one choice."""
        try:
            for event in self:
                if isinstance(event, Delta) and event.text:
                    yield event.text
        finally:
            self.close()

    def completion(self) -> Completion:
        """Reads to the end what has not been read. Raises ValueError for a stream that was closed early."""
        for _ in self:
            pass
        return self._collector.completion()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._helper.run(self._call.cancel)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call") and not self._closed:  # an __init__ that failed leaves none
            self._call.cancel()  # by itself: at Python's exit no other thread runs

    def _start(self) -> Any:
        self._client.require_open()
        remaining_s = self._attempts.remaining_s
        if remaining_s is not None:
            self._request.timeout_s = remaining_s
        return self._helper.run(self._stub.Generate, self._request, timeout=self._attempts.call_timeout_s, metadata=self._metadata)


class Client:
    """Thread-safe. Connects on first use. Once closed, every call raises RuntimeError. Raises ConfigError for what is no address.

    Args:
        address: "host:port" of the proxy's gRPC face.
        api_key: where the cluster has keys.
        authority: PEM of who signed the front's certificate, where it has TLS; b"": one that this machine trusts. None: it has none.
        control: for status() and explain(), which are for operators.
    """

    def __init__(self, address: str, *, api_key: str = "", authority: bytes | None = None, control: Control | None = None) -> None:
        self.address = checked_address(address)
        self._metadata = key_metadata(api_key)
        self._control = control
        self._closed = ClosedFlag(address)
        self._helper = HelperThread()
        self._channel = _open(address, None, authority)
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)
        self._control_channel = None if control is None else _open(control.address, control.credentials, None)

    @with_options
    def generate(self, **options: Unpack[GenerateOptions]) -> Completion:
        """Raises an error of protocol/errors.py: InvalidRequest, Overloaded, DeadlineExceeded, Unavailable …"""
        with self.stream(**options) as stream:
            return stream.completion()

    @with_options
    def stream(self, **options: Unpack[GenerateOptions]) -> Stream:
        """Raises InvalidRequest at once for a wrong option; anything else comes while it is read."""
        return Stream(self._inference, build_request(options), self.address, self._closed, self._helper, self._metadata)

    def models(self, *, timeout_s: float = CALL_TIMEOUT_S) -> list[Model]:
        reply: inference_pb2.ModelsReply = self._unary(self._inference.Models, inference_pb2.ModelsRequest(), timeout_s)
        return [Model.from_proto(model) for model in reply.models]

    def cancel(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Whether there was such a request under way."""
        reply: inference_pb2.CancelReply = self._unary(
            self._inference.Cancel, inference_pb2.CancelRequest(request_id=request_id), timeout_s
        )
        return reply.found

    def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> ClusterStatus:
        """Raises ConfigError where the client was made without control."""
        return ClusterStatus.from_proto(self._ask("Status", control_pb2.StatusRequest(), timeout_s))

    def explain(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> list[Explanation]:
        """Why a recent request went where it went, or was refused; one for each of its choices. Raises UnknownRequest."""
        request = control_pb2.ExplainRequest(request_id=request_id)
        reply: control_pb2.ExplainReply = self._ask("Explain", request, timeout_s)
        return [Explanation.from_proto(found) for found in reply.requests]

    def close(self) -> None:
        self._closed.set()
        self._helper.run(self._channel.close)
        if self._control_channel is not None:
            self._helper.run(self._control_channel.close)
        self._helper.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, request: Any, timeout_s: float) -> Any:
        """At the proxy's control."""
        self._closed.require_open()
        control = require_control(self._control)
        stub = control_pb2_grpc.ControlStub(self._control_channel)
        return self._call(getattr(stub, method), request, timeout_s, control.address, control.credentials.metadata)

    def _unary(self, method: Callable[..., Reply], request: Any, timeout_s: float) -> Reply:
        return self._call(method, request, timeout_s, self.address, self._metadata)

    def _call(self, method: Callable[..., Reply], request: Any, timeout_s: float, peer: str, metadata: Metadata) -> Reply:
        attempts = Attempts(peer, checked_timeout_s(timeout_s))
        while True:
            self._closed.require_open()
            try:
                return self._helper.run(method, request, timeout=attempts.call_timeout_s, metadata=metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.delay_after(error, replied=False))


def _open(address: str, credentials: Credentials | None, authority: bytes | None) -> grpc.Channel:
    """As open_channel, but the token goes with the calls."""
    secret, options = channel_credentials(credentials, authority)
    return grpc.insecure_channel(address, options) if secret is None else grpc.secure_channel(address, secret, options)

"""Every error that Halfmoon raises on purpose, and the codes it carries across a boundary.

HalfmoonError
├── InvalidRequest              400  the request itself is wrong
│   ├── PromptTooLong           400
│   ├── UnknownModel            404
│   ├── UnknownRequest          404
│   ├── Unauthenticated         401  nobody knows who asks: no key or token, or a wrong one
│   ├── PermissionDenied        403  who asks is known, and may not do this
│   ├── RequestTimeout          408  its bytes did not come in time
│   ├── RequestTooLarge         413  more bytes than a body may have
│   ├── UnsupportedMediaType    415  a body that is no plain JSON
│   └── HeadTooLarge            431  more bytes than a head may have
├── Overloaded                  429  come back after retry_after_s
│   └── RateLimited             429  the tenant has used up its minute; likewise
│       └── QuotaExceeded       429  its day or its month; likewise
├── RequestCancelled            499  the client went away or asked for it
├── DeadlineExceeded            504  the request's own time ran out
├── Unavailable                 503  nothing wrong with the request; part of the cluster is gone
│   ├── NoWorker                503  no live worker of a role
│   ├── WorkerLost              503  a worker died under the request
│   ├── StoreUnavailable        503  a KV store does not answer
│   └── Draining                503  shutting down
├── HandoffError                500  KV that must not be decoded
│   ├── HandoffAborted          500  the other side gave it up; says why
│   ├── HandoffIncomplete       500  blocks, layers or keys are missing
│   ├── HandoffCorrupt          500  a checksum does not match
│   └── StaleEpoch              500  a slice or seal of an attempt that was given up
├── NonFiniteLogits             500  the model gave no numbers for a token of this request
├── SequenceFailed              500  a step broke with this request in it, and not without; another worker may compute it
├── RequestQuarantined          500  two workers broke while they computed this request; it is not tried again
├── SchemaMismatch              500  two sides hold different KV formats
├── StoreFull                   503  no block can be evicted
├── LeaseExpired                500  the lease ended before the call
├── ConfigError                 500  a configuration file or flag is wrong
├── MachineError                500  this machine lacks what a cluster needs: a port, an address, memory, a GPU, Ray
├── CheckpointError             500  a model folder cannot be served
│   └── UnsupportedArchitecture 500
└── InternalError               500  a bug; the log has the traceback

`code` is the class name in snake case; it is what travels (a gRPC trailer, the `code` of OpenAI's error body).
`retryable` says that another worker pair may succeed where this one failed.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import grpc

MAX_MESSAGE_LEN = 2000  # characters; what a message quotes of a request may be of any length
MAX_FIELD_LEN = 500  # likewise


class HalfmoonError(Exception):
    """`fields` are JSON values: what the message says in words, for programs.

    A message is cut at MAX_MESSAGE_LEN, a field at MAX_FIELD_LEN, and what is no Unicode in them is spelled out.
    """

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **fields: Any) -> None:
        self.message = _bounded(message, MAX_MESSAGE_LEN)
        self.fields: dict[str, Any] = {
            name: _bounded(value, MAX_FIELD_LEN) if isinstance(value, str) else value for name, value in fields.items()
        }
        super().__init__(self.message)

    @property
    def code(self) -> str:
        return error_code(type(self))

    @property
    def fields_json(self) -> str:
        return json.dumps(self.fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own form would lose the keyword fields on the way through Ray
        return (build_error, (self.code, self.message, self.fields_json))


class InvalidRequest(HalfmoonError):
    """`param` names the wrong field where there is one."""

    http_status = 400
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT


class PromptTooLong(InvalidRequest):
    pass


class UnknownModel(InvalidRequest):
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND


class UnknownRequest(InvalidRequest):
    http_status = 404
    grpc_status = grpc.StatusCode.NOT_FOUND


class Unauthenticated(InvalidRequest):
    http_status = 401
    grpc_status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(InvalidRequest):
    http_status = 403
    grpc_status = grpc.StatusCode.PERMISSION_DENIED


class RequestTimeout(InvalidRequest):
    http_status = 408


class RequestTooLarge(InvalidRequest):
    http_status = 413


class UnsupportedMediaType(InvalidRequest):
    http_status = 415


class HeadTooLarge(InvalidRequest):
    http_status = 431


class Overloaded(HalfmoonError):
    http_status = 429
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after_s: float = 1.0, **fields: Any) -> None:
        super().__init__(message, retry_after_s=retry_after_s, **fields)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    pass


class QuotaExceeded(RateLimited):
    pass


class RequestCancelled(HalfmoonError):
    http_status = 499
    grpc_status = grpc.StatusCode.CANCELLED


class DeadlineExceeded(HalfmoonError):
    http_status = 504
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(HalfmoonError):
    http_status = 503
    grpc_status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class NoWorker(Unavailable):
    retryable = False


class WorkerLost(Unavailable):
    pass


class StoreUnavailable(Unavailable):
    pass


class Draining(Unavailable):
    retryable = False


class HandoffError(HalfmoonError):
    grpc_status = grpc.StatusCode.ABORTED
    retryable = True


class HandoffAborted(HandoffError):
    pass


class HandoffIncomplete(HandoffError):
    grpc_status = grpc.StatusCode.DATA_LOSS


class HandoffCorrupt(HandoffError):
    grpc_status = grpc.StatusCode.DATA_LOSS


class StaleEpoch(HandoffError):
    pass


class NonFiniteLogits(HalfmoonError):
    pass


class SequenceFailed(HalfmoonError):
    retryable = True


class RequestQuarantined(HalfmoonError):
    pass


class SchemaMismatch(HalfmoonError):
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class StoreFull(HalfmoonError):
    http_status = 503
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class LeaseExpired(HalfmoonError):
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    retryable = True


class ConfigError(HalfmoonError):
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class MachineError(HalfmoonError):
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class CheckpointError(HalfmoonError):
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class UnsupportedArchitecture(CheckpointError):
    pass


class InternalError(HalfmoonError):
    pass


def shown(value: Any, max_len: int = 80) -> str:
    """A value from outside as an error shows it: its repr, cut."""
    text = repr(value)
    return text if len(text) <= max_len else f"{text[: max_len - 3]}..."


def _bounded(text: str, max_len: int) -> str:
    if len(text) > max_len:
        text = f"{text[: max_len - 40]}… ({len(text)} characters in all)"
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair can be quoted, and can't be sent


def error_code(error_type: type[HalfmoonError]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", error_type.__name__).lower()


def _tree(root: type[HalfmoonError]) -> list[type[HalfmoonError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


ERROR_TYPES: dict[str, type[HalfmoonError]] = {error_code(found): found for found in _tree(HalfmoonError)}


def build_error(code: str, message: str, fields_json: str = "{}") -> HalfmoonError:
    """The error that `code` names; a code of a newer version becomes an InternalError that keeps its message.

    Raises InvalidRequest for fields that are no fields of an error: a stranger may have sent them.
    """
    try:
        fields = json.loads(fields_json or "{}")
        return ERROR_TYPES.get(code, InternalError)(message, **fields)
    except (ValueError, TypeError, RecursionError):
        shown = fields_json if len(fields_json) <= 100 else f"{fields_json[:100]}…"
        raise InvalidRequest(f"fields_json is {shown!r}; it must be an object of an error's fields", param="fields_json") from None

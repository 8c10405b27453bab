"""Random bytes and random messages at every method of a gRPC server. Offered as a fixture by conftest.py."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import grpc
import hypothesis
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from hypothesis import HealthCheck
from hypothesis import strategies as st

Metadata = tuple[tuple[str, str], ...]
OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""What a request can't deserve: a fault of the server's, or one that it did not even name."""
NUM_CASES = 8
"""For each method. Thousands go by hand: HALFMOON_FUZZ_CASES."""
PATIENCE_S = 0.1  # for a first reply that may never come

_INTS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def fuzz(address: str, services: Iterable[ServiceDescriptor], skip: frozenset[str] = frozenset(), metadata: Metadata = ()) -> Counter[str]:
    """Calls each method but those in `skip`; how often each status came. Fails at the first that is the server's fault."""
    statuses: Counter[str] = Counter()
    with grpc.insecure_channel(address) as channel:
        for service in services:
            for method in service.methods:
                if method.name not in skip:
                    _fuzz_method(channel, method, statuses, metadata)
    return statuses


def _fuzz_method(channel: grpc.Channel, method: MethodDescriptor, statuses: Counter[str], metadata: Metadata) -> None:
    name = f"/{method.containing_service.full_name}/{method.name}"
    call: Any = channel.stream_stream(name) if method.client_streaming else channel.unary_stream(name)

    @hypothesis.settings(
        max_examples=int(os.environ.get("HALFMOON_FUZZ_CASES", NUM_CASES)),
        derandomize="HALFMOON_FUZZ_CASES" not in os.environ,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @hypothesis.given(st.lists(st.binary(max_size=200) | _contents(method.input_type), min_size=1, max_size=3))
    def ask(contents: list[bytes]) -> None:
        replies = call(iter(contents) if method.client_streaming else contents[0], timeout=PATIENCE_S, metadata=metadata)
        try:
            for _ in itertools.islice(replies, 3):
                pass
            status = grpc.StatusCode.OK
            replies.cancel()
        except grpc.RpcError as error:
            failed: Any = error
            status = failed.code()
            assert status not in OURS, f"{name}: {status.name} {failed.details()} for {contents!r}"
            assert len(failed.details() or "") < 3000
        statuses[status.name] += 1

    ask()


def _contents(kind: Descriptor) -> st.SearchStrategy[bytes]:
    return messages(kind).map(lambda message: message.SerializeToString())


def messages(kind: Descriptor, depth: int = 4) -> st.SearchStrategy[Any]:
    """Messages of this kind with some of their fields set, to anything that the field's type allows."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Any:
        message = message_factory.GetMessageClass(kind)()
        for field in draw(st.lists(st.sampled_from(list(kind.fields)), unique_by=lambda field: field.name)) if kind.fields else ():
            _fill(message, field, draw, depth)
        return message

    return drawn()


def _fill(message: Any, field: Any, draw: st.DrawFn, depth: int) -> None:
    inner = field.message_type
    if inner is not None and depth == 0:
        return
    if inner is not None and inner.GetOptions().map_entry:
        key, value = (_values(inner.fields_by_name[name]) for name in ("key", "value"))
        for found in draw(st.lists(key, max_size=3)):
            getattr(message, field.name)[found] = draw(value)
    elif inner is not None and field.label == FieldDescriptor.LABEL_REPEATED:
        getattr(message, field.name).extend(draw(st.lists(messages(inner, depth - 1), max_size=2)))
    elif inner is not None:
        getattr(message, field.name).CopyFrom(draw(messages(inner, depth - 1)))
    elif field.label == FieldDescriptor.LABEL_REPEATED:
        getattr(message, field.name).extend(draw(st.lists(_values(field), max_size=5)))
    else:
        setattr(message, field.name, draw(_values(field)))


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _INTS:
        least, most = _INTS[kind]
        return st.sampled_from((0, 1, 2, least, most)) | st.integers(max(least, -5), 100) | st.integers(least, most)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return st.sampled_from((0.0, 1.0, -1.0, 1e-300, float("nan"), float("inf"), float("-inf"))) | st.floats(width=32)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=40) | st.binary(min_size=16, max_size=16)
    return st.text(max_size=20) | st.sampled_from(("x" * 5000, "\u20ac" * 5000, "{", "[]", '{"message": 3}', "prefill-0", "request-0"))

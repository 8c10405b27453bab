from halfmoon.protocol.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_STORE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_STORE: Role

class MemberInfo(_message.Message):
    __slots__ = ("id", "incarnation", "role", "address", "metrics_address", "node_id", "store_id", "store_address", "schema", "max_model_len", "kv_capacity_tokens", "pid", "device")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: str
    role: Role
    address: str
    metrics_address: str
    node_id: str
    store_id: str
    store_address: str
    schema: _common_pb2.KVSchema
    max_model_len: int
    kv_capacity_tokens: int
    pid: int
    device: str
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., node_id: _Optional[str] = ..., store_id: _Optional[str] = ..., store_address: _Optional[str] = ..., schema: _Optional[_Union[_common_pb2.KVSchema, _Mapping]] = ..., max_model_len: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class MemberLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_outstanding_tokens", "kv_usage_ratio")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_RATIO_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    kv_usage_ratio: float
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_outstanding_tokens: _Optional[int] = ..., kv_usage_ratio: _Optional[float] = ...) -> None: ...

class MemberReport(_message.Message):
    __slots__ = ("info", "load")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    info: MemberInfo
    load: MemberLoad
    def __init__(self, info: _Optional[_Union[MemberInfo, _Mapping]] = ..., load: _Optional[_Union[MemberLoad, _Mapping]] = ...) -> None: ...

class MemberOrder(_message.Message):
    __slots__ = ("accepted",)
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    def __init__(self, accepted: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("members", "model", "num_queued", "num_running", "draining", "ttft_s", "tpot_s", "outcomes", "up_s")
    class Member(_message.Message):
        __slots__ = ("info", "load", "up_s")
        INFO_FIELD_NUMBER: _ClassVar[int]
        LOAD_FIELD_NUMBER: _ClassVar[int]
        UP_S_FIELD_NUMBER: _ClassVar[int]
        info: MemberInfo
        load: MemberLoad
        up_s: float
        def __init__(self, info: _Optional[_Union[MemberInfo, _Mapping]] = ..., load: _Optional[_Union[MemberLoad, _Mapping]] = ..., up_s: _Optional[float] = ...) -> None: ...
    class Percentiles(_message.Message):
        __slots__ = ("p50", "p90", "p99", "count")
        P50_FIELD_NUMBER: _ClassVar[int]
        P90_FIELD_NUMBER: _ClassVar[int]
        P99_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        p50: float
        p90: float
        p99: float
        count: int
        def __init__(self, p50: _Optional[float] = ..., p90: _Optional[float] = ..., p99: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...
    class OutcomesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    UP_S_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[StatusReply.Member]
    model: str
    num_queued: int
    num_running: int
    draining: bool
    ttft_s: StatusReply.Percentiles
    tpot_s: StatusReply.Percentiles
    outcomes: _containers.ScalarMap[str, int]
    up_s: float
    def __init__(self, members: _Optional[_Iterable[_Union[StatusReply.Member, _Mapping]]] = ..., model: _Optional[str] = ..., num_queued: _Optional[int] = ..., num_running: _Optional[int] = ..., draining: bool = ..., ttft_s: _Optional[_Union[StatusReply.Percentiles, _Mapping]] = ..., tpot_s: _Optional[_Union[StatusReply.Percentiles, _Mapping]] = ..., outcomes: _Optional[_Mapping[str, int]] = ..., up_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("num_left",)
    NUM_LEFT_FIELD_NUMBER: _ClassVar[int]
    num_left: int
    def __init__(self, num_left: _Optional[int] = ...) -> None: ...

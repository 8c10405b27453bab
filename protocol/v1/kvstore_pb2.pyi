from halfmoon.protocol.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("hello", "heartbeat")
    class Hello(_message.Message):
        __slots__ = ("client_id", "node_id", "schema")
        CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
        NODE_ID_FIELD_NUMBER: _ClassVar[int]
        SCHEMA_FIELD_NUMBER: _ClassVar[int]
        client_id: str
        node_id: str
        schema: _common_pb2.KVSchema
        def __init__(self, client_id: _Optional[str] = ..., node_id: _Optional[str] = ..., schema: _Optional[_Union[_common_pb2.KVSchema, _Mapping]] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: AttachRequest.Hello
    heartbeat: bool
    def __init__(self, hello: _Optional[_Union[AttachRequest.Hello, _Mapping]] = ..., heartbeat: bool = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("welcome", "heartbeat")
    class Welcome(_message.Message):
        __slots__ = ("session_id", "store_id", "lease_ttl_s", "heartbeat_interval_s", "arena", "data")
        SESSION_ID_FIELD_NUMBER: _ClassVar[int]
        STORE_ID_FIELD_NUMBER: _ClassVar[int]
        LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
        HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
        ARENA_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        session_id: str
        store_id: str
        lease_ttl_s: float
        heartbeat_interval_s: float
        arena: AttachReply.Arena
        data: AttachReply.Data
        def __init__(self, session_id: _Optional[str] = ..., store_id: _Optional[str] = ..., lease_ttl_s: _Optional[float] = ..., heartbeat_interval_s: _Optional[float] = ..., arena: _Optional[_Union[AttachReply.Arena, _Mapping]] = ..., data: _Optional[_Union[AttachReply.Data, _Mapping]] = ...) -> None: ...
    class Arena(_message.Message):
        __slots__ = ("path", "num_bytes", "token", "data_offset", "slot_bytes", "num_slots")
        PATH_FIELD_NUMBER: _ClassVar[int]
        NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        DATA_OFFSET_FIELD_NUMBER: _ClassVar[int]
        SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
        NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
        path: str
        num_bytes: int
        token: bytes
        data_offset: int
        slot_bytes: int
        num_slots: int
        def __init__(self, path: _Optional[str] = ..., num_bytes: _Optional[int] = ..., token: _Optional[bytes] = ..., data_offset: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., num_slots: _Optional[int] = ...) -> None: ...
    class Data(_message.Message):
        __slots__ = ("port", "token")
        PORT_FIELD_NUMBER: _ClassVar[int]
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        port: int
        token: bytes
        def __init__(self, port: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    welcome: AttachReply.Welcome
    heartbeat: bool
    def __init__(self, welcome: _Optional[_Union[AttachReply.Welcome, _Mapping]] = ..., heartbeat: bool = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session_id", "purpose", "handoff", "block_keys", "num_blocks", "deadline_s")
    class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PURPOSE_UNSPECIFIED: _ClassVar[ReserveRequest.Purpose]
        PURPOSE_HANDOFF: _ClassVar[ReserveRequest.Purpose]
        PURPOSE_CACHE: _ClassVar[ReserveRequest.Purpose]
    PURPOSE_UNSPECIFIED: ReserveRequest.Purpose
    PURPOSE_HANDOFF: ReserveRequest.Purpose
    PURPOSE_CACHE: ReserveRequest.Purpose
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    purpose: ReserveRequest.Purpose
    handoff: _common_pb2.HandoffId
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    num_blocks: int
    deadline_s: float
    def __init__(self, session_id: _Optional[str] = ..., purpose: _Optional[_Union[ReserveRequest.Purpose, str]] = ..., handoff: _Optional[_Union[_common_pb2.HandoffId, _Mapping]] = ..., block_keys: _Optional[_Iterable[bytes]] = ..., num_blocks: _Optional[int] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("lease_id", "slots", "present")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    slots: _containers.RepeatedScalarFieldContainer[int]
    present: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, lease_id: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ..., present: _Optional[_Iterable[bool]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("lease_id", "layer", "first_block", "num_blocks", "data", "num_layers")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    layer: int
    first_block: int
    num_blocks: int
    data: bytes
    num_layers: int
    def __init__(self, lease_id: _Optional[str] = ..., layer: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., data: _Optional[bytes] = ..., num_layers: _Optional[int] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class SealRequest(_message.Message):
    __slots__ = ("lease_id", "state", "checksums")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    state: _common_pb2.HandoffState
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[str] = ..., state: _Optional[_Union[_common_pb2.HandoffState, _Mapping]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class SealReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("session_id", "handoff", "prefix", "deadline_s", "ssd", "compute_s", "without_data")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_DATA_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    handoff: _common_pb2.HandoffId
    prefix: BlockKeys
    deadline_s: float
    ssd: _common_pb2.SsdUse
    compute_s: float
    without_data: bool
    def __init__(self, session_id: _Optional[str] = ..., handoff: _Optional[_Union[_common_pb2.HandoffId, _Mapping]] = ..., prefix: _Optional[_Union[BlockKeys, _Mapping]] = ..., deadline_s: _Optional[float] = ..., ssd: _Optional[_Union[_common_pb2.SsdUse, str]] = ..., compute_s: _Optional[float] = ..., without_data: bool = ...) -> None: ...

class BlockKeys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FetchReply(_message.Message):
    __slots__ = ("layout", "slice", "sealed")
    class Layout(_message.Message):
        __slots__ = ("lease_id", "slots", "block_keys", "num_blocks", "ssd_wait_s", "num_ssd_blocks")
        LEASE_ID_FIELD_NUMBER: _ClassVar[int]
        SLOTS_FIELD_NUMBER: _ClassVar[int]
        BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
        NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        SSD_WAIT_S_FIELD_NUMBER: _ClassVar[int]
        NUM_SSD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        lease_id: str
        slots: _containers.RepeatedScalarFieldContainer[int]
        block_keys: _containers.RepeatedScalarFieldContainer[bytes]
        num_blocks: int
        ssd_wait_s: float
        num_ssd_blocks: int
        def __init__(self, lease_id: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ..., block_keys: _Optional[_Iterable[bytes]] = ..., num_blocks: _Optional[int] = ..., ssd_wait_s: _Optional[float] = ..., num_ssd_blocks: _Optional[int] = ...) -> None: ...
    class Slice(_message.Message):
        __slots__ = ("layer", "first_block", "num_blocks", "data", "num_layers")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
        NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        DATA_FIELD_NUMBER: _ClassVar[int]
        NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
        layer: int
        first_block: int
        num_blocks: int
        data: bytes
        num_layers: int
        def __init__(self, layer: _Optional[int] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., data: _Optional[bytes] = ..., num_layers: _Optional[int] = ...) -> None: ...
    class Sealed(_message.Message):
        __slots__ = ("state", "checksums")
        STATE_FIELD_NUMBER: _ClassVar[int]
        CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
        state: _common_pb2.HandoffState
        checksums: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, state: _Optional[_Union[_common_pb2.HandoffState, _Mapping]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    layout: FetchReply.Layout
    slice: FetchReply.Slice
    sealed: FetchReply.Sealed
    def __init__(self, layout: _Optional[_Union[FetchReply.Layout, _Mapping]] = ..., slice: _Optional[_Union[FetchReply.Slice, _Mapping]] = ..., sealed: _Optional[_Union[FetchReply.Sealed, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("handoff", "reason")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handoff: _common_pb2.HandoffId
    reason: _common_pb2.Error
    def __init__(self, handoff: _Optional[_Union[_common_pb2.HandoffId, _Mapping]] = ..., reason: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: bool = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_id", "corrupt_blocks")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    corrupt_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[str] = ..., corrupt_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("block_keys",)
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, block_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("num_blocks", "num_blocks_dram")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_DRAM_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_blocks_dram: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_blocks_dram: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ("sequence", "snapshot", "stored", "evicted", "demoted", "promoted")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    DEMOTED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    snapshot: bool
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    evicted: _containers.RepeatedScalarFieldContainer[bytes]
    demoted: _containers.RepeatedScalarFieldContainer[bytes]
    promoted: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, sequence: _Optional[int] = ..., snapshot: bool = ..., stored: _Optional[_Iterable[bytes]] = ..., evicted: _Optional[_Iterable[bytes]] = ..., demoted: _Optional[_Iterable[bytes]] = ..., promoted: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("block_keys", "source_address", "deadline_s")
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    source_address: str
    deadline_s: float
    def __init__(self, block_keys: _Optional[_Iterable[bytes]] = ..., source_address: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class ReplicateReply(_message.Message):
    __slots__ = ("num_blocks", "num_bytes", "num_held", "stop", "seconds", "num_bytes_wanted", "num_ssd_blocks")
    class Stop(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STOP_UNSPECIFIED: _ClassVar[ReplicateReply.Stop]
        STOP_COMPLETE: _ClassVar[ReplicateReply.Stop]
        STOP_SOURCE: _ClassVar[ReplicateReply.Stop]
        STOP_NO_ROOM: _ClassVar[ReplicateReply.Stop]
    STOP_UNSPECIFIED: ReplicateReply.Stop
    STOP_COMPLETE: ReplicateReply.Stop
    STOP_SOURCE: ReplicateReply.Stop
    STOP_NO_ROOM: ReplicateReply.Stop
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_WANTED_FIELD_NUMBER: _ClassVar[int]
    NUM_SSD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_bytes: int
    num_held: int
    stop: ReplicateReply.Stop
    seconds: float
    num_bytes_wanted: int
    num_ssd_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_held: _Optional[int] = ..., stop: _Optional[_Union[ReplicateReply.Stop, str]] = ..., seconds: _Optional[float] = ..., num_bytes_wanted: _Optional[int] = ..., num_ssd_blocks: _Optional[int] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("block_keys",)
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    block_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, block_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PromoteReply(_message.Message):
    __slots__ = ("num_blocks", "wait_s")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    wait_s: float
    def __init__(self, num_blocks: _Optional[int] = ..., wait_s: _Optional[float] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("store_id", "num_bytes_arena", "num_bytes_leased", "num_bytes_cached", "num_bytes_free", "num_leases", "num_handoffs", "num_sessions", "num_evicted_blocks", "num_expired_leases", "num_bytes_pushed", "num_bytes_fetched", "num_query_blocks", "num_hit_blocks", "num_bytes_ssd", "num_bytes_ssd_used", "schema")
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_ARENA_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_LEASED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPIRED_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_PUSHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    NUM_QUERY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_SSD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_SSD_USED_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    store_id: str
    num_bytes_arena: int
    num_bytes_leased: int
    num_bytes_cached: int
    num_bytes_free: int
    num_leases: int
    num_handoffs: int
    num_sessions: int
    num_evicted_blocks: int
    num_expired_leases: int
    num_bytes_pushed: int
    num_bytes_fetched: int
    num_query_blocks: int
    num_hit_blocks: int
    num_bytes_ssd: int
    num_bytes_ssd_used: int
    schema: _common_pb2.KVSchema
    def __init__(self, store_id: _Optional[str] = ..., num_bytes_arena: _Optional[int] = ..., num_bytes_leased: _Optional[int] = ..., num_bytes_cached: _Optional[int] = ..., num_bytes_free: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_handoffs: _Optional[int] = ..., num_sessions: _Optional[int] = ..., num_evicted_blocks: _Optional[int] = ..., num_expired_leases: _Optional[int] = ..., num_bytes_pushed: _Optional[int] = ..., num_bytes_fetched: _Optional[int] = ..., num_query_blocks: _Optional[int] = ..., num_hit_blocks: _Optional[int] = ..., num_bytes_ssd: _Optional[int] = ..., num_bytes_ssd_used: _Optional[int] = ..., schema: _Optional[_Union[_common_pb2.KVSchema, _Mapping]] = ...) -> None: ...

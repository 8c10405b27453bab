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
    ROLE_BOTH: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_STORE: Role
ROLE_BOTH: Role

class MemberInfo(_message.Message):
    __slots__ = ("id", "incarnation", "role", "address", "metrics_address", "node_id", "store_id", "store_address", "schema", "max_model_len", "kv_capacity_tokens", "pid", "device", "roles", "step_limits")
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
    ROLES_FIELD_NUMBER: _ClassVar[int]
    STEP_LIMITS_FIELD_NUMBER: _ClassVar[int]
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
    roles: _containers.RepeatedScalarFieldContainer[Role]
    step_limits: StepLimits
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., node_id: _Optional[str] = ..., store_id: _Optional[str] = ..., store_address: _Optional[str] = ..., schema: _Optional[_Union[_common_pb2.KVSchema, _Mapping]] = ..., max_model_len: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., roles: _Optional[_Iterable[_Union[Role, str]]] = ..., step_limits: _Optional[_Union[StepLimits, _Mapping]] = ...) -> None: ...

class StepLimits(_message.Message):
    __slots__ = ("max_tokens", "max_tokens_beside", "tpot_target_s")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_BESIDE_FIELD_NUMBER: _ClassVar[int]
    TPOT_TARGET_S_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    max_tokens_beside: int
    tpot_target_s: float
    def __init__(self, max_tokens: _Optional[int] = ..., max_tokens_beside: _Optional[int] = ..., tpot_target_s: _Optional[float] = ...) -> None: ...

class MemberLoad(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_outstanding_tokens", "kv_usage_ratio", "steps", "num_prefill_tokens", "num_cached_pages", "step_age_s", "step_expected_s", "transfer_age_s", "kv_leased_ratio", "ssd_bytes", "ssd_used_bytes")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_RATIO_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_EXPECTED_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_AGE_S_FIELD_NUMBER: _ClassVar[int]
    KV_LEASED_RATIO_FIELD_NUMBER: _ClassVar[int]
    SSD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SSD_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    kv_usage_ratio: float
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    num_prefill_tokens: int
    num_cached_pages: int
    step_age_s: float
    step_expected_s: float
    transfer_age_s: float
    kv_leased_ratio: float
    ssd_bytes: int
    ssd_used_bytes: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_outstanding_tokens: _Optional[int] = ..., kv_usage_ratio: _Optional[float] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., num_prefill_tokens: _Optional[int] = ..., num_cached_pages: _Optional[int] = ..., step_age_s: _Optional[float] = ..., step_expected_s: _Optional[float] = ..., transfer_age_s: _Optional[float] = ..., kv_leased_ratio: _Optional[float] = ..., ssd_bytes: _Optional[int] = ..., ssd_used_bytes: _Optional[int] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("num_sequences", "num_kv_tokens", "num_prefill_tokens", "seconds", "prefill_attention")
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    num_sequences: int
    num_kv_tokens: int
    num_prefill_tokens: int
    seconds: float
    prefill_attention: float
    def __init__(self, num_sequences: _Optional[int] = ..., num_kv_tokens: _Optional[int] = ..., num_prefill_tokens: _Optional[int] = ..., seconds: _Optional[float] = ..., prefill_attention: _Optional[float] = ...) -> None: ...

class MemberReport(_message.Message):
    __slots__ = ("info", "load", "role", "answer", "prefixes", "broken")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    BROKEN_FIELD_NUMBER: _ClassVar[int]
    info: MemberInfo
    load: MemberLoad
    role: Role
    answer: OrderAnswer
    prefixes: PrefixChange
    broken: Broken
    def __init__(self, info: _Optional[_Union[MemberInfo, _Mapping]] = ..., load: _Optional[_Union[MemberLoad, _Mapping]] = ..., role: _Optional[_Union[Role, str]] = ..., answer: _Optional[_Union[OrderAnswer, _Mapping]] = ..., prefixes: _Optional[_Union[PrefixChange, _Mapping]] = ..., broken: _Optional[_Union[Broken, _Mapping]] = ...) -> None: ...

class PrefixChange(_message.Message):
    __slots__ = ("number", "whole", "added", "removed")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    number: int
    whole: bool
    added: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, number: _Optional[int] = ..., whole: bool = ..., added: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Broken(_message.Message):
    __slots__ = ("reason", "request_ids")
    REASON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reason: _Optional[str] = ..., request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class OrderAnswer(_message.Message):
    __slots__ = ("number", "refusal")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    number: int
    refusal: _common_pb2.Error
    def __init__(self, number: _Optional[int] = ..., refusal: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class MemberOrder(_message.Message):
    __slots__ = ("accepted", "number", "role", "tell_prefixes", "stores")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TELL_PREFIXES_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    number: int
    role: Role
    tell_prefixes: bool
    stores: MemberStores
    def __init__(self, accepted: bool = ..., number: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., tell_prefixes: bool = ..., stores: _Optional[_Union[MemberStores, _Mapping]] = ...) -> None: ...

class MemberStores(_message.Message):
    __slots__ = ("addresses",)
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class MemberIdsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemberIdsReply(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("members", "model", "num_queued", "num_running", "draining", "ttft_s", "tpot_s", "outcomes", "up_s", "policy", "admission", "order", "prediction_errors", "rejections", "num_in_slo", "num_outside_slo", "absences", "role_changes")
    class Member(_message.Message):
        __slots__ = ("info", "load", "up_s", "role", "silent_s", "avoided", "role_reason")
        INFO_FIELD_NUMBER: _ClassVar[int]
        LOAD_FIELD_NUMBER: _ClassVar[int]
        UP_S_FIELD_NUMBER: _ClassVar[int]
        ROLE_FIELD_NUMBER: _ClassVar[int]
        SILENT_S_FIELD_NUMBER: _ClassVar[int]
        AVOIDED_FIELD_NUMBER: _ClassVar[int]
        ROLE_REASON_FIELD_NUMBER: _ClassVar[int]
        info: MemberInfo
        load: MemberLoad
        up_s: float
        role: Role
        silent_s: float
        avoided: bool
        role_reason: str
        def __init__(self, info: _Optional[_Union[MemberInfo, _Mapping]] = ..., load: _Optional[_Union[MemberLoad, _Mapping]] = ..., up_s: _Optional[float] = ..., role: _Optional[_Union[Role, str]] = ..., silent_s: _Optional[float] = ..., avoided: bool = ..., role_reason: _Optional[str] = ...) -> None: ...
    class Absence(_message.Message):
        __slots__ = ("info", "why", "for_s")
        INFO_FIELD_NUMBER: _ClassVar[int]
        WHY_FIELD_NUMBER: _ClassVar[int]
        FOR_S_FIELD_NUMBER: _ClassVar[int]
        info: MemberInfo
        why: str
        for_s: float
        def __init__(self, info: _Optional[_Union[MemberInfo, _Mapping]] = ..., why: _Optional[str] = ..., for_s: _Optional[float] = ...) -> None: ...
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
    class RoleChange(_message.Message):
        __slots__ = ("member", "role", "former", "reason", "error", "ago_s")
        MEMBER_FIELD_NUMBER: _ClassVar[int]
        ROLE_FIELD_NUMBER: _ClassVar[int]
        FORMER_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        ERROR_FIELD_NUMBER: _ClassVar[int]
        AGO_S_FIELD_NUMBER: _ClassVar[int]
        member: str
        role: Role
        former: Role
        reason: str
        error: str
        ago_s: float
        def __init__(self, member: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., former: _Optional[_Union[Role, str]] = ..., reason: _Optional[str] = ..., error: _Optional[str] = ..., ago_s: _Optional[float] = ...) -> None: ...
    class OutcomesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class PredictionErrorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class RejectionsEntry(_message.Message):
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
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_ERRORS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_SLO_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTSIDE_SLO_FIELD_NUMBER: _ClassVar[int]
    ABSENCES_FIELD_NUMBER: _ClassVar[int]
    ROLE_CHANGES_FIELD_NUMBER: _ClassVar[int]
    members: _containers.RepeatedCompositeFieldContainer[StatusReply.Member]
    model: str
    num_queued: int
    num_running: int
    draining: bool
    ttft_s: StatusReply.Percentiles
    tpot_s: StatusReply.Percentiles
    outcomes: _containers.ScalarMap[str, int]
    up_s: float
    policy: str
    admission: str
    order: str
    prediction_errors: _containers.ScalarMap[str, float]
    rejections: _containers.ScalarMap[str, int]
    num_in_slo: int
    num_outside_slo: int
    absences: _containers.RepeatedCompositeFieldContainer[StatusReply.Absence]
    role_changes: _containers.RepeatedCompositeFieldContainer[StatusReply.RoleChange]
    def __init__(self, members: _Optional[_Iterable[_Union[StatusReply.Member, _Mapping]]] = ..., model: _Optional[str] = ..., num_queued: _Optional[int] = ..., num_running: _Optional[int] = ..., draining: bool = ..., ttft_s: _Optional[_Union[StatusReply.Percentiles, _Mapping]] = ..., tpot_s: _Optional[_Union[StatusReply.Percentiles, _Mapping]] = ..., outcomes: _Optional[_Mapping[str, int]] = ..., up_s: _Optional[float] = ..., policy: _Optional[str] = ..., admission: _Optional[str] = ..., order: _Optional[str] = ..., prediction_errors: _Optional[_Mapping[str, float]] = ..., rejections: _Optional[_Mapping[str, int]] = ..., num_in_slo: _Optional[int] = ..., num_outside_slo: _Optional[int] = ..., absences: _Optional[_Iterable[_Union[StatusReply.Absence, _Mapping]]] = ..., role_changes: _Optional[_Iterable[_Union[StatusReply.RoleChange, _Mapping]]] = ...) -> None: ...

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

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[Explanation]
    def __init__(self, requests: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request_id", "state", "ended", "num_tokens", "ttft_slo_s", "tpot_slo_s", "priority", "age_s", "policy", "admission", "attempts", "phases")
    class Candidate(_message.Message):
        __slots__ = ("id", "chosen", "num_cached_blocks", "queue_s", "transfer_s", "prefill_s", "ttft_s", "step_s", "num_running", "num_outstanding_tokens", "ssd_s")
        ID_FIELD_NUMBER: _ClassVar[int]
        CHOSEN_FIELD_NUMBER: _ClassVar[int]
        NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        QUEUE_S_FIELD_NUMBER: _ClassVar[int]
        TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
        PREFILL_S_FIELD_NUMBER: _ClassVar[int]
        TTFT_S_FIELD_NUMBER: _ClassVar[int]
        STEP_S_FIELD_NUMBER: _ClassVar[int]
        NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
        NUM_OUTSTANDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
        SSD_S_FIELD_NUMBER: _ClassVar[int]
        id: str
        chosen: bool
        num_cached_blocks: int
        queue_s: float
        transfer_s: float
        prefill_s: float
        ttft_s: float
        step_s: float
        num_running: int
        num_outstanding_tokens: int
        ssd_s: float
        def __init__(self, id: _Optional[str] = ..., chosen: bool = ..., num_cached_blocks: _Optional[int] = ..., queue_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., step_s: _Optional[float] = ..., num_running: _Optional[int] = ..., num_outstanding_tokens: _Optional[int] = ..., ssd_s: _Optional[float] = ...) -> None: ...
    class Prediction(_message.Message):
        __slots__ = ("name", "predicted_s", "measured_s", "measured")
        NAME_FIELD_NUMBER: _ClassVar[int]
        PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
        MEASURED_S_FIELD_NUMBER: _ClassVar[int]
        MEASURED_FIELD_NUMBER: _ClassVar[int]
        name: str
        predicted_s: float
        measured_s: float
        measured: bool
        def __init__(self, name: _Optional[str] = ..., predicted_s: _Optional[float] = ..., measured_s: _Optional[float] = ..., measured: bool = ...) -> None: ...
    class Attempt(_message.Message):
        __slots__ = ("at_s", "prefill", "decode", "num_prefill", "num_decode", "reason", "rejection_code", "retry_after_s", "num_cached_tokens", "prefix_store", "prefix_blocks", "error", "queue_order", "predictions")
        AT_S_FIELD_NUMBER: _ClassVar[int]
        PREFILL_FIELD_NUMBER: _ClassVar[int]
        DECODE_FIELD_NUMBER: _ClassVar[int]
        NUM_PREFILL_FIELD_NUMBER: _ClassVar[int]
        NUM_DECODE_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        REJECTION_CODE_FIELD_NUMBER: _ClassVar[int]
        RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
        NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        PREFIX_STORE_FIELD_NUMBER: _ClassVar[int]
        PREFIX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
        ERROR_FIELD_NUMBER: _ClassVar[int]
        QUEUE_ORDER_FIELD_NUMBER: _ClassVar[int]
        PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
        at_s: float
        prefill: _containers.RepeatedCompositeFieldContainer[Explanation.Candidate]
        decode: _containers.RepeatedCompositeFieldContainer[Explanation.Candidate]
        num_prefill: int
        num_decode: int
        reason: str
        rejection_code: str
        retry_after_s: float
        num_cached_tokens: int
        prefix_store: str
        prefix_blocks: int
        error: str
        queue_order: int
        predictions: _containers.RepeatedCompositeFieldContainer[Explanation.Prediction]
        def __init__(self, at_s: _Optional[float] = ..., prefill: _Optional[_Iterable[_Union[Explanation.Candidate, _Mapping]]] = ..., decode: _Optional[_Iterable[_Union[Explanation.Candidate, _Mapping]]] = ..., num_prefill: _Optional[int] = ..., num_decode: _Optional[int] = ..., reason: _Optional[str] = ..., rejection_code: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., num_cached_tokens: _Optional[int] = ..., prefix_store: _Optional[str] = ..., prefix_blocks: _Optional[int] = ..., error: _Optional[str] = ..., queue_order: _Optional[int] = ..., predictions: _Optional[_Iterable[_Union[Explanation.Prediction, _Mapping]]] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: str
    ended: str
    num_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    priority: int
    age_s: float
    policy: str
    admission: str
    attempts: _containers.RepeatedCompositeFieldContainer[Explanation.Attempt]
    phases: _common_pb2.PhaseRecord
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[str] = ..., ended: _Optional[str] = ..., num_tokens: _Optional[int] = ..., ttft_slo_s: _Optional[float] = ..., tpot_slo_s: _Optional[float] = ..., priority: _Optional[int] = ..., age_s: _Optional[float] = ..., policy: _Optional[str] = ..., admission: _Optional[str] = ..., attempts: _Optional[_Iterable[_Union[Explanation.Attempt, _Mapping]]] = ..., phases: _Optional[_Union[_common_pb2.PhaseRecord, _Mapping]] = ...) -> None: ...

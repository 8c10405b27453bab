from halfmoon.protocol.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StopRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class StopReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: bool = ...) -> None: ...

class PrefixHint(_message.Message):
    __slots__ = ("store_address", "num_blocks", "ssd")
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SSD_FIELD_NUMBER: _ClassVar[int]
    store_address: str
    num_blocks: int
    ssd: _common_pb2.SsdUse
    def __init__(self, store_address: _Optional[str] = ..., num_blocks: _Optional[int] = ..., ssd: _Optional[_Union[_common_pb2.SsdUse, str]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "handoff", "store_address", "prefix", "skip_own_store", "own_ssd")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    SKIP_OWN_STORE_FIELD_NUMBER: _ClassVar[int]
    OWN_SSD_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceSpec
    handoff: _common_pb2.HandoffId
    store_address: str
    prefix: PrefixHint
    skip_own_store: bool
    own_ssd: _common_pb2.SsdUse
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceSpec, _Mapping]] = ..., handoff: _Optional[_Union[_common_pb2.HandoffId, _Mapping]] = ..., store_address: _Optional[str] = ..., prefix: _Optional[_Union[PrefixHint, _Mapping]] = ..., skip_own_store: bool = ..., own_ssd: _Optional[_Union[_common_pb2.SsdUse, str]] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ("state", "prompt_logprobs")
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    state: _common_pb2.HandoffState
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, state: _Optional[_Union[_common_pb2.HandoffState, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "handoff", "local_prefill", "feed_id", "call", "store_address", "skip_own_store", "own_ssd")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SKIP_OWN_STORE_FIELD_NUMBER: _ClassVar[int]
    OWN_SSD_FIELD_NUMBER: _ClassVar[int]
    sequence: _common_pb2.SequenceSpec
    handoff: _common_pb2.HandoffId
    local_prefill: bool
    feed_id: str
    call: int
    store_address: str
    skip_own_store: bool
    own_ssd: _common_pb2.SsdUse
    def __init__(self, sequence: _Optional[_Union[_common_pb2.SequenceSpec, _Mapping]] = ..., handoff: _Optional[_Union[_common_pb2.HandoffId, _Mapping]] = ..., local_prefill: bool = ..., feed_id: _Optional[str] = ..., call: _Optional[int] = ..., store_address: _Optional[str] = ..., skip_own_store: bool = ..., own_ssd: _Optional[_Union[_common_pb2.SsdUse, str]] = ...) -> None: ...

class TokensRequest(_message.Message):
    __slots__ = ("feed_id",)
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    feed_id: str
    def __init__(self, feed_id: _Optional[str] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("calls", "token_ids", "outputs")
    class Output(_message.Message):
        __slots__ = ("call", "token")
        CALL_FIELD_NUMBER: _ClassVar[int]
        TOKEN_FIELD_NUMBER: _ClassVar[int]
        call: int
        token: _common_pb2.TokenOutput
        def __init__(self, call: _Optional[int] = ..., token: _Optional[_Union[_common_pb2.TokenOutput, _Mapping]] = ...) -> None: ...
    CALLS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    calls: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    outputs: _containers.RepeatedCompositeFieldContainer[StepTokens.Output]
    def __init__(self, calls: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., outputs: _Optional[_Iterable[_Union[StepTokens.Output, _Mapping]]] = ...) -> None: ...

class DecodeReply(_message.Message):
    __slots__ = ("admitted", "tokens", "finished", "prompt_logprobs")
    class Admitted(_message.Message):
        __slots__ = ("state", "handoff_wait_s")
        STATE_FIELD_NUMBER: _ClassVar[int]
        HANDOFF_WAIT_S_FIELD_NUMBER: _ClassVar[int]
        state: _common_pb2.HandoffState
        handoff_wait_s: float
        def __init__(self, state: _Optional[_Union[_common_pb2.HandoffState, _Mapping]] = ..., handoff_wait_s: _Optional[float] = ...) -> None: ...
    class Tokens(_message.Message):
        __slots__ = ("tokens",)
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenOutput]
        def __init__(self, tokens: _Optional[_Iterable[_Union[_common_pb2.TokenOutput, _Mapping]]] = ...) -> None: ...
    class Finished(_message.Message):
        __slots__ = ("reason", "phases", "num_tokens")
        REASON_FIELD_NUMBER: _ClassVar[int]
        PHASES_FIELD_NUMBER: _ClassVar[int]
        NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
        reason: _common_pb2.FinishReason
        phases: _common_pb2.DecodePhases
        num_tokens: int
        def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., phases: _Optional[_Union[_common_pb2.DecodePhases, _Mapping]] = ..., num_tokens: _Optional[int] = ...) -> None: ...
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    admitted: DecodeReply.Admitted
    tokens: DecodeReply.Tokens
    finished: DecodeReply.Finished
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, admitted: _Optional[_Union[DecodeReply.Admitted, _Mapping]] = ..., tokens: _Optional[_Union[DecodeReply.Tokens, _Mapping]] = ..., finished: _Optional[_Union[DecodeReply.Finished, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

"""The SDK: talks to a Halfmoon cluster over gRPC. Needs grpcio and protobuf, nothing else.

>>> from halfmoon.client import Client
>>> with Client("127.0.0.1:50051") as client:
...     completion = client.generate(prompt="A halfmoon is", max_tokens=32)
...     print(completion.text, completion.phases.ttft_s)
"""

from __future__ import annotations

from ..protocol.errors import (
    DeadlineExceeded,
    HalfmoonError,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RequestCancelled,
    Unauthenticated,
    Unavailable,
    UnknownModel,
    UnknownRequest,
)
from .access import Control
from .async_client import AsyncClient, AsyncStream
from .chat import Message, ToolCall, ToolCallDelta
from .client import Client, Stream
from .cluster_status import ClusterStatus, Member, Model, Percentiles, RoleChange
from .completion import Admitted, Choice, Completion, Delta, Event, Finished, PhaseRecord, Prompt, TokenLogprob, TopLogprob, Usage
from .conversation import Conversation
from .explanation import Candidate, DecisionAttempt, Explanation, Prediction

__all__ = [
    "Admitted",
    "AsyncClient",
    "AsyncStream",
    "Candidate",
    "Choice",
    "Client",
    "ClusterStatus",
    "Completion",
    "Control",
    "Conversation",
    "DeadlineExceeded",
    "DecisionAttempt",
    "Delta",
    "Event",
    "Explanation",
    "Finished",
    "HalfmoonError",
    "InvalidRequest",
    "Member",
    "Message",
    "Model",
    "Overloaded",
    "Percentiles",
    "PermissionDenied",
    "PhaseRecord",
    "Prediction",
    "Prompt",
    "PromptTooLong",
    "RequestCancelled",
    "RoleChange",
    "Stream",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "UnknownModel",
    "UnknownRequest",
    "Usage",
]

"""Configuration: one frozen dataclass a process role, all from one YAML file and the command line.

model:    what is served          store:   one process a node
proxy:    the front door          prefill: that half of a worker      decode: that half of a worker
security: TLS between members
                                  num_workers in prefill, decode and both: how many start with that role
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from .errors import ConfigError

Policy = Literal["random", "round_robin", "least_loaded", "cache_aware", "kvcache_centric", "adaptive"]
AdmissionName = Literal["none", "two_stage", "ttft_tbt", "early_rejection", "predictive"]
PORTS = ("http_port", "grpc_port", "control_port", "metrics_port")  # of the proxy
QueueOrder = Literal["short", "fair", "fcfs", "edf", "late"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
QuantizationName = Literal["auto", "fp8", "int8", "int4", "none"]
SpecialInText = Literal["parsed", "literal"]
ToolParserName = Literal["auto", "none", "hermes", "llama3_json", "mistral", "pythonic"]
ReasoningParserName = Literal["auto", "none", "qwen3", "deepseek_r1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    path: str = ""
    """Folder in Hugging Face format; empty: the demo model that comes with the package."""
    name: str = ""
    """What clients call it; empty: the folder's name."""
    dtype: Dtype = "auto"
    """Data type of weights, activations and KV; auto: the checkpoint's own on CUDA, float32 on CPU."""
    quantization: QuantizationName = "auto"
    """The layers' matrices; auto: as the checkpoint has them; fp8, int8, int4: made at load from a checkpoint of 16 bits (fp8 and int8 by
    channel, products in that type, too; int4 by groups of 128, products in model.dtype); none: in model.dtype, whatever the checkpoint."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Data type of KV in pages, stores and hand-offs; auto: model.dtype; fp8: e4m3, half the bytes, each value rounded to 4
    significant bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; auto: on CUDA where there is a GPU, each worker on one of its own, else on CPU."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the checkpoint's weights; dummy: random weights of the shape that config.json gives, for measurements."""
    block_size: int = 64
    """Tokens in one KV block, and in one page of a worker."""
    max_model_len: int = 0
    """Longest prompt and answer together, in tokens; 0: the length that the model was made for. A worker's pages bound it, too."""
    generation_config: Literal["auto", "none"] = "auto"
    """Sampling of requests that say nothing of it; auto: what generation_config.json recommends, else OpenAI's defaults; none: OpenAI's."""
    eos: Literal["all", "config"] = "all"
    """Tokens that end an answer; all: those that config.json, generation_config.json or the tokenizer names; config: those of
    generation_config.json, or else of config.json."""
    special_tokens_in_text: SpecialInText = "parsed"
    """What the text of a special token is in a chat's messages; parsed: the token, as in other servers, so that whoever writes a message
    can end it and begin another; literal: text."""
    tool_parser: ToolParserName = "auto"
    """How tool calls are read from a chat's answer; auto: by the chat template, where it tells the model of one of these formats; none:
    requests with tools are refused."""
    reasoning_parser: ReasoningParserName = "auto"
    """How reasoning is told from the rest of a chat's answer; auto: by the chat template, as tool_parser; none: it is part of the text."""
    prefix_cache_hbm: bool = True
    """Whether a worker's pages keep the KV of sequences that ended, for prompts that begin alike, until others need the room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    arena_bytes: int = 0
    """Shared memory for KV blocks, preallocated on every node; 0: room for 64 prompts of max_model_len, at most half of what is free in
    /dev/shm and half of the free memory."""
    lease_ttl_s: float = 5.0
    """A client of the store that sends no heartbeat for this long loses its session and every lease."""
    eviction: Literal["lru", "lfu", "length_aware", "cost"] = "lru"
    """Which cached block goes when room is needed; lru: the one unused for longest; lfu: the one used least; length_aware: as lfu, the end
    of a chain first; cost: the one whose uses saved the least time of prefill a byte."""
    ssd_path: str = ""
    """Folder on an SSD for cached blocks that have cooled; one store each. They are served again after a restart. Empty: no SSD tier."""
    ssd_bytes: int = 16 * 2**30
    """Size of the SSD tier, taken at the start."""
    ssd_free_ratio: float = 0.1
    """Share of the arena that is kept free by writing the coldest cached blocks to the SSD; room beyond it is made by dropping them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    num_workers: int = 1
    """Prefill workers to start, each on a GPU of its own; 0: decode workers compute the prompts."""
    max_tokens_per_step: int = 2048
    """Prompt tokens computed in one step, over the chunks of all prompts in it."""
    kv_capacity_tokens: int = 0
    """Tokens that a prefill worker's pages hold; 0: twice max_model_len on CPU and at most a quarter of the free
    memory, 90 % of the free memory on CUDA."""
    tensor_parallel: int = 1
    """GPUs of one host that a prefill worker divides the model over, each with a process of its own; on CPU, processes. It has to divide
    the model's key-value heads. decode's may be another."""
    num_threads: int = 1
    """Torch threads of a prefill worker on CPU; of each of its processes."""
    transport: Literal["auto", "tcp", "grpc"] = "auto"
    """How a prefill worker exchanges KV with stores; auto: shared memory on its own node, data connections (TCP beside
    gRPC) to others; tcp: data connections everywhere; grpc: gRPC everywhere."""

    def __post_init__(self) -> None:
        _require_ranks("prefill", self.tensor_parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    num_workers: int = 1
    """Decode workers to start, each on a GPU of its own."""
    max_running: int = 256
    """Sequences that one decode worker runs at a time."""
    max_prefill_tokens_per_step: int = 2048
    """Prompt tokens computed in one step beside decode tokens, at most: local prefill, preempted sequences and prompts to hand off."""
    tpot_target_s: float = 0.05
    """Seconds per output token that steps with prompt tokens are sized for, of requests that neither bring an SLO nor have
    proxy.tpot_slo_s; 0: they bound no step, and chunks are max_prefill_tokens_per_step."""
    kv_capacity_tokens: int = 0
    """Tokens that a decode worker's pages hold; 0: eight times max_model_len on CPU and at most a quarter of the
    free memory, 90 % of the free memory on CUDA."""
    tensor_parallel: int = 1
    """GPUs of one host that a decode worker divides the model over, as prefill's; workers of both roles take this one."""
    num_threads: int = 1
    """Torch threads of a decode worker on CPU; of each of its processes."""
    transport: Literal["auto", "tcp", "grpc"] = "auto"
    """How a decode worker exchanges KV with stores; auto: shared memory on its own node, data connections (TCP beside
    gRPC) to others; tcp: data connections everywhere; grpc: gRPC everywhere."""

    def __post_init__(self) -> None:
        _require_ranks("decode", self.tensor_parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class BothConfig:
    """Workers that start with both roles. Their other settings are prefill's and decode's; where both have one, decode's holds."""

    num_workers: int = 0
    """Workers of both roles to start, each on a GPU of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    host: str = "127.0.0.1"
    """Address that the proxy listens on for clients; 0.0.0.0: every one of its machine."""
    http_port: int = 8000
    """Port of the OpenAI-compatible HTTP API; 0: any free one."""
    grpc_port: int = 50051
    """Port of the gRPC API; 0: any free one."""
    control_host: str = ""
    """Address that the proxy listens on for the cluster's members, operators and Prometheus; empty: this machine's address in Ray,
    which is loopback for a Ray of its own."""
    control_port: int = 50052
    """Port where members join and operators ask, with the cluster's token; 0: any free one."""
    metrics_port: int = 8001
    """Port of /metrics and /metrics/targets, on control_host; 0: any free one."""
    policy: Policy = "cache_aware"
    """How the Conductor chooses a request's workers."""
    admission: AdmissionName = "none"
    """Which prediction refuses a request with 429 because it would miss its SLO; none: no request is refused for that."""
    ttft_slo_s: float = 0.0
    """Bound on the time to the first token for a request that brings none of its own; 0: no bound."""
    tpot_slo_s: float = 0.0
    """Bound on the time per output token for a request that brings none of its own; 0: no bound."""
    order: QueueOrder = "short"
    """Order of a worker's queue. short: the prompt with the least to compute first, and nobody is passed for ever; fair: requests of one
    priority share each step; fcfs: by arrival; edf: by the time at which the first token is due; late: as edf, but a request that will
    be late in any case lets the others pass."""
    cost_model: str = ""
    """Profile from `halfmoon profile` that predictions start from; empty: a guess. Observations correct either one."""
    page: bool = True
    """GET / on the HTTP port shows the cluster in a browser: members, latencies, requests by their ids, no prompt and no text."""
    num_explained: int = 1000
    """Number of requests that `halfmoon explain` can still explain."""
    max_queued_requests: int = 512
    """Requests that may wait for their first token at a time; one more is answered 429."""
    max_queued_tokens: int = 2_000_000
    """Prompt tokens that all waiting requests may have together; a request that exceeds it is answered 429."""
    default_timeout_s: float = 600.0
    """Seconds that a request may take when it brings no timeout of its own."""
    max_attempts: int = 3
    """Worker pairs that one request is tried on before the client gets its error; a pair that lost its store is not counted."""
    local_prefill: Literal["never", "fallback", "always"] = "fallback"
    """When decode workers compute prompts themselves; fallback: while no prefill worker or no store is alive, or none is configured."""
    rebalance_s: float = 1.0
    """Seconds between two decisions of the policy about who prefills and who decodes, if it makes any (adaptive); 0: workers keep the
    roles that they start with. With local_prefill always, they keep them, too."""
    replicate: Literal["never", "hot"] = "hot"
    """Whether a prefix that many requests share is copied to more stores ahead of demand; never: blocks are copied for nobody."""
    avoid_after_s: float = 1.0
    """Seconds without a report of a member, or of a worker at one step, after which others get the new requests; see step_patience."""
    leave_after_s: float = 2.5
    """Seconds, counted in the same way, after which the proxy leaves the member and runs its requests elsewhere; it rejoins by itself."""
    step_patience: float = 10.0
    """How many times as long as predicted a worker's step may take, where that is more than avoid_after_s."""
    transfer_limit_s: float = 10.0
    """Seconds that a worker may be at one copy to or from a store before the proxy leaves it."""
    restart_after_s: float = 30.0
    """Seconds after which a process that lives and serves nobody is ended and started again: a worker or a store that was left and stays
    so, a proxy that does not answer."""
    max_connections: int = 4096
    """HTTP connections open at a time; one more is answered 429 and closed."""
    head_timeout_s: float = 10.0
    """Seconds that the head of an HTTP request may take, from its first byte or from the connection's start; on the gRPC port, those of
    HTTP/2's handshake."""
    max_head_bytes: int = 32 * 2**10
    """Size of a request's head; a larger one is answered 431."""
    body_timeout_s: float = 60.0
    """Seconds that the whole body of an HTTP request may take, from the end of its head."""
    max_body_bytes: int = 16 * 2**20
    """Size of a request's body, and of a message at the gRPC port; a larger one is refused before it is read. The default is a prompt of
    a million tokens, with room for JSON's escapes."""
    idle_timeout_s: float = 75.0
    """Seconds that an HTTP connection may stay open between two requests."""
    write_timeout_s: float = 30.0
    """Seconds in which a client, HTTP or gRPC, must take something of what waits to be sent to it; else its request is cancelled. Nothing
    waits between two tokens, so a stream may last as long as it likes."""
    keys_file: str = ""
    """File of API keys and tenants, which `halfmoon keys` writes; a change counts from the next request on. Empty: no key is asked for."""
    usage_file: str = ""
    """File that the proxy writes, of the tokens that tenants have used of their quotas; empty: beside keys_file, with .usage behind its
    name."""
    tls_certificate: str = ""
    """PEM file of the clients' ports' certificate, on the proxy's host; `halfmoon certs init` makes front.pem. Empty: no TLS there."""
    tls_key: str = ""
    """PEM file of its key."""
    cors_origins: str = ""
    """Origins whose pages may call the HTTP API from a browser, with blanks between them: https://chat.example.org; *: every origin.
    Empty: none."""
    tracing: Literal["off", "otlp"] = "off"
    """otlp: spans of each request go to the OpenTelemetry collector that OTEL_EXPORTER_OTLP_ENDPOINT names; needs halfmoon[tracing]."""
    kv_events_endpoint: str = ""
    """ZeroMQ endpoint at which the proxy publishes which blocks the stores hold, as vLLM does: tcp://127.0.0.1:5557. Token ids of
    prompts are in it, in the clear, but for tenants' prompts. Needs halfmoon[kv-events]. Empty: none."""
    kv_events_replay_endpoint: str = ""
    """Another one, where subscribers ask for batches that they missed. Empty: none."""
    kv_events_topic: str = ""
    """Topic of the batches."""
    drain_timeout_s: float = 30.0
    """Seconds that running requests have to finish when the proxy stops; after that they are cancelled."""

    def __post_init__(self) -> None:
        for name in PORTS:
            if getattr(self, name) > 65535:
                raise ConfigError(f"proxy.{name} is {getattr(self, name)}; a port is at most 65535 (0: any free one)", key=f"proxy.{name}")
        if not 0 < self.avoid_after_s <= self.leave_after_s:
            raise ConfigError(
                f"proxy.avoid_after_s is {self.avoid_after_s:g} and proxy.leave_after_s {self.leave_after_s:g}; a member is avoided before "
                "it is left, so give the first a value above 0 and at most the second's",
                key="proxy.avoid_after_s",
            )
        for name in ("max_connections", "head_timeout_s", "max_head_bytes", "body_timeout_s", "max_body_bytes", "write_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"proxy.{name} is {getattr(self, name)}; it must be above 0", key=f"proxy.{name}")
        for origin in self.cors_origins.split():
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigError(
                    f"proxy.cors_origins has {origin!r}; an origin is a scheme and a host, such as https://chat.example.org, or *",
                    key="proxy.cors_origins",
                )
        for name in ("kv_events_endpoint", "kv_events_replay_endpoint"):
            endpoint = getattr(self, name)
            if endpoint and not re.fullmatch(r"tcp://\S+:\d+|ipc://\S+", endpoint):
                raise ConfigError(f"proxy.{name} is {endpoint!r}; give tcp://HOST:PORT or ipc://PATH", key=f"proxy.{name}")
        if self.kv_events_replay_endpoint and not self.kv_events_endpoint:
            key = "proxy.kv_events_replay_endpoint"
            raise ConfigError(f"{key} is set and proxy.kv_events_endpoint is not; there is nothing to be sent again", key=key)
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("proxy.tls_certificate and proxy.tls_key belong together; set both or none", key="proxy.tls_key")
        for name, other in itertools.combinations(PORTS, 2):
            if getattr(self, name) == getattr(self, other) != 0:
                raise ConfigError(f"proxy.{name} and proxy.{other} are both {getattr(self, name)}; give each its own", key=f"proxy.{other}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    certs: str = ""
    """Folder of `halfmoon certs init` on the host of `halfmoon serve`: members talk to each other by mutual TLS. Empty: in the clear."""
    metrics_token_file: str = ""
    """File on the host of `halfmoon serve` with the token that whoever reads a metrics page has to bring; empty: everybody may read them.
    Read at the start."""
    insecure: bool = False
    """Whether a cluster may start that can be used or read from other machines without TLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    model: ModelOptions = field(default_factory=ModelOptions)
    store: StoreConfig = field(default_factory=StoreConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    both: BothConfig = field(default_factory=BothConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    @property
    def num_workers(self) -> int:
        return self.prefill.num_workers + self.decode.num_workers + self.both.num_workers

    @property
    def num_ranks(self) -> int:
        """Of all workers: on CUDA each takes a GPU."""
        return sum(getattr(self, role).num_workers * self.ranks_of(role) for role in ("prefill", "decode", "both"))

    def ranks_of(self, role: str) -> int:
        """GPUs, or on CPU processes, of a worker that starts with the role."""
        return self.prefill.tensor_parallel if role == "prefill" else self.decode.tensor_parallel

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
        """The file's values under the overrides' ("proxy.policy" -> "random").

        Raises ConfigError for a missing or malformed file, an unknown key (naming the nearest known one) and a
        value of the wrong type.
        """
        return from_mapping(cls, given_values(path, overrides), "")


def _require_ranks(section: str, count: int) -> None:
    if count < 1:
        key = f"{section}.tensor_parallel"
        raise ConfigError(f"{key} is {count}; it must be at least 1, which divides nothing", key=key)


def given_values(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Section -> key -> value, of what the file and the overrides say and nothing else. Raises ConfigError as ClusterConfig.load does."""
    tree: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        if tree.get(section) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            raise ConfigError(f"{section} is {tree[section]!r}; it must be a section of key: value lines")
        tree[section][key] = value
    return tree


Section = TypeVar("Section")


def from_mapping(section_type: type[Section], values: Mapping[str, Any], where: str) -> Section:
    """A dataclass from plain values, every key known and every value of its field's type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the file'} is {values!r}; it must be a section of key: value lines")
    hints = typing.get_type_hints(section_type)
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {_dotted(where, key)!r}; did you mean {_dotted(where, near[0])!r}?", key=str(key))
        if dataclasses.is_dataclass(hints[key]):
            built[key] = from_mapping(hints[key], value if value is not None else {}, _dotted(where, key))
        else:
            built[key] = _checked(_dotted(where, key), value, hints[key])
    return section_type(**built)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, get_args(hint)))}", key=name)
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, types.UnionType) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}", key=name)
    if isinstance(value, (int, float)) and not 0 <= value < math.inf:  # NaN is neither
        raise ConfigError(f"{name} is {value!r}; it must be a finite number and not negative", key=name)
    return value


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # here, because the SDK installs without it

    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file at {path}; check --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; it must hold sections such as 'proxy:'")
    return tree

"""Every metric's name, help, labels and buckets, in one place. Labels never carry user input.

Names and units after vLLM's convention with the prefix halfmoon_. Buckets resolve 1 ms: TTFT has vLLM's list, inter-token
latency SGLang's from 1 ms, phases a 1-2-5 series. Built into prometheus_client objects by protocol/exporter.py.

Every series of a process carries the labels worker (the process's id), role and model_name, which the exporter adds. A metric with a
role label of its own keeps that: it says in which role a worker did the work, or what the members are that are counted.
docs/metrics.md is made from this file.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Process = Literal["proxy", "worker", "store", "every"]

# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
ITL_BUCKETS = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080,
    0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0,
)
PHASE_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0,
)
RELATIVE_ERROR_BUCKETS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# fmt: on

IDENTITY_LABELS = ("worker", "role", "model_name")


class MetricSpec(NamedTuple):
    name: str  # without _total
    kind: Literal["counter", "gauge", "histogram"]
    process: Process  # that exports it
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# every process; process_* (CPU seconds, resident memory, open files, start) come from prometheus_client
BUILD_INFO = MetricSpec("halfmoon_build_info", "gauge", "every", "1, with what runs.", ("version", "python"))

# proxy: latencies
TIME_TO_FIRST_TOKEN = MetricSpec(
    "halfmoon_time_to_first_token_seconds",
    "histogram",
    "proxy",
    "Arrival to the first token written to the client's connection; of a reply that does not stream, to its first token.",
    (),
    TTFT_BUCKETS,
)
TIME_TO_PREFILL_DONE = MetricSpec(
    "halfmoon_time_to_prefill_done_seconds", "histogram", "proxy", "Arrival to the prefill worker's report.", (), TTFT_BUCKETS
)
TIME_PER_OUTPUT_TOKEN = MetricSpec(
    "halfmoon_time_per_output_token_seconds", "histogram", "proxy", "Mean over a request's tokens after the first.", (), ITL_BUCKETS
)
INTER_TOKEN_LATENCY = MetricSpec(
    "halfmoon_inter_token_latency_seconds", "histogram", "proxy", "Gap between two tokens written to the client.", (), ITL_BUCKETS
)
E2E_REQUEST_LATENCY = MetricSpec(
    "halfmoon_e2e_request_latency_seconds", "histogram", "proxy", "Arrival to the last token.", (), PHASE_BUCKETS
)
REQUEST_PHASE = MetricSpec(
    "halfmoon_request_phase_seconds",
    "histogram",
    "proxy",
    "Time of one phase of a request: queue, prefill_queue, prefix_load, prefill, push, handoff_wait, write (from the first token's coming "
    "to the proxy to its write to the client), first_decode, decode.",
    ("phase",),
    PHASE_BUCKETS,
)

# proxy: requests
REQUESTS = MetricSpec(
    "halfmoon_requests",
    "counter",
    "proxy",
    "Requests ended (each choice is one), judged. outcome: done, rejected, aborted, failed; reason: a finish reason or an error code; "
    "class: whose SLO it had: default (the proxy's), own, none; "
    "in_slo: yes, no, unknown (the client left, or asked for what is not to be had); "
    "miss: what it missed: none, ttft, tpot, both, error, rejected, left; invalid: the request was wrong.",
    ("outcome", "reason", "class", "in_slo", "miss"),
)
SLO_REQUESTS = MetricSpec(
    "halfmoon_slo_requests",
    "counter",
    "proxy",
    "Requests that had the SLO (ttft, tpot) and were judged by it; one that failed or was rejected has not met it.",
    ("slo", "class", "met"),
)
REQUEST_STATE = MetricSpec("halfmoon_request_transitions", "counter", "proxy", "Transitions of the request state machine.", ("state",))
REQUEST_REPLAYS = MetricSpec(
    "halfmoon_request_replays", "counter", "proxy", "Requests run again on another pair, by error code.", ("reason",)
)
REQUESTS_WAITING = MetricSpec("halfmoon_requests_waiting", "gauge", "proxy", "Requests admitted and without a first token.")
REQUESTS_STREAMING = MetricSpec("halfmoon_requests_streaming", "gauge", "proxy", "Requests with a first token and not ended.")
PROMPT_TOKENS = MetricSpec("halfmoon_prompt_tokens", "counter", "proxy", "Prompt tokens of admitted requests.")
CACHED_PROMPT_TOKENS = MetricSpec(
    "halfmoon_cached_prompt_tokens", "counter", "proxy", "Prompt tokens of finished requests that were loaded from a cache."
)
GENERATION_TOKENS = MetricSpec("halfmoon_generation_tokens", "counter", "proxy", "Tokens written to clients.")
REQUEST_PROMPT_TOKENS = MetricSpec(
    "halfmoon_request_prompt_tokens", "histogram", "proxy", "Prompt tokens of a finished request.", (), TOKEN_BUCKETS
)
REQUEST_GENERATION_TOKENS = MetricSpec(
    "halfmoon_request_generation_tokens", "histogram", "proxy", "Tokens of a finished request's answer.", (), TOKEN_BUCKETS
)
HTTP_REQUESTS = MetricSpec(
    "halfmoon_http_requests", "counter", "proxy", "HTTP requests answered, by method, route and status.", ("method", "route", "status")
)
GRPC_CALLS = MetricSpec(
    "halfmoon_grpc_calls", "counter", "proxy", "Calls of the gRPC API ended, by method and status.", ("method", "status")
)
REFUSALS = MetricSpec(
    "halfmoon_refusals",
    "counter",
    "proxy",
    "Requests answered with an error status, by face (http, grpc) and error code: those too that never came to the queue.",
    ("face", "code"),
)
QUOTA_USED = MetricSpec(
    "halfmoon_quota_used_ratio",
    "gauge",
    "proxy",
    "Tokens that a tenant has used of its quota of this day or month (period: day, month).",
    ("tenant", "period"),
)
FALLBACKS = MetricSpec(
    "halfmoon_fallbacks",
    "counter",
    "proxy",
    "Requests that took a slower way than the cluster is made for: local_prefill (no prefill worker or no store was alive), transport "
    "(a hand-off inside one node that went through gRPC), replay (another attempt).",
    ("reason",),
)

# proxy: members
MEMBERS = MetricSpec("halfmoon_members", "gauge", "proxy", "Live workers and stores.", ("role",))
MEMBER_UP = MetricSpec(
    "halfmoon_member_up", "gauge", "proxy", "1: the member is alive, in this role; 0: it was, and is gone.", ("member", "role")
)
MEMBER_JOINS = MetricSpec("halfmoon_member_joins", "counter", "proxy", "Processes of the member that joined.", ("member",))
MEMBER_LOSSES = MetricSpec(
    "halfmoon_member_losses", "counter", "proxy", "Processes of the member that left or died: the two look alike.", ("member",)
)
ROLE_CHANGES = MetricSpec(
    "halfmoon_role_changes",
    "counter",
    "proxy",
    "Roles that workers were given and say that they have. new_role; reason: slo (more requests would be in SLO), unknown_load (nothing is "
    "known of it yet), missing_role (nobody had it).",
    ("new_role", "reason"),
)
ROLE_CHANGE_FAILURES = MetricSpec(
    "halfmoon_role_change_failures",
    "counter",
    "proxy",
    "Roles that workers were given and did not take on, by error code; they keep the former one.",
    ("new_role", "code"),
)
MEMBER_SECONDS = MetricSpec(
    "halfmoon_member_seconds",
    "counter",
    "proxy",
    "Seconds that members were alive (up) or gone (down), over all that ever joined: down / (up + down) is the failure rate.",
    ("role", "state"),
)
MEMBER_REPORT_AGE = MetricSpec(
    "halfmoon_member_report_age_seconds", "gauge", "proxy", "Since the last load report of a live member.", ("member",)
)
MEMBER_OUTSTANDING_TOKENS = MetricSpec(
    "halfmoon_member_outstanding_tokens",
    "gauge",
    "proxy",
    "Role prefill: prompt tokens still to compute; else tokens of context held. As the member last reported.",
    ("member",),
)

# proxy: the Conductor
PLACEMENTS = MetricSpec(
    "halfmoon_placements", "counter", "proxy", "Placements by policy; local: a decode worker computes the prompt itself.", ("policy",)
)
PREDICTED_TTFT = MetricSpec(
    "halfmoon_predicted_time_to_first_token_seconds",
    "histogram",
    "proxy",
    "As time_to_first_token, predicted at placement.",
    (),
    TTFT_BUCKETS,
)
PREDICTED_TPOT = MetricSpec(
    "halfmoon_predicted_time_per_output_token_seconds",
    "histogram",
    "proxy",
    "The decode worker's step, predicted at placement.",
    (),
    ITL_BUCKETS,
)
PREDICTED_TTFT_ERROR = MetricSpec(
    "halfmoon_predicted_ttft_error_seconds", "histogram", "proxy", "|predicted - measured| time to first token.", (), TTFT_BUCKETS
)
PREDICTED_TPOT_ERROR = MetricSpec(
    "halfmoon_predicted_tpot_error_seconds", "histogram", "proxy", "|predicted - measured| time per output token.", (), ITL_BUCKETS
)
PREDICTION_ERROR = MetricSpec(
    "halfmoon_prediction_relative_error",
    "histogram",
    "proxy",
    "|predicted - measured| / measured, by predictor (prefill, step, transfer, ssd, handoff, ttft, tpot).",
    ("predictor",),
    RELATIVE_ERROR_BUCKETS,
)
PREDICTION_ERROR_MEAN = MetricSpec(
    "halfmoon_prediction_relative_error_mean",
    "gauge",
    "proxy",
    "Exponential mean of the relative error, the newest counting 2 %.",
    ("predictor",),
)
DECISIONS = MetricSpec(
    "halfmoon_decisions",
    "counter",
    "proxy",
    "Placements by policy and kind: local, remote_prefix, own_prefix, no_prefix; replays included.",
    ("policy", "kind"),
)
REJECTIONS = MetricSpec(
    "halfmoon_rejections",
    "counter",
    "proxy",
    "Requests refused, by who refused them (queue, conductor, drain, an admission) and error code.",
    ("admission", "code"),
)

REPLICATIONS = MetricSpec(
    "halfmoon_replications",
    "counter",
    "proxy",
    "Copies of hot prefixes, by outcome: copied, cut_short, too_many (under way), over_budget, internal (a bug), or an error code.",
    ("outcome",),
)
REPLICATION_BYTES = MetricSpec("halfmoon_replication_bytes", "counter", "proxy", "Bytes that stores copied as they were told to.")
SSD_PREFIXES = MetricSpec(
    "halfmoon_ssd_prefixes",
    "counter",
    "proxy",
    "Placements whose prefix a store has on SSD, by verdict: load, leave (computing it is predicted to be faster).",
    ("verdict",),
)
SSD_PROMOTIONS = MetricSpec(
    "halfmoon_ssd_promotions",
    "counter",
    "proxy",
    "Reads from SSD that a store was asked for, by cause: ahead (its prompt waits for pages), probe (is the SSD still slow?).",
    ("cause",),
)
REPLICATIONS_IN_FLIGHT = MetricSpec("halfmoon_replications_in_flight", "gauge", "proxy", "Copies of hot prefixes under way.")

# worker; role: in which the work was done
NUM_REQUESTS_RUNNING = MetricSpec("halfmoon_num_requests_running", "gauge", "worker", "Sequences in the running batch.", ("role",))
NUM_REQUESTS_WAITING = MetricSpec(
    "halfmoon_num_requests_waiting", "gauge", "worker", "Sequences that wait for pages or for their hand-off.", ("role",)
)
KV_CACHE_USAGE = MetricSpec("halfmoon_kv_cache_usage_ratio", "gauge", "worker", "Share of the worker's pages in use.")
KV_CACHE_CAPACITY = MetricSpec("halfmoon_kv_cache_capacity_tokens", "gauge", "worker", "Tokens that the worker's pages hold.")
STEP_SECONDS = MetricSpec(
    "halfmoon_step_seconds", "histogram", "worker", "One engine step: forward pass, sampling, record.", ("role",), ITL_BUCKETS
)
STEP_TOKENS = MetricSpec("halfmoon_step_tokens", "counter", "worker", "Tokens computed in engine steps.", ("role",))
STEP_SEQUENCES = MetricSpec(
    "halfmoon_step_sequences", "histogram", "worker", "Batch size: sequences in one engine step.", ("role",), BATCH_BUCKETS
)
OLDEST_STEP_AGE = MetricSpec(
    "halfmoon_oldest_step_age_seconds", "gauge", "worker", "Age of the oldest engine step that has not ended; 0: none runs."
)
MODEL_FLOPS = MetricSpec(
    "halfmoon_model_flops",
    "counter",
    "worker",
    "Floating-point operations that the model's steps need by its shape: weights, and attention over the context.",
)
DEVICE_PEAK_FLOPS = MetricSpec(
    "halfmoon_device_peak_flops",
    "gauge",
    "worker",
    "Dense operations a second of the worker's device by its data sheet, in the model's data type; absent where that is not known.",
)
ENGINE_MEMORY = MetricSpec("halfmoon_engine_memory_bytes", "gauge", "worker", "Memory that the engine holds: weights, kv_cache.", ("kind",))
PREEMPTIONS = MetricSpec("halfmoon_num_preemptions", "counter", "worker", "Sequences preempted: their pages went to others.", ())
SEQUENCES_FAILED = MetricSpec(
    "halfmoon_sequences_failed", "counter", "worker", "Sequences that a step could not compute, by error code.", ("role", "reason")
)
KV_TRANSFER_BYTES = MetricSpec(
    "halfmoon_kv_transfer_bytes", "counter", "worker", "KV bytes moved, by transport and direction.", ("transport", "direction")
)
KV_TRANSFER_SECONDS = MetricSpec(
    "halfmoon_kv_transfer_seconds", "histogram", "worker", "One hand-off's transfer.", ("transport", "direction"), PHASE_BUCKETS
)
HANDOFFS_REFUSED = MetricSpec(
    "halfmoon_handoffs_refused", "counter", "worker", "Hand-offs that decode refused, by error code.", ("reason",)
)
PREFIX_CACHE_QUERIES = MetricSpec(
    "halfmoon_prefix_cache_queries", "counter", "worker", "Prompt tokens looked up, by tier: hbm, local, remote.", ("tier",)
)
PREFIX_CACHE_HITS = MetricSpec("halfmoon_prefix_cache_hits", "counter", "worker", "Prompt tokens found, by tier.", ("tier",))
PREFIX_LOAD_FAILURES = MetricSpec(
    "halfmoon_prefix_load_failures", "counter", "worker", "Cached prefixes computed instead of loaded, by error code.", ("reason",)
)

# store; arena = leased + cached + free, always
STORE_ARENA_BYTES = MetricSpec("halfmoon_store_arena_bytes", "gauge", "store", "Bytes of the arena, by state.", ("state",))
STORE_ARENA_CAPACITY = MetricSpec(
    "halfmoon_store_arena_capacity_bytes", "gauge", "store", "Bytes of the arena's slots: the sum of arena_bytes, always."
)
STORE_LEASES = MetricSpec("halfmoon_store_leases", "gauge", "store", "Leases held.")
STORE_HANDOFFS = MetricSpec("halfmoon_store_handoffs", "gauge", "store", "Hand-offs not yet released.")
STORE_SESSIONS = MetricSpec("halfmoon_store_sessions", "gauge", "store", "Clients attached.")
STORE_EVICTED_BLOCKS = MetricSpec("halfmoon_store_evicted_blocks", "counter", "store", "Cached blocks evicted.")
STORE_EXPIRED_LEASES = MetricSpec(
    "halfmoon_store_expired_leases", "counter", "store", "Leases ended for want of a heartbeat or a live client."
)
STORE_QUERY_BLOCKS = MetricSpec("halfmoon_store_query_blocks", "counter", "store", "Blocks that were looked up as a prefix.")
STORE_HIT_BLOCKS = MetricSpec("halfmoon_store_hit_blocks", "counter", "store", "Of those, blocks that were held.")
STORE_REPLICATED_BLOCKS = MetricSpec("halfmoon_store_replicated_blocks", "counter", "store", "Blocks copied here out of another store.")
STORE_REPLICATED_BYTES = MetricSpec("halfmoon_store_replicated_bytes", "counter", "store", "Their bytes.")
STORE_SSD_BYTES = MetricSpec("halfmoon_store_ssd_bytes", "gauge", "store", "The SSD tier, by state: used, free.", ("state",))
STORE_SSD_BLOCKS = MetricSpec(
    "halfmoon_store_ssd_blocks",
    "counter",
    "store",
    "Blocks moved: demoted (written to the SSD), promoted (read back), dropped (their bytes did not match), failed (the disk refused).",
    ("outcome",),
)
STORE_REPLICATION_SECONDS = MetricSpec(
    "halfmoon_store_replication_seconds",
    "histogram",
    "store",
    "One Replicate, by outcome: complete, source (it held no more), no_room, cancelled, or an error code.",
    ("outcome",),
    PHASE_BUCKETS,
)
STORE_ABORTED_HANDOFFS = MetricSpec("halfmoon_store_aborted_handoffs", "counter", "store", "Hand-offs aborted, by error code.", ("reason",))

ALL: tuple[MetricSpec, ...] = tuple(value for value in dict(globals()).values() if isinstance(value, MetricSpec))

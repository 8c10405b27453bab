"""Every metric's name, help, labels and buckets, in one place. Labels never carry user input.

Names and units after vLLM's convention with the prefix halfmoon_. Buckets resolve 1 ms: TTFT has vLLM's list, inter-token
latency SGLang's from 1 ms, phases a 1-2-5 series. Built into prometheus_client objects by protocol/exporter.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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
# fmt: on


class MetricSpec(NamedTuple):
    name: str  # without _total
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# proxy
TIME_TO_FIRST_TOKEN = MetricSpec(
    "halfmoon_time_to_first_token_seconds", "histogram", "Arrival to first token leaving the proxy.", (), TTFT_BUCKETS
)
TIME_TO_PREFILL_DONE = MetricSpec(
    "halfmoon_time_to_prefill_done_seconds", "histogram", "Arrival to the prefill worker's report.", (), TTFT_BUCKETS
)
TIME_PER_OUTPUT_TOKEN = MetricSpec(
    "halfmoon_time_per_output_token_seconds", "histogram", "Mean over a request's tokens after the first.", (), ITL_BUCKETS
)
INTER_TOKEN_LATENCY = MetricSpec(
    "halfmoon_inter_token_latency_seconds", "histogram", "Gap between two tokens leaving the proxy.", (), ITL_BUCKETS
)
E2E_REQUEST_LATENCY = MetricSpec("halfmoon_e2e_request_latency_seconds", "histogram", "Arrival to the last token.", (), PHASE_BUCKETS)
REQUEST_PHASE = MetricSpec("halfmoon_request_phase_seconds", "histogram", "Time of one phase of a request.", ("phase",), PHASE_BUCKETS)
REQUESTS = MetricSpec("halfmoon_requests", "counter", "Requests ended, by outcome and reason.", ("outcome", "reason"))
REQUEST_STATE = MetricSpec("halfmoon_request_transitions", "counter", "Transitions of the request state machine.", ("state",))
REQUEST_REPLAYS = MetricSpec("halfmoon_request_replays", "counter", "Requests run again on another pair, by reason.", ("reason",))
PROMPT_TOKENS = MetricSpec("halfmoon_prompt_tokens", "counter", "Prompt tokens of admitted requests.")
GENERATION_TOKENS = MetricSpec("halfmoon_generation_tokens", "counter", "Tokens sent to clients.")
MEMBERS = MetricSpec("halfmoon_members", "gauge", "Live workers and stores.", ("role",))
PLACEMENTS = MetricSpec(
    "halfmoon_placements", "counter", "Placements by policy; local: a decode worker computes the prompt itself.", ("policy",)
)
PREDICTED_TTFT = MetricSpec(
    "halfmoon_predicted_time_to_first_token_seconds", "histogram", "As time_to_first_token, predicted at placement.", (), TTFT_BUCKETS
)
PREDICTED_TPOT = MetricSpec(
    "halfmoon_predicted_time_per_output_token_seconds",
    "histogram",
    "The decode worker's step, predicted at placement.",
    (),
    ITL_BUCKETS,
)
PREDICTED_TTFT_ERROR = MetricSpec(
    "halfmoon_predicted_ttft_error_seconds", "histogram", "|predicted - measured| time to first token.", (), TTFT_BUCKETS
)
PREDICTED_TPOT_ERROR = MetricSpec(
    "halfmoon_predicted_tpot_error_seconds", "histogram", "|predicted - measured| time per output token.", (), ITL_BUCKETS
)
PREDICTION_ERROR = MetricSpec(
    "halfmoon_prediction_relative_error",
    "histogram",
    "|predicted - measured| / measured, by predictor (prefill, step, transfer, handoff, ttft, tpot).",
    ("predictor",),
    RELATIVE_ERROR_BUCKETS,
)
PREDICTION_ERROR_MEAN = MetricSpec(
    "halfmoon_prediction_relative_error_mean", "gauge", "Exponential mean of the relative error, the newest counting 2 %.", ("predictor",)
)
DECISIONS = MetricSpec(
    "halfmoon_decisions",
    "counter",
    "Placements by policy and kind: local, remote_prefix, own_prefix, no_prefix; replays included.",
    ("policy", "kind"),
)
REJECTIONS = MetricSpec(
    "halfmoon_rejections",
    "counter",
    "Requests refused, by who refused them (queue, conductor, drain, an admission) and error code.",
    ("admission", "code"),
)
SLO_REQUESTS = MetricSpec("halfmoon_slo_requests", "counter", "Finished requests that had the SLO (ttft, tpot).", ("slo", "met"))
GOODPUT_REQUESTS = MetricSpec("halfmoon_goodput_requests", "counter", "Finished requests inside every SLO that they had.")

REPLICATIONS = MetricSpec(
    "halfmoon_replications",
    "counter",
    "Copies of hot prefixes, by outcome: copied, cut_short, too_many (under way), over_budget, internal (a bug), or an error code.",
    ("outcome",),
)
REPLICATION_BYTES = MetricSpec("halfmoon_replication_bytes", "counter", "Bytes that stores copied as they were told to.")
REPLICATIONS_IN_FLIGHT = MetricSpec("halfmoon_replications_in_flight", "gauge", "Copies of hot prefixes under way.")

# every worker
NUM_REQUESTS_RUNNING = MetricSpec(
    "halfmoon_num_requests_running", "gauge", "Requests in the running batch (proxy: with a first token).", ("role",)
)
NUM_REQUESTS_WAITING = MetricSpec("halfmoon_num_requests_waiting", "gauge", "Requests waiting (proxy: without a first token).", ("role",))
KV_CACHE_USAGE = MetricSpec("halfmoon_kv_cache_usage_ratio", "gauge", "Share of a worker's pages in use.", ("role",))
STEP_SECONDS = MetricSpec("halfmoon_step_seconds", "histogram", "One engine step: forward pass, sampling, record.", ("role",), ITL_BUCKETS)
STEP_TOKENS = MetricSpec("halfmoon_step_tokens", "counter", "Tokens computed in engine steps.", ("role",))
SEQUENCES_FAILED = MetricSpec(
    "halfmoon_sequences_failed", "counter", "Sequences that a step could not compute, by error code.", ("role", "reason")
)
PREEMPTIONS = MetricSpec("halfmoon_num_preemptions", "counter", "Sequences preempted: their pages went to others.", ())
KV_TRANSFER_BYTES = MetricSpec(
    "halfmoon_kv_transfer_bytes", "counter", "KV bytes moved, by transport and direction.", ("transport", "direction")
)
KV_TRANSFER_SECONDS = MetricSpec(
    "halfmoon_kv_transfer_seconds", "histogram", "One hand-off's transfer.", ("transport", "direction"), PHASE_BUCKETS
)
HANDOFFS_REFUSED = MetricSpec("halfmoon_handoffs_refused", "counter", "Hand-offs that decode refused, by error code.", ("reason",))
PREFIX_CACHE_QUERIES = MetricSpec(
    "halfmoon_prefix_cache_queries",
    "counter",
    "Prompt tokens looked up, by tier: hbm, local, remote.",
    ("tier",),
)
PREFIX_CACHE_HITS = MetricSpec("halfmoon_prefix_cache_hits", "counter", "Prompt tokens found, by tier.", ("tier",))
PREFIX_LOAD_FAILURES = MetricSpec(
    "halfmoon_prefix_load_failures", "counter", "Cached prefixes computed instead of loaded, by error code.", ("reason",)
)

# store; arena = leased + cached + free, always
STORE_ARENA_BYTES = MetricSpec("halfmoon_store_arena_bytes", "gauge", "Bytes of the arena, by state.", ("state",))
STORE_LEASES = MetricSpec("halfmoon_store_leases", "gauge", "Leases held.")
STORE_HANDOFFS = MetricSpec("halfmoon_store_handoffs", "gauge", "Hand-offs not yet released.")
STORE_SESSIONS = MetricSpec("halfmoon_store_sessions", "gauge", "Clients attached.")
STORE_EVICTED_BLOCKS = MetricSpec("halfmoon_store_evicted_blocks", "counter", "Cached blocks evicted.")
STORE_SSD_BYTES = MetricSpec("halfmoon_store_ssd_bytes", "gauge", "The SSD tier, by state: used, free.", ("state",))
STORE_SSD_BLOCKS = MetricSpec(
    "halfmoon_store_ssd_blocks",
    "counter",
    "Blocks moved: demoted (written to the SSD), promoted (read back), dropped (their bytes did not match), failed (the disk refused).",
    ("outcome",),
)
STORE_EXPIRED_LEASES = MetricSpec("halfmoon_store_expired_leases", "counter", "Leases ended for want of a heartbeat or a live client.")
STORE_REPLICATED_BLOCKS = MetricSpec("halfmoon_store_replicated_blocks", "counter", "Blocks copied here out of another store.")
STORE_REPLICATED_BYTES = MetricSpec("halfmoon_store_replicated_bytes", "counter", "Their bytes.")
STORE_REPLICATION_SECONDS = MetricSpec(
    "halfmoon_store_replication_seconds",
    "histogram",
    "One Replicate, by outcome: complete, source (it held no more), no_room, cancelled, or an error code.",
    ("outcome",),
    PHASE_BUCKETS,
)
STORE_ABORTED_HANDOFFS = MetricSpec("halfmoon_store_aborted_handoffs", "counter", "Hand-offs aborted, by error code.", ("reason",))

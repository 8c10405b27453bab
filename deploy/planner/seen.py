"""What one run showed: the share in SLO, how busy each phase was, and what made requests late."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...proxy.conductor.placement import Slo
from ...simulator.outcome import Result, Row

FULL = 0.95  # of the pages


class Seen(NamedTuple):
    speed: float
    num_requests: int
    attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    late_share: float  # of the requests: first token after its SLO
    slow_share: float  # tokens slower than their SLO
    prefill_busy: float  # of the time of the instances that prefill
    decode_busy: float  # of the time of those that decode; less says little, for a step of one sequence takes its time, too
    pages_peak: float  # of the fullest instance's pages
    link_busy: float  # of the busiest link
    num_role_changes: int
    breaks: str  # what most of those outside missed, and why


def seen(result: Result, slo: Slo, speed: float) -> Seen:
    cluster, rows = result.cluster, result.rows
    end_s = max((row.arrival_s + row.e2e_s for row in rows if row.outcome == "done"), default=0.0) or 1e-9
    scenario, instances = cluster.scenario, cluster.instances
    both = scenario.coupled or scenario.flexible
    prefilling, decoding = ([one for one in instances if both or one.role == role] for role in ("prefill", "decode"))
    late = [row for row in rows if row.ttft_s > slo.ttft_s or row.ttft_s < 0]
    slow = [row for row in rows if row.tpot_s > slo.tpot_s]
    pages = max((_peak(rows, one.name, one.cost.kv_capacity_tokens) for one in decoding), default=0.0)
    links = [link.num_bytes / link.bytes_per_s / end_s for one in instances for link in (one.egress, one.ingress)]
    ttft, tpot = result.quantiles("ttft_s"), result.quantiles("tpot_s")
    return Seen(
        speed, len(rows), result.attainment(slo), ttft.p50, ttft.p90, tpot.p50, tpot.p90, len(late) / len(rows), len(slow) / len(rows),
        sum(one.prefill_s for one in prefilling) / end_s / len(prefilling),
        sum(one.busy_s - one.prefill_s for one in decoding) / end_s / len(decoding),
        pages, max(links), cluster.counters.num_role_changes, _breaks(late, slow, pages),
    )  # fmt: skip


def _peak(rows: list[Row], name: str, capacity: int) -> float:
    """Tokens of the sequences that decode on an instance at a time, answers counted whole, by its pages; at most 1."""
    here = [row for row in rows if row.decode_instance == name and row.outcome == "done"]
    if not here:
        return 0.0
    starts = [(row.arrival_s + row.ttft_s, row.num_input_tokens + row.num_output_tokens) for row in here]
    ends = [(row.arrival_s + row.e2e_s, -row.num_input_tokens - row.num_output_tokens) for row in here]
    held = np.cumsum([tokens for _, tokens in sorted(starts + ends)])
    return min(float(held.max()) / capacity, 1.0)


def _breaks(late: list[Row], slow: list[Row], pages: float) -> str:
    if not late and not slow:
        return "nothing"
    if len(slow) >= len(late):
        return "TPOT: decode steps" + (", pages full" if pages >= FULL else "")
    started = [row for row in late if row.prefill_done_s >= 0 and row.prefill_start_s >= 0 and row.ttft_s >= 0]
    if not started:
        return "TTFT"
    waits = {
        "queue for prefill": np.mean([row.prefill_start_s - row.arrival_s for row in started]),
        "the prompts' own prefill": np.mean([row.prefill_done_s - row.prefill_start_s for row in started]),
        "room in decode's pages" if pages >= FULL else "hand-off": np.mean(
            [row.ttft_s - (row.prefill_done_s - row.arrival_s) for row in started]
        ),
    }
    return f"TTFT: {max(waits, key=lambda name: float(waits[name]))}"

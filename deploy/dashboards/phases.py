"""P/D: where a request's time goes, in the order in which it flows, and what the workers do meanwhile."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from .panels import Query, bars, board, events, mean, quantile, rate, series

PHASES = ("queue", "prefill_queue", "prefix_load", "prefill", "push", "handoff_wait", "write", "first_decode")


def phases() -> dashboard.Dashboard:
    found = board("Halfmoon: P/D", "halfmoon-pd", "Phases in flow order, queues, hand-off, engines, members.")
    return _members(_handoff(_engine(_queues(_phases(found)))))


def _phases(found: dashboard.Dashboard) -> dashboard.Dashboard:
    name = "halfmoon_request_phase_seconds"
    means = [Query(mean(name, where=f'phase="{phase}"'), phase) for phase in PHASES]
    return (
        found.with_row(dashboard.Row("Where the time goes"))
        .with_panel(
            series(
                "Time to first token and the first gap, by phase",
                "s",
                "Means, from the bottom in the order of the flow. The band that grows is the bottleneck.",
                *means,
                width=16,
                stacked=True,
            )
        )
        .with_panel(bars("Phases now", "s", "The same means, beside each other.", *means))
    )


def _queues(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Queues"))
        .with_panel(
            series(
                "At the proxy",
                "short",
                "Requests under way.",
                Query("sum(halfmoon_requests_waiting)", "without a first token"),
                Query("sum(halfmoon_requests_streaming)", "streaming"),
            )
        )
        .with_panel(
            series(
                "At the workers",
                "short",
                "Waiting: for pages or for a hand-off.",
                Query("sum by (role) (halfmoon_num_requests_waiting)", "{{role}} waiting"),
                Query("sum by (role) (halfmoon_num_requests_running)", "{{role}} running"),
            )
        )
        .with_panel(
            series(
                "Outstanding tokens",
                "short",
                "Prefill: still to compute. Decode: context held. Uneven lines: an uneven balance.",
                Query("max by (member) (halfmoon_member_outstanding_tokens)", "{{member}}"),
            )
        )
    )


def _engine(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Engines"))
        .with_panel(
            series("Step time, p90", "s", "Of decode: the floor of TPOT.", quantile("halfmoon_step_seconds", 0.9, "role", "worker"))
        )
        .with_panel(
            series(
                "Batch size",
                "short",
                "Mean sequences a step.",
                Query(mean("halfmoon_step_sequences", "role", "worker"), "{{role}} {{worker}}"),
            )
        )
        .with_panel(
            series(
                "Tokens computed",
                "short",
                "A second, by role.",
                Query(rate("halfmoon_step_tokens_total", "role"), "{{role}}"),
                stacked=True,
            )
        )
        .with_panel(
            series(
                "Model operations",
                "flops",
                "A second, by the model's shape.",
                Query(rate("halfmoon_model_flops_total", "worker"), "{{worker}}"),
            )
        )
        .with_panel(
            series(
                "MFU",
                "percentunit",
                "Needs a device whose peak is known. Model operations over the device's peak.",
                Query("halfmoon:mfu:ratio_rate5m", "{{worker}}"),
            )
        )
        .with_panel(
            series(
                "Engine memory",
                "bytes",
                "Weights and KV pages.",
                Query("sum by (kind) (halfmoon_engine_memory_bytes)", "{{kind}}"),
                stacked=True,
            )
        )
    )


def _handoff(found: dashboard.Dashboard) -> dashboard.Dashboard:
    moved = Query(rate("halfmoon_kv_transfer_bytes_total", "transport", "direction"), "{{direction}} by {{transport}}")
    return (
        found.with_row(dashboard.Row("Hand-off"))
        .with_panel(series("KV moved", "Bps", "By transport: inside a node all of it is shm.", moved))
        .with_panel(
            series("Transfer time, p90", "s", "Of one transfer.", quantile("halfmoon_kv_transfer_seconds", 0.9, "direction", "transport"))
        )
        .with_panel(
            series(
                "Ways that were slower",
                "reqps",
                "Fallbacks, and hand-offs that decode refused or a store aborted.",
                events("halfmoon_fallbacks_total", "reason"),
                events("halfmoon_handoffs_refused_total", "reason"),
                events("halfmoon_store_aborted_handoffs_total", "reason"),
            )
        )
    )


def _members(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Members"))
        .with_panel(
            bars(
                "Role map", "short", "1: alive in this role.", Query("max by (member, role) (halfmoon_member_up)", "{{member}} as {{role}}")
            )
        )
        .with_panel(
            series(
                "Oldest step",
                "s",
                "A line that rises without end is an engine that hangs.",
                Query("max by (worker) (halfmoon_oldest_step_age_seconds)", "{{worker}}"),
                Query("max by (member) (halfmoon_member_report_age_seconds)", "{{member}}: last report"),
            )
        )
        .with_panel(
            series(
                "Deaths",
                "short",
                "Processes that left or died in the last hour, and the share of capacity that was lost by it.",
                Query("sum by (member) (increase(halfmoon_member_losses_total[1h]))", "{{member}}"),
                Query("halfmoon:failure_rate:ratio_rate1h", "{{role}}: capacity lost (share)"),
            )
        )
        .with_panel(series("CPU", "short", "Cores in use.", Query(rate("process_cpu_seconds_total", "worker"), "{{worker}}"), width=12))
        .with_panel(
            series(
                "Resident memory",
                "bytes",
                "Shared memory of the arena included.",
                Query("max by (worker) (process_resident_memory_bytes)", "{{worker}}"),
                width=12,
            )
        )
    )

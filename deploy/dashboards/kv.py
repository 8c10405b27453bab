"""KV: what is found in a cache, at which tier, how long it stays, and what is copied ahead of demand."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from .panels import WINDOW, Query, board, events, quantile, rate, series


def kv() -> dashboard.Dashboard:
    found = board("Halfmoon: KV", "halfmoon-kv", "Hit rate by tier, residency, eviction, replication.")
    return _replication(_leases(_residency(_hits(found))))


def _hits(found: dashboard.Dashboard) -> dashboard.Dashboard:
    cached = f"{rate('halfmoon_cached_prompt_tokens_total')} / {rate('halfmoon_request_prompt_tokens_sum')}"
    held = f"{rate('halfmoon_store_hit_blocks_total', 'worker')} / {rate('halfmoon_store_query_blocks_total', 'worker')}"
    return (
        found.with_row(dashboard.Row("Hits"))
        .with_panel(
            series("Prompt tokens from a cache", "percentunit", "Of all prompts: what a user's bill shows.", Query(cached, "cached"))
        )
        .with_panel(
            series("Hit rate by tier", "percentunit", "Of tokens looked up there.", Query("halfmoon:prefix_hits:ratio_rate5m", "{{tier}}"))
        )
        .with_panel(series("Hit rate by store", "percentunit", "Blocks found, of those looked up.", Query(held, "{{worker}}")))
    )


def _residency(found: dashboard.Dashboard) -> dashboard.Dashboard:
    turnover = rate("halfmoon_store_evicted_blocks_total", "worker")
    return (
        found.with_row(dashboard.Row("Residency and eviction"))
        .with_panel(
            series(
                "Arena",
                "bytes",
                "leased + cached + free is the arena, always. No free and no cached: hand-offs wait.",
                Query("sum by (state) (halfmoon_store_arena_bytes)", "{{state}}"),
                stacked=True,
            )
        )
        .with_panel(
            series(
                "Pages in use",
                "percentunit",
                "At 1 sequences wait or are preempted.",
                Query("max by (worker) (halfmoon_kv_cache_usage_ratio)", "{{worker}}"),
            )
        )
        .with_panel(
            series(
                "Eviction and preemption",
                "short",
                "A second: blocks evicted from stores, sequences that lost their pages.",
                Query(turnover, "{{worker}}: blocks evicted"),
                Query(rate("halfmoon_num_preemptions_total", "worker"), "{{worker}}: preempted"),
            )
        )
    )


def _leases(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Leases"))
        .with_panel(
            series(
                "Held now",
                "short",
                "All return to 0 at rest, but for sessions.",
                Query("sum(halfmoon_store_leases)", "leases"),
                Query("sum(halfmoon_store_handoffs)", "hand-offs"),
                Query("sum(halfmoon_store_sessions)", "sessions"),
            )
        )
        .with_panel(
            series(
                "Leases expired",
                "short",
                "A second: for want of a heartbeat.",
                Query(rate("halfmoon_store_expired_leases_total", "worker"), "{{worker}}"),
            )
        )
        .with_panel(
            series(
                "Prefixes computed after all",
                "short",
                "A second: loads that failed, by error code.",
                events("halfmoon_prefix_load_failures_total", "reason"),
            )
        )
    )


def _replication(found: dashboard.Dashboard) -> dashboard.Dashboard:
    times = quantile("halfmoon_store_replication_seconds", 0.9, "outcome").expr
    zero = 'label_replace(0 * max(halfmoon_build_info{role="proxy"}), "outcome", "none", "", "")'
    return (
        found.with_row(dashboard.Row("Replication of hot prefixes"))
        .with_panel(series("Copies", "short", "A second, by outcome.", events("halfmoon_replications_total", "outcome")))
        .with_panel(
            series(
                "Bytes copied",
                "Bps",
                "By the proxy's orders, and as stores received them.",
                Query(rate("halfmoon_replication_bytes_total"), "ordered"),
                Query(rate("halfmoon_store_replicated_bytes_total", "worker"), "{{worker}}"),
            )
        )
        .with_panel(
            series(
                "Copy time, p90",
                "s",
                f"Over {WINDOW}; copies under way beside it.",
                Query(f"{times} or {zero}", "{{outcome}}"),
                Query("sum(halfmoon_replications_in_flight)", "under way (count)"),
            )
        )
    )

"""SLO: are users served as they were promised, how much of the budget is left, what was missed."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from .panels import Query, board, events, number, quantiles, rate, series

BURN = "halfmoon:slo_misses:ratio_rate{window} / on () group_left () (1 - halfmoon:slo_objective:ratio)"


def slo() -> dashboard.Dashboard:
    found = board("Halfmoon: SLO", "halfmoon-slo", "Attainment, goodput, error budget and burn rate, by verdicts that the proxy counts.")
    return _load(_misses(_latency(_budget(_now(found)))))


def _now(found: dashboard.Dashboard) -> dashboard.Dashboard:
    attained = Query("halfmoon:attainment:ratio_rate5m", "attainment")
    left = 'halfmoon:slo_budget_left:ratio{{slo="{slo}"}}'
    return (
        found.with_row(dashboard.Row("Now"))
        .with_panel(number("Attainment", "percentunit", "Requests inside every SLO, of those judged; 5 minutes.", attained, red_below=0.99))
        .with_panel(number("Goodput", "reqps", "Requests a second inside every SLO.", Query("halfmoon:goodput:rate5m", "goodput")))
        .with_panel(number("Requests ended", "reqps", "Of every outcome.", Query(rate("halfmoon_requests_total"), "requests")))
        .with_panel(number("TTFT budget left", "percentunit", "Of 30 days.", Query(left.format(slo="ttft"), "ttft"), red_below=0.0))
        .with_panel(number("TPOT budget left", "percentunit", "Of 30 days.", Query(left.format(slo="tpot"), "tpot"), red_below=0.0))
        .with_panel(number("Waiting", "short", "Requests without a first token.", Query("sum(halfmoon_requests_waiting)", "waiting")))
    )


def _budget(found: dashboard.Dashboard) -> dashboard.Dashboard:
    burns = [Query(BURN.format(window=window), f"{{{{slo}}}} {window}") for window in ("5m", "1h", "6h")]
    return (
        found.with_row(dashboard.Row("Error budget"))
        .with_panel(
            series(
                "Burn rate",
                "short",
                "1 uses the budget up in 30 days. Pages at 14.4 over 1h and 5m, tickets at 6 over 6h and 30m.",
                *burns,
                width=12,
                limits=[6.0, 14.4],
            )
        )
        .with_panel(
            series(
                "Attainment and goodput",
                "short",
                "Goodput falls with the load offered, attainment does not: read both.",
                Query("halfmoon:attainment:ratio_rate5m", "attainment (share)"),
                Query("halfmoon:goodput:rate5m", "goodput (requests/s)"),
                width=12,
            )
        )
    )


def _latency(found: dashboard.Dashboard) -> dashboard.Dashboard:
    found = found.with_row(dashboard.Row("Latency, as the client's connection sees it"))
    for title, name, look in (
        ("Time to first token", "halfmoon_time_to_first_token_seconds", "To the write of the first token."),
        ("Time per output token", "halfmoon_time_per_output_token_seconds", "A request's mean after its first token."),
        ("Inter-token latency", "halfmoon_inter_token_latency_seconds", "Single gaps: a stall that a mean hides shows in p99."),
    ):
        found = found.with_panel(series(title, "s", look, *quantiles(name, 0.5, 0.9, 0.99)))
    return found


def _misses(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("What was missed"))
        .with_panel(
            series(
                "Verdicts",
                "reqps",
                "none: in SLO. left: the client went before a bound was broken.",
                events("halfmoon_requests_total", "miss"),
                stacked=True,
            )
        )
        .with_panel(series("Ends", "reqps", "By outcome and reason.", events("halfmoon_requests_total", "outcome", "reason"), stacked=True))
        .with_panel(
            series("Refusals", "reqps", "Answered with an error status, by error code.", events("halfmoon_refusals_total", "face", "code"))
        )
    )


def _load(found: dashboard.Dashboard) -> dashboard.Dashboard:
    lengths = [
        Query(quantiles(f"halfmoon_request_{kind}_tokens", 0.9)[0].expr, f"{name} p90")
        for kind, name in (("prompt", "prompt"), ("generation", "answer"))
    ]
    return (
        found.with_row(dashboard.Row("Load"))
        .with_panel(
            series(
                "Requests under way",
                "short",
                "Waiting grows first when prefill is the bottleneck.",
                Query("sum(halfmoon_requests_waiting)", "without a first token"),
                Query("sum(halfmoon_requests_streaming)", "streaming"),
                stacked=True,
            )
        )
        .with_panel(
            series(
                "Tokens",
                "short",
                "A second.",
                Query(rate("halfmoon_prompt_tokens_total"), "prompt"),
                Query(rate("halfmoon_cached_prompt_tokens_total"), "of it cached"),
                Query(rate("halfmoon_generation_tokens_total"), "generated"),
            )
        )
        .with_panel(series("Lengths", "short", "Tokens of finished requests.", *lengths))
    )

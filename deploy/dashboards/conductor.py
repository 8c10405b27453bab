"""Conductor: what was predicted and what came of it, what was decided and why, what was refused."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from .panels import Query, board, events, mean, quantile, rate, series


def conductor() -> dashboard.Dashboard:
    found = board("Halfmoon: Conductor", "halfmoon-conductor", "Predicted against actual, decisions by reason, rejections.")
    return _refusals(_decisions(_predictions(found)))


def _both(name: str) -> list[Query]:
    return [
        Query(mean(f"halfmoon_predicted_{name}_seconds"), "predicted"),
        Query(mean(f"halfmoon_{name}_seconds"), "actual"),
    ]


def _predictions(found: dashboard.Dashboard) -> dashboard.Dashboard:
    look = "Means. Lines apart: placement and admission decide by wrong numbers."
    return (
        found.with_row(dashboard.Row("Predicted against actual"))
        .with_panel(series("Time to first token", "s", look, *_both("time_to_first_token"), width=12))
        .with_panel(series("Time per output token", "s", look, *_both("time_per_output_token"), width=12))
        .with_panel(
            series(
                "Relative error now",
                "percentunit",
                "Exponential mean, by predictor: which of them is off.",
                Query("max by (predictor) (halfmoon_prediction_relative_error_mean)", "{{predictor}}"),
                width=12,
                limits=[0.5],
            )
        )
        .with_panel(
            series(
                "Relative error, p90",
                "percentunit",
                "Of single predictions.",
                quantile("halfmoon_prediction_relative_error", 0.9, "predictor"),
                width=12,
            )
        )
    )


def _decisions(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Decisions"))
        .with_panel(
            series(
                "By kind",
                "reqps",
                "local: the decode worker computes the prompt. remote_prefix: from another store.",
                Query(rate("halfmoon_decisions_total", "kind"), "{{kind}}"),
                stacked=True,
            )
        )
        .with_panel(
            series("By policy", "reqps", "Placements, replays included.", Query(rate("halfmoon_placements_total", "policy"), "{{policy}}"))
        )
        .with_panel(
            series(
                "Transitions",
                "reqps",
                "Of the request state machine.",
                Query(rate("halfmoon_request_transitions_total", "state"), "{{state}}"),
            )
        )
    )


def _refusals(found: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        found.with_row(dashboard.Row("Refused and replayed"))
        .with_panel(series("Rejections", "reqps", "By who refused and why.", events("halfmoon_rejections_total", "admission", "code")))
        .with_panel(series("Replays", "reqps", "By the error that ended the attempt.", events("halfmoon_request_replays_total", "reason")))
        .with_panel(series("Fallbacks", "reqps", "Slower ways than the cluster is made for.", events("halfmoon_fallbacks_total", "reason")))
    )

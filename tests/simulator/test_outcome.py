from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from halfmoon.deploy.cli import simulate as command
from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.conductor.placement import Slo
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.goodput import GoodputSearch
from halfmoon.simulator.outcome import Result, longest_gaps_mean, mean_and_sd
from halfmoon.simulator.plots import load_over_time
from halfmoon.simulator.replay import Replay, ReplayOptions
from halfmoon.simulator.report import write_csv
from halfmoon.simulator.scenario import Scenario, find_cost_model
from halfmoon.simulator.sweep import scenarios, sweep
from halfmoon.simulator.trace import Trace

Talk = Callable[..., Replay]


def test_tbt_is_the_mean_of_the_longest_tenth_of_the_gaps() -> None:
    gaps = np.array([1.0] * 18 + [5.0, 9.0])
    assert longest_gaps_mean(np.concatenate([[0.0], np.cumsum(gaps)])) == pytest.approx(7.0)
    assert longest_gaps_mean(np.array([0.0, 2.0, 5.0])) == pytest.approx(3.0), "one gap at least"
    assert longest_gaps_mean(np.array([4.0])) == 0.0


def test_the_shipped_cost_model_is_the_published_formula() -> None:
    cost = find_cost_model("a800-70b")
    for total, prefix in ((8, 0), (32, 0), (128, 0), (64, 60), (128, 121.6)):
        published = 27.6 * (0.004012 * (total - prefix) + 2.969e-5 * (total**2 - prefix**2))
        assert cost.prefill_time(round((total - prefix) * 1024), round(prefix * 1024)) == pytest.approx(published, rel=1e-4)
    assert cost.step_time(20, 240 * 1024) == pytest.approx(0.0261 + 20 * 0.153e-3 + 240 * 0.034e-3)
    assert cost.cache_tokens // 512 == 5859
    with pytest.raises(ConfigError, match="a800-70b"):
        find_cost_model("h900")


def test_attainment_counts_rejected_requests_as_outside(small_cost: CostModel, talk: Talk) -> None:
    scenario = Scenario(cost=small_cost, num_prefill=1, num_decode=1, admission="ttft_tbt", slo=Slo(1.0, 0.1))
    result = Result(simulate(scenario, talk(80, 1, gap_s=0.1)))
    assert 0 < result.num_rejected() < 80
    assert result.num_in_slo(scenario.slo) <= 80 - result.num_rejected()
    by_hand = sum(row.outcome == "done" and row.ttft_s <= 1.0 and row.tbt_s <= 0.1 for row in result.rows)
    assert result.attainment(scenario.slo) == by_hand / 80


def test_the_predicted_first_token_of_a_queue_in_order_is_what_comes(small_cost: CostModel, talk: Talk) -> None:
    result = Result(simulate(Scenario(cost=small_cost, num_prefill=1, num_decode=1, order="fcfs", max_tokens_per_step=128), talk(60, 4)))
    errors = [abs(row.predicted_ttft_s - (row.prefill_done_s - row.arrival_s)) for row in result.rows]
    assert float(np.median(errors)) < 0.128, "a step's worth, of 128 tokens"


def test_a_conductor_that_knows_the_machine_badly_learns_it_in_the_run(small_cost: CostModel, talk: Talk) -> None:
    wrong = dataclasses.replace(small_cost, per_token_s=4e-3, step_s=0.05)
    scenario = Scenario(cost=small_cost, num_prefill=2, num_decode=1, knows=wrong)
    cluster = simulate(scenario.with_(learn=True), talk(200, 4))
    for predictors, close in ((simulate(scenario, talk(200, 4)).predictors, False), (cluster.predictors, True)):
        assert (abs(predictors.prefill.predict(1000, 0) - 1.0) < 0.05) == close
        assert (abs(predictors.step.predict(3, 3000) - 0.013) < 0.001) == close
    assert cluster.predictors.prefill.error.num_observations > 100


def test_load_over_time_ends_with_nothing_under_way(small_cost: CostModel, talk: Talk) -> None:
    result = Result(simulate(Scenario(cost=small_cost, num_prefill=1, num_decode=1), talk(40, 2)))
    times, prefilling, decoding, rejected = load_over_time(result, 1.0)
    assert len(times) == len(prefilling) == len(decoding) == len(rejected)
    assert prefilling[-1] == decoding[-1] == rejected.sum() == 0
    assert prefilling.max() > 0


def test_goodput_is_the_speed_at_which_attainment_falls_below_the_level(small_cost: CostModel, talk: Talk) -> None:
    requests = talk(300, 1, gap_s=1.0).requests
    trace = Trace("talk", "", tuple(requests))
    search = GoodputSearch(trace, ReplayOptions(), tolerance=0.05)
    scenario = Scenario(cost=small_cost, num_prefill=1, num_decode=1, order="fcfs", slo=Slo(6.0, 0.1))
    found = search.search(scenario, 1.0)
    assert found.speed > 0.1
    assert search.attainment(scenario, found.speed * 0.85) >= 0.9
    assert search.attainment(scenario, found.speed * 1.2) < 0.9
    runs = search.num_runs
    search.search(scenario.with_(slo=Slo(6.0, 0.05)), 1.0)
    assert search.num_runs - runs < found.num_runs, "runs that know no SLO are kept"


def test_a_speed_that_never_holds_is_zero(small_cost: CostModel, talk: Talk) -> None:
    trace = Trace("talk", "", tuple(talk(30, 1).requests))
    scenario = Scenario(cost=small_cost, num_prefill=1, num_decode=1, slo=Slo(1e-6, 0.1))
    assert GoodputSearch(trace, ReplayOptions()).search(scenario).speed == 0.0


def test_a_sweep_runs_every_combination_and_adaptive_once(small_cost: CostModel, talk: Talk) -> None:
    base = Scenario(cost=small_cost, num_prefill=2, num_decode=2)
    chosen = scenarios(base, ["random", "adaptive"], ["none", "ttft_tbt"], [(2, 2), (3, 1)])
    assert len(chosen) == 2 * 2 + 2
    rows = list(sweep(chosen, lambda seed: talk(30, seed), [0, 1]))
    assert [row.scenario for row in rows] == chosen
    assert all(row.figures["num_requests"] == 30 for row in rows)
    assert mean_and_sd([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_a_csv_has_a_line_a_request(small_cost: CostModel, talk: Talk, tmp_path: Path) -> None:
    result = Result(simulate(Scenario(cost=small_cost, num_prefill=1, num_decode=1), talk(20, 2)))
    write_csv(result, tmp_path / "requests.csv")
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert [float(row["ttft_s"]) for row in rows] == [row.ttft_s for row in result.rows]


@pytest.fixture
def trace_file(talk: Talk, tmp_path: Path) -> Path:
    lines = [
        {"timestamp": request.arrival_s * 1e3, "input_length": request.num_input_tokens, "output_length": request.num_output_tokens,
         "hash_ids": list(request.block_ids)}
        for request in talk(40, 1).requests
    ]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def invoke(*arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(command.simulate)
    done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "160"})
    return done.exit_code, done.output


def test_the_command_writes_the_same_figures_for_the_same_seed(trace_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = [
        invoke("--trace", str(trace_file), "--prefill", "2", "--decode", "1", "--policy", "random", "--out", str(tmp_path / name))
        for name in "ab"
    ]
    assert told[0][0] == 0, told[0][1]
    assert (tmp_path / "a" / "figures.json").read_text() == (tmp_path / "b" / "figures.json").read_text()
    assert (tmp_path / "a" / "requests.csv").read_text() == (tmp_path / "b" / "requests.csv").read_text()
    assert (tmp_path / "a" / "run.png").stat().st_size > 1000
    found = json.loads((tmp_path / "a" / "figures.json").read_text())
    assert found["result"]["num_done"] == 40 and found["kind"] == "simulated"


def test_the_command_searches_goodput_and_sweeps(trace_file: Path, tmp_path: Path) -> None:
    code, told = invoke("--trace", str(trace_file), "--prefill", "1", "--decode", "1", "--goodput", "--speed", "8", "--out", str(tmp_path))
    assert code == 0 and "goodput:" in told
    assert json.loads((tmp_path / "goodput.json").read_text())["goodput_speed"] > 0
    code, told = invoke(
        "--trace", str(trace_file), "--policy", "random,adaptive", "--sweep", "--splits", "4,8", "--seeds", "2", "--out", str(tmp_path)
    )
    assert code == 0, told
    assert len(listed := json.loads((tmp_path / "sweep.json").read_text())) == 3
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["scenario"], float(row["ttft_mean_s"]), float(row["ttft_mean_s_sd"])) for row in rows] == [
        (one["title"], one["mean"]["ttft_mean_s"], one["sd"]["ttft_mean_s"]) for one in listed
    ]


def test_the_command_kills_instances_and_sizes_both_tiers(trace_file: Path, tmp_path: Path) -> None:
    arguments = ["--trace", str(trace_file), "--prefill", "2", "--decode", "2", "--no-png", "--out", str(tmp_path)]
    code, told = invoke(*arguments, "--fail", "5:n0000:3", "--fail", "6:n0003", "--dram", "4096", "--ssd", "200000")
    assert code == 0, told
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["scenario"]["failures"] == [
        {"at_s": 5.0, "instance": "n0000", "down_s": 3.0}, {"at_s": 6.0, "instance": "n0003", "down_s": "inf"}
    ]  # fmt: skip
    assert found["result"]["num_done"] == 40 and found["result"]["ssd_gb"] > 0
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    # tokens that n0003 gave last came before it died
    assert all(float(row["arrival_s"]) + float(row["e2e_s"]) < 6.0 for row in rows if row["decode_instance"] == "n0003")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--policy", "fastest"],
        ["--admission", "all"],
        ["--trace", "nowhere.jsonl"],
        ["--cost-model", "h900"],
        ["--order", "x"],
        ["--fail", "5"],
        ["--fail", "x:n0001"],
        ["--fail", "5:n0001:-2"],
        ["--fail", "5:n0099"],
    ],
)
def test_the_command_refuses_nonsense_in_one_line(trace_file: Path, wrong: list[str]) -> None:
    arguments = wrong if wrong[0] == "--trace" else ["--trace", str(trace_file), *wrong]
    code, told = invoke(*arguments)
    assert code == 1 and "Traceback" not in told

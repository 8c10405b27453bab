"""Whole arms against fake servers: warm-up, windows, comparison, budget, goodput, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from halfmoon.deploy.load import results, tables
from halfmoon.deploy.load.arm import ArmOptions, ArmTarget, run_arm
from halfmoon.deploy.load.plots import write_png
from halfmoon.deploy.load.summary import Slo
from halfmoon.deploy.load.synthetic_plan import SyntheticOptions, synthetic_plan
from halfmoon.protocol.errors import ConfigError, Unavailable

PLAN = synthetic_plan(SyntheticOptions(num_requests=6, input_len="20", output_len="3", num_warm_up=2, seed=5))


def options(**values: Any) -> ArmOptions:
    return ArmOptions(**({"factors": (50.0,), "slos": (Slo(5.0, 5.0),), "seed": 5} | values))


async def test_a_warm_up_is_sent_first_and_not_measured(fake) -> None:
    async with fake.FakeServer(fake.steady(0.0, 0.0)) as server:
        arm = await run_arm(ArmTarget("one", (server.url,)), PLAN, options(factors=(50.0, 100.0)))
    assert len(server.seen) == 2 + 6 + 6 and arm["num_warm_up"] == 2
    assert [window["factor"] for window in arm["windows"]] == [50.0, 100.0]
    assert [window["summary"]["num_requests"] for window in arm["windows"]] == [6, 6]


async def test_arms_get_the_same_requests_and_no_window_a_prompt_of_another(fake) -> None:
    prompts: list[list[tuple[int, ...]]] = []
    for _ in range(2):
        async with fake.FakeServer(fake.steady(0.0, 0.0)) as server:
            await run_arm(ArmTarget("a", (server.url,)), PLAN, options(factors=(50.0, 100.0)))
        prompts.append(sorted(tuple(seen.body["prompt"]) for seen in server.seen))
    assert prompts[0] == prompts[1] and len(set(prompts[0])) == 14


async def test_no_window_begins_after_the_budget_and_the_rest_is_told(fake) -> None:
    async with fake.FakeServer(fake.steady(0.0, 0.0)) as server:
        arm = await run_arm(ArmTarget("a", (server.url,)), PLAN, options(factors=(50.0, 100.0), budget_s=0.0))
    assert arm["windows"] == [] and arm["left_out"] == [50.0, 100.0]
    assert any("no time was left for 50, 100" in line for line in tables.warnings([arm]))


async def test_a_goodput_search_runs_a_window_a_probe_and_keeps_the_bracket(fake) -> None:
    answered: list[int] = []

    def answer(body: dict[str, Any]) -> Any:
        answered.append(len(answered) // 20)  # the window it belongs to
        holds = answered[-1] in (0, 1, 4)  # 50, 100 and 119 a second; 200 and 141 do not
        return fake.Script([0.0, 0.0]) if holds else fake.Script(status=429, body={"error": {"message": "full"}})

    plan = synthetic_plan(SyntheticOptions(num_requests=20, input_len="20", output_len="2", process="constant"))
    async with fake.FakeServer(answer) as server:
        arm = await run_arm(ArmTarget("a", (server.url,)), plan, options(factors=(50.0,), goodput=True, tolerance=0.2))
    found = arm["goodput"]
    assert [probe["factor"] for probe in found["probes"]] == pytest.approx([50, 100, 200, 100 * 2**0.5, 100 * 2**0.25])
    assert found["holds"] == {"factor": pytest.approx(100 * 2**0.25), "attainment": 1.0}
    assert found["fails"] == {"factor": pytest.approx(100 * 2**0.5), "attainment": 0.0}
    assert len(arm["windows"]) == 5 and "goodput at 5 s" in tables.goodput_lines([arm])[0]


async def test_requests_that_the_model_cannot_hold_are_told_before_they_are_sent(fake) -> None:
    async with fake.FakeServer(fake.steady(0.0, 0.0), max_model_len=22) as server:
        with pytest.raises(ConfigError, match="6 of 6 requests are longer than the 22 tokens"):
            await run_arm(ArmTarget("a", (server.url,)), PLAN, options())
    assert not server.seen


async def test_an_endpoint_that_does_not_answer_or_lacks_the_model_is_told(fake) -> None:
    with pytest.raises(Unavailable, match=r"no OpenAI endpoint at http://127\.0\.0\.1:9/v1/models"):
        await run_arm(ArmTarget("a", ("127.0.0.1:9",)), PLAN, options())
    async with fake.FakeServer(fake.steady(0.0, 0.0)) as server:
        with pytest.raises(ConfigError, match="it has fake"):
            await run_arm(ArmTarget("a", (server.url,)), PLAN, options(model="other"))


async def test_a_warm_up_of_which_nothing_succeeds_ends_the_arm(fake) -> None:
    async with fake.FakeServer(lambda body: fake.Script(status=500, body={"error": {"message": "bad"}})) as server:
        with pytest.raises(Unavailable, match="500: bad"):
            await run_arm(ArmTarget("a", (server.url,)), PLAN, options())


async def test_files_hold_every_request_and_come_back_merged(fake, tmp_path: Path) -> None:
    async with fake.FakeServer(fake.steady(0.01, 0.005)) as server:
        arm = await run_arm(ArmTarget("a", (server.url,)), PLAN, options(), command="halfmoon bench serve")
    for name in ("one", "two"):
        results.write_json([arm], tmp_path / f"{name}.json")
    arms = results.merge([tmp_path / "one.json", tmp_path / "two.json"])
    assert [one["name"] for one in arms] == ["a", "a (2)"] and results.different_loads(arms) == []
    arms[1]["options"]["seed"] = 6
    assert results.different_loads(arms) == ["seed"]
    latency, rates = tables.joint_tables(arms)
    assert [row[0] for row in latency.rows] == ["a", "a (2)"] and rates.rows[0][-1] == "100 / 100"
    results.write_csv(arms, tmp_path / "requests.csv")
    rows = list(csv.DictReader((tmp_path / "requests.csv").open()))
    assert len(rows) == 12 and {row["outcome"] for row in rows} == {"ok"} and {row["rate"] for row in rows} == {"50.0"}
    write_png(arms, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ConfigError, match="not written by"):
        results.read_json(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="no file"):
        results.read_json(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("text", "name", "urls"),
    [("vllm=a:1,b:2", "vllm", ("a:1", "b:2")), ("http://a:1", "a:1", ("http://a:1",)), ("a:1,b:2", "a:1", ("a:1", "b:2"))],
)
def test_targets_are_read(text: str, name: str, urls: tuple[str, ...]) -> None:
    assert ArmTarget.parse(text) == ArmTarget(name, urls)

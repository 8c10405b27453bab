"""The size that a plan finds, against running every form; and what it says where nothing holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from halfmoon.deploy.planner.forms import Form, adaptive, coupled, neighbours, split
from halfmoon.deploy.planner.runner import Carried, Runner, Search
from halfmoon.deploy.planner.sizing import Plan, Target, size
from halfmoon.deploy.planner.synthetic import synthetic_trace
from halfmoon.deploy.planner.verdict import Question, headline, lines, plain, table
from halfmoon.deploy.planner.window import Window, choose_window
from halfmoon.proxy.conductor.placement import Slo
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.cluster import simulate
from halfmoon.simulator.outcome import Result
from halfmoon.simulator.replay import replay
from halfmoon.simulator.scenario import Scenario

SLO = Slo(1.5, 0.03)


class Case:
    """Prompts of 200 tokens and answers of 20, five a second: an instance has 0.2 s of prefill for each."""

    def __init__(self, cost: CostModel, slo: Slo = SLO, level: float = 0.9, budget_s: float = float("inf")) -> None:
        self.target = Target(slo, level, 0.2)
        trace = synthetic_trace(5.0, "uniform:100:300", "20", "poisson", 1.0, seed=3)
        self.window: Window = choose_window(trace, cost, slo, longest=1000, num_instances=4, num_requests=100)
        self.base = Scenario(cost=cost, slo=slo)
        self.runner = Runner(self.window.trace, self.window.options, level, num_processes=1, budget_s=budget_s)
        self.asked = Question("small", "h100", 1, 4, trace.name, self.target, cost)

    def plan(self, num_instances: int = 4) -> Plan:
        return size(self.window, self.base, self.target, num_instances, self.runner)

    def attainment(self, form: Form, speed: float) -> float:
        """By the simulator alone."""
        options = dataclasses.replace(self.window.options, speed=speed)
        return Result(simulate(form.scenario(self.base), replay(self.window.trace, options))).attainment(self.target.slo)


@pytest.fixture(scope="module")
def case(small_cost: CostModel) -> Case:
    return Case(small_cost)


@pytest.fixture(scope="module")
def found(case: Case) -> Plan:
    return case.plan()


def forms(num: int) -> Iterator[Form]:
    yield coupled(num)
    if num > 1:
        yield adaptive(num)
        yield from (split(number, num) for number in range(1, num))


def test_the_plan_is_the_least_size_of_which_a_form_holds_the_load_with_its_margin(case: Case, found: Plan) -> None:
    speed = case.window.speed * 1.2
    best = {num: max(case.attainment(form, speed) for form in forms(num)) for num in range(1, 5)}
    least = min(num for num, share in best.items() if share >= 0.9)
    assert found.holds and found.finalists[0].form.num_instances == least > 1


def test_what_was_tried_is_what_the_simulator_gives(case: Case, found: Plan) -> None:
    for one in found.tried:
        assert one.seen.attainment == case.attainment(one.form, case.window.speed * 1.2), one.form.title


def test_what_it_carries_holds_and_a_little_more_does_not(case: Case, found: Plan) -> None:
    best = found.finalists[0]
    carried: Carried = best.carried
    assert carried.speed >= case.window.speed * 1.2 and carried.fails_at <= carried.speed * 1.1
    assert case.attainment(best.form, carried.speed) >= 0.9 > case.attainment(best.form, carried.fails_at)
    assert carried.breaks.startswith(("TTFT", "TPOT")) and carried.at_load == best.seen
    assert list(carried.curve) == sorted(carried.curve) and len(carried.curve) >= 3


def test_too_few_gpus_are_told_with_the_rate_that_they_carry(small_cost: CostModel) -> None:
    case = Case(small_cost)
    found = case.plan(num_instances=1)
    assert not found.holds and [one.form for one in found.tried] == [coupled(1)]
    assert 0 < found.finalists[0].carried.speed < case.window.speed
    said = headline(case.asked, case.window, found), *lines(case.asked, case.window, found)
    assert said[0].startswith("1 H100 do not hold the load with its margin; the best form, 1 coupled, carries")
    assert any("wants about" in line for line in said)


def test_an_slo_that_nothing_can_hold_is_told_after_one_run(small_cost: CostModel) -> None:
    case = Case(small_cost, Slo(0.15, 0.03))
    found = case.plan()
    assert (found.tried, found.finalists, case.runner.num_runs) == ([], [], 1)
    assert headline(case.asked, case.window, found).startswith("No number of GPUs holds 0.15 s / 30 ms for 90%")
    assert any("give a longer SLO" in line for line in lines(case.asked, case.window, found))


def test_a_level_that_an_idle_instance_hardly_holds_is_called_so(small_cost: CostModel) -> None:
    alone = Case(small_cost, Slo(0.25, 0.03)).plan(num_instances=1).alone.attainment
    case = Case(small_cost, Slo(0.25, 0.03), level=alone - 0.01)
    found = case.plan(num_instances=1)
    assert not found.holds
    assert any("nearly all that an idle instance holds" in line for line in lines(case.asked, case.window, found))


def test_when_time_is_up_nothing_more_is_begun_and_that_is_told(small_cost: CostModel) -> None:
    case = Case(small_cost, budget_s=0.0)
    found = case.plan()
    assert found.out_of_time and len({one.form.num_instances for one in found.tried}) == 1
    assert any("time was up" in line for line in lines(case.asked, case.window, found))
    assert len(found.finalists[0].carried.curve) <= 3, "a search ends with its first run; beside it stand the load and the load with margin"


def test_processes_of_their_own_give_the_same(case: Case, found: Plan) -> None:
    several = Runner(case.window.trace, case.window.options, 0.9, num_processes=2)
    try:
        first = found.tried[0]
        assert several.run([(first.form.scenario(case.base), SLO, first.seen.speed)]) == [first.seen]
        best = found.finalists[0]
        search = Search(best.form.scenario(case.base), SLO, case.window.speed, case.window.speed)
        assert several.carried([search]) == case.runner.carried([search])
    finally:
        several.close()


def test_json_and_table_have_every_form_that_was_tried(case: Case, found: Plan) -> None:
    written = plain(case.asked, case.window, found, ["a note"], "a command")
    assert [one["title"] for one in written["tried"]] == [one.form.title for one in found.tried]
    assert written["finalists"][0]["carries"]["requests_per_s"] == found.finalists[0].carried.speed * case.window.rate
    assert (written["kind"], written["cost_model"]["source"]) == ("simulated", "measured: nowhere")
    assert table(case.asked, case.window, found).row_count == len(found.tried)


def test_the_neighbours_of_a_split_have_one_of_each_phase_at_least() -> None:
    assert neighbours(split(1, 4)) == [split(2, 4)]
    assert neighbours(split(2, 4)) == [split(1, 4), split(3, 4)]
    assert [one.title for one in (split(1, 4), coupled(3), adaptive(2))] == ["1P3D", "3 coupled", "2 adaptive"]

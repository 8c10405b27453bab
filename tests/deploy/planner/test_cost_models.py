"""The cost models in the package: each file is what its source gives, and what is derived is near what others published."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from halfmoon.deploy.planner.cost_models import POINTS, cost_model_of, shipped, text_of
from halfmoon.deploy.planner.model_shape import SHAPES, find_shape
from halfmoon.deploy.planner.points import read_points
from halfmoon.protocol.errors import ConfigError
from halfmoon.proxy.conductor.predictors import CostModel
from halfmoon.simulator.scenario import COST_MODELS, find_cost_model

BY_HAND = {"h100-8b", "a800-70b"}


def test_the_files_are_what_the_module_writes() -> None:
    made = shipped()
    assert {path.stem for path in COST_MODELS.glob("*.yaml")} == {*made, *BY_HAND}
    for name, cost in made.items():
        path = COST_MODELS / f"{name}.yaml"
        assert path.read_text() == text_of(cost), f"run python -m halfmoon.deploy.planner.cost_models for {name}"


def test_every_model_says_where_it_comes_from() -> None:
    for path in COST_MODELS.glob("*.yaml"):
        assert CostModel.load(path).source.partition(":")[0].split()[0] in ("measured", "derived", "published"), path.name


def test_the_measured_model_has_its_points() -> None:
    cost = find_cost_model("h200-8b")
    points = read_points(POINTS / "h200-8b.csv")
    assert len(points) == 14
    for point in points:
        assert point.by(cost) == pytest.approx(point.seconds, rel=0.05), point


def test_seventy_billion_on_two_h200_is_near_the_published_database() -> None:
    """AIConfigurator's H200 database for a 70B Llama in bf16 on two: prompts of 8 k and 64 k, a decode step."""
    cost = find_cost_model("h200-70b-tp2")
    assert cost.prefill_time(8192, 0) == pytest.approx(0.95, rel=0.10)
    assert cost.prefill_time(65536, 0) == pytest.approx(11.7, rel=0.10)
    assert cost.step_time(1, 8192) == pytest.approx(0.0217, rel=0.05)


def test_seventy_billion_on_eight_a100_is_near_the_paper_s_node_in_prefill() -> None:
    """Mooncake's nodes of eight A800, an A100 with slower links; their decode step is twice as long, of an older engine."""
    derived, published = find_cost_model("a100-70b-tp8"), find_cost_model("a800-70b")
    assert derived.prefill_time(8192, 0) == pytest.approx(published.prefill_time(8192, 0), rel=0.10)
    assert derived.step_time(1, 8192) < published.step_time(1, 8192)


def test_more_gpus_are_faster_and_hold_more_but_less_than_in_proportion() -> None:
    for gpu in ("a100", "h100", "h200"):
        two, four = (cost_model_of(find_shape("32b"), gpu, tp) for tp in (2, 4))
        for seconds in (lambda one: one.prefill_time(4096, 0), lambda one: one.step_time(16, 60_000)):
            assert seconds(two) / 2 < seconds(four) < seconds(two)
        assert four.kv_capacity_tokens > 2 * two.kv_capacity_tokens, "weights are shared"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-32B", "qwen3-32b", "32b"])
def test_a_model_is_known_by_its_names_and_as_a_folder(name: str) -> None:
    shape, folder = find_shape(name), find_shape(str(SHAPES / "qwen3-32b"))
    assert shape == folder and shape.kv_bytes_per_token == 2 * 64 * 8 * 128 * 2
    assert shape.num_parameters == pytest.approx(32.8e9, rel=0.01)


def test_a_folder_of_another_shape_is_derived(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((SHAPES / "qwen3-32b" / "config.json").read_text().replace(": 64,\n", ": 32,\n", 1))
    half, whole = (cost_model_of(find_shape(folder), "h100", 2) for folder in (str(tmp_path), "32b"))
    assert half.name == f"h100-{tmp_path.name}-tp2" and half.source.startswith("derived")
    assert half.kv_bytes_per_token == whole.kv_bytes_per_token / 2 and half.prefill_time(2048, 0) < 0.6 * whole.prefill_time(2048, 0)


@pytest.mark.parametrize(
    ("model", "gpu", "tp", "told"),
    [
        ("70b", "h100", 1, "does not fit on 1 x H100 SXM 80GB"),
        ("70b", "h100", 2, "give a larger --tp"),
        ("32b", "h100", 3, "has 8 KV heads, which 3 GPUs can't share evenly"),
        ("32b", "b300", 2, "no GPU 'b300'; choose of a100, h100, h200"),
        ("gpt-5", "h100", 1, "no model 'gpt-5': neither a folder"),
    ],
)
def test_what_can_not_be_planned_is_told(model: str, gpu: str, tp: int, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cost_model_of(find_shape(model), gpu, tp)
    assert told in caught.value.message and "\n" not in caught.value.message


def test_a_written_model_reads_back_to_four_digits(tmp_path: Path) -> None:
    cost = find_cost_model("h100-8b")
    (tmp_path / "cost.yaml").write_text(text_of(cost))
    again = CostModel.load(tmp_path / "cost.yaml")
    for name, value in dataclasses.asdict(cost).items():
        assert getattr(again, name) == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name

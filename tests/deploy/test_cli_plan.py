"""`halfmoon plan` from its command line: a plan with its files, and what it refuses in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfmoon.deploy.cli import app
from halfmoon.deploy.cli.plan import parse_slo
from halfmoon.protocol.errors import ConfigError

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"2023-11-16 18:{at // 60:02}:{at % 60:02}.5,1000,20\n" for at in range(600))
COMMON = ["--model", "8b", "--slo", "1s:25ms", "--gpus", "2", "--requests", "40", "--processes", "1"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.stdout


def refused(*arguments: str) -> str:
    """What is told, which is one line."""
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert (result.exit_code, result.stdout) == (1, "") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def trace(tmp_path: Path) -> str:
    (tmp_path / "azure.csv").write_text(TRACE + "2023-11-16 18:30:00.5,1000,0\n")
    return str(tmp_path / "azure.csv")


def test_a_plan_tells_what_to_start_what_it_left_out_and_writes_json_and_a_picture(trace: str, tmp_path: Path) -> None:
    out, png = tmp_path / "plan.json", tmp_path / "plan.png"
    code, said = run("--trace", trace, *COMMON, "--out", str(out), "--png", str(png))
    assert code == 0
    assert "1 coupled, 1 H100: carries" in said and "halfmoon serve --prefill 0 --decode 1" in said
    assert "1 requests of the file are left out; the first: line 602: it has 1000 prompt and 0 answer tokens" in said
    assert "h100-8b: measured" in said and "simulated are the busiest 40 requests in a row" in said
    assert json.loads(out.read_text())["holds"] is True
    assert png.read_bytes().startswith(b"\x89PNG")


def test_tensor_parallel_is_planned_and_said_not_to_be_served(trace: str) -> None:
    code, said = run("--trace", trace, *COMMON, "--tp", "2")
    assert code == 0 and "tensor parallel workers are served, and have not been run on GPUs yet" in said
    assert "h100-8b-tp2: derived from peaks" in said and "halfmoon serve" not in said


def test_points_of_ones_own_are_fitted(trace: str, tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    points.write_text(
        "new_tokens,prefix_tokens,sequences,context_tokens,seconds\n512,0,0,0,0.02\n2048,0,0,0,0.06\n2048,8192,0,0,0.08\n"
        "0,0,1,2000,0.006\n0,0,32,64000,0.009\n0,0,64,500000,0.02\n"
    )
    code, said = run("--trace", trace, *COMMON, "--points", str(points))
    assert code == 0 and f"the points of {points} are fitted with errors of" in said and f"measured: fitted to {points}" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--slo", "soon"], "'soon' is no SLO"),
        (["--model", "70b"], "does not fit on 1 x H100"),
        (["--gpus", "1", "--tp", "2"], "--gpus 1 is less than one instance"),
        (["--trace", "none.csv"], "no trace at none.csv"),
        (["--trace", "synthetic"], "give --rate"),
        (["--cost-model", "b300"], "no cost model 'b300'"),
    ],
)
def test_what_can_not_be_planned_is_told(trace: str, arguments: list[str], told: str) -> None:
    assert told in refused("--trace", trace, *COMMON, *arguments)


def test_without_matplotlib_a_picture_is_refused_before_anything_runs(trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = refused("--trace", "a file that would be missed next", *COMMON, "--png", str(tmp_path / "plan.png"))
    assert "pip install 'halfmoon[bench]'" in told


@pytest.mark.parametrize(("text", "slo"), [("2s:30ms", (2.0, 0.03)), ("2:0.03", (2.0, 0.03)), ("500ms:0.02s", (0.5, 0.02))])
def test_an_slo_has_units_or_is_in_seconds(text: str, slo: tuple[float, float]) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize("text", ["2", "2s", "2s:30ms:1", "2s:30us", "0:1", "1:-1", "nan:1", "inf:1"])
def test_what_is_no_slo_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="SLO"):
        parse_slo(text)

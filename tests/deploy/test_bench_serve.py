"""`halfmoon bench serve` as a user calls it, against a fake server in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfmoon.deploy.cli import app
from halfmoon.deploy.load.environment import shown_command

SERVER = Path(__file__).parents[1] / "benchmarks" / "fake_server.py"
SHORT = ("--rate", "50", "--requests", "8", "--input-len", "20", "--output-len", "4", "--warm-up", "1", "--seed", "3")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "serve", *arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    child = subprocess.Popen([sys.executable, "-P", SERVER, "0", "--ttft", "0.02", "--gap", "0.005"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    yield child.stdout.readline().strip()
    child.terminate()
    child.wait(timeout=60)


def test_its_help_is_its_own_and_a_benchmark_s_is_its_own_too() -> None:
    assert "--cancel-share" in run("--help").stdout
    assert "--cancel-share" not in CliRunner().invoke(app, ["bench", "--help"]).stdout


def test_a_run_leaves_a_table_json_csv_and_a_picture(url: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("run.json", "run.csv", "run.png")]
    flags = [part for flag, path in zip(("--out", "--csv", "--png"), files, strict=True) for part in (flag, str(path))]
    done = run(url, *SHORT, "--slo", "5:1", "--slo", "0.001:1", *flags, "--api-key", "SECRET", "--cancel-share", "0.5")
    assert done.exit_code == 0, done.output
    assert "TTFT" in done.stdout and "longest tenth" in done.stdout and "5s/1000ms" in done.stdout
    assert all(path.stat().st_size for path in files)
    (arm,) = json.loads(files[0].read_text())["arms"]
    (window,) = arm["windows"]
    assert window["summary"]["num_requests"] == len(window["requests"]) == 8
    outcomes = window["summary"]["outcomes"]
    assert outcomes["ok"] + outcomes["cancelled"] == 8 and 0 < outcomes["cancelled"] < 8
    assert [slo["attainment"] for slo in window["summary"]["slos"]] == [1.0, 0.0]
    assert arm["environment"]["versions"]["aiohttp"] and arm["environment"]["num_cores"] and arm["options"]["seed"] == 3
    assert "SECRET" not in files[0].read_text()


def test_arms_are_compared_side_by_side_and_merged_from_files(url: str, tmp_path: Path) -> None:
    done = run("--compare", f"ours={url}", f"theirs={url},{url}", *SHORT, "--out", str(tmp_path / "both.json"))
    assert done.exit_code == 0 and "ours" in done.stdout and "theirs" in done.stdout and "do not compare" not in done.stdout
    assert run(url, *SHORT[:-1], "4", "--out", str(tmp_path / "other.json")).exit_code == 0
    png = tmp_path / "joint.png"
    done = run("--merge", str(tmp_path / "both.json"), str(tmp_path / "other.json"), "--png", str(png))
    assert (
        done.exit_code == 0 and png.stat().st_size and all(name in done.stdout for name in ("ours", "theirs", url.removeprefix("http://")))
    )
    assert "the arms' loads differ in seed" in done.stdout


def test_several_targets_without_compare_and_a_dead_one_are_told_in_a_line(url: str) -> None:
    for arguments, told in (
        ((url, url), "--compare"), (("127.0.0.1:9",), "no OpenAI endpoint"), ((url, "--slo", "x"), "SLO"), (("--merge",), "JSON files"),
        ((url, "--extra-body", "[1]"), "object"), ((url, "--trace", "/nowhere.jsonl"), "no trace"), ((url, "--api", "x"), "chat"),
    ):  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 1 and told in done.output and "Traceback" not in done.output, arguments


def test_a_dead_arm_does_not_cost_the_results_of_those_before_it(url: str, tmp_path: Path) -> None:
    done = run("--compare", f"ours={url}", "theirs=127.0.0.1:9", *SHORT, "--out", str(tmp_path / "both.json"))
    assert done.exit_code == 1 and "no OpenAI endpoint" in done.output
    assert [arm["name"] for arm in json.loads((tmp_path / "both.json").read_text())["arms"]] == ["ours"]


def test_a_key_is_never_written_down() -> None:
    assert shown_command(["serve", "--api-key", "k", "--seed", "1"]) == "serve --api-key '***' --seed 1"
    assert shown_command(["serve", "--api-key=k"]) == "serve '--api-key=***'"


def test_it_runs_where_torch_ray_and_fastapi_are_not_installed(url: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'ray', 'fastapi', 'tokenizers'): sys.modules[name] = None\n"
        f"from halfmoon.deploy.cli import app; app(['bench', 'serve', *{[url, *SHORT]!r}])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "TTFT" in done.stdout

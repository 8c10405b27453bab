"""The rules as promtool sees them: valid, and each alert fires on its fault and stays silent beside it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "deploy" / "prometheus"
TESTS = Path(__file__).parent / "rules.test.yml"

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed; Debian's package prometheus has it")


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def run(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_the_configuration_and_its_rules_are_valid() -> None:
    run("check", "config", str(FOLDER / "prometheus.yml"))


@promtool
def test_every_alert_fires_on_its_fault_and_is_silent_beside_it() -> None:
    run("test", "rules", TESTS.name)


def test_every_alert_has_both_cases_and_tells_what_to_do() -> None:
    names = {case["name"] for case in yaml.safe_load(TESTS.read_text())["tests"]}
    assert names == {f"{alert['alert']} {kind}" for alert in alerts() for kind in ("fires", "is silent")}
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"] and len(alert["annotations"]["description"]) > 40

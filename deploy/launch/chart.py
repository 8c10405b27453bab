"""The Helm chart of a deployment on KubeRay: the package's chart with Prometheus' rules and the dashboards, and this one's values."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from ...protocol.errors import ConfigError
from .description import Description
from .settings import changed_settings

CHART = Path(__file__).with_name("chart")
DEPLOY = Path(__file__).parents[1]
MIB = 2**20
DECIDED = {"prefill": "num_workers", "decode": "num_workers", "both": "num_workers", "store": "arena_bytes"}  # by values of their own


def values(description: Description) -> dict[str, Any]:
    """What differs from the chart's own values."""
    config = description.config
    settings = changed_settings(config)
    for section, key in DECIDED.items():
        settings.get(section, {}).pop(key, None)
    return {
        "image": description.image,
        "prefill": {"replicas": config.prefill.num_workers},
        "decode": {"replicas": config.decode.num_workers},
        "both": {"replicas": config.both.num_workers},
        "hosts": {"replicas": description.num_worker_hosts, "gpus": description.num_gpus},
        "store": {"arenaMiB": math.ceil(config.store.arena_bytes / MIB)},
        "config": {section: keys for section, keys in settings.items() if keys},
    }


def write_chart(description: Description, folder: Path) -> str:
    """Writes chart/ and values.yaml into folder, and returns how they were checked. Raises ConfigError for what helm refuses."""
    chart, own = folder / "chart", folder / "values.yaml"
    shutil.rmtree(chart, ignore_errors=True)
    shutil.copytree(CHART, chart)
    (chart / "files").mkdir()
    for file in (DEPLOY / "prometheus" / "recording.yml", DEPLOY / "prometheus" / "alerts.yml", *(DEPLOY / "grafana").glob("*.json")):
        shutil.copy(file, chart / "files")
    own.write_text(yaml.safe_dump(values(description), sort_keys=False))
    helm = shutil.which("helm")
    if helm is None:
        return "not checked here, because there is no helm command"
    done = subprocess.run([helm, "lint", "--strict", str(chart), "-f", str(own)], text=True, capture_output=True)
    if done.returncode:
        raise ConfigError(f"helm lint refuses {chart}: {done.stdout}{done.stderr}")
    return "checked by helm lint"

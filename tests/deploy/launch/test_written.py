"""What `halfmoon deploy init` writes, and what it refuses. Ray's own checks are the reference."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfmoon.deploy.launch.chart import values, write_chart
from halfmoon.deploy.launch.description import Description, Target
from halfmoon.deploy.launch.folder import check_ray, read, write
from halfmoon.deploy.launch.settings import changed_settings
from halfmoon.protocol.config import ClusterConfig, DecodeConfig, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.errors import ConfigError

CONFIG = ClusterConfig(
    prefill=PrefillConfig(num_workers=1), decode=DecodeConfig(num_workers=2), proxy=ProxyConfig(host="0.0.0.0", ttft_slo_s=2.0)
)
PLACES: dict[Target, dict[str, Any]] = {
    Target.LOCAL: {"head": "10.0.0.1", "workers": ("10.0.0.2", "10.0.0.3"), "ssh_user": "root", "ssh_key": "/key"},
    Target.AWS: {"region": "us-west-2"},
    Target.GCP: {"region": "us-west1", "zone": "us-west1-a", "project": "p"},
}


def described(target: Target = Target.LOCAL, **changes: Any) -> Description:
    return Description(name="pd", target=target, config=changes.pop("config", CONFIG), **PLACES.get(target, {}) | changes)


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("num_gpus", [0, 1])
def test_what_is_written_for_ray_up_passes_rays_own_checks_and_has_hosts_for_the_workers(
    tmp_path: Path, target: Target, num_gpus: int
) -> None:
    write(described(target, num_gpus=num_gpus), tmp_path)
    deployment = read(tmp_path)  # from the files, with Ray's defaults and its schema
    assert deployment.num_hosts == (3 if target is Target.LOCAL else 4)
    assert ClusterConfig.load(tmp_path / "halfmoon.yaml") == CONFIG


def test_a_file_that_ray_would_refuse_is_refused_with_the_place(tmp_path: Path) -> None:
    config = write(described(), tmp_path).ray
    with pytest.raises(ConfigError, match="upscaling_speed"):
        check_ray(config | {"upscaling_speed": "fast"})
    with pytest.raises(ConfigError, match="no_such_key"):
        check_ray(config | {"no_such_key": 1})


def test_ray_starts_with_a_token_on_every_host_and_the_token_is_its_owners(tmp_path: Path) -> None:
    config = write(described(), tmp_path).ray
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command and "RAY_AUTH_TOKEN_PATH=" in command for command in commands)
    assert config["file_mounts"] == {"~/halfmoon/secret": str(tmp_path / "secret")}
    token = tmp_path / "secret" / "auth_token"
    assert len(token.read_text()) == 64 and stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_folder_is_overwritten_only_on_demand_and_keeps_its_token(tmp_path: Path) -> None:
    write(described(), tmp_path)
    token = (tmp_path / "secret" / "auth_token").read_text()
    with pytest.raises(ConfigError, match="--overwrite"):
        write(described(), tmp_path)
    assert write(described(workers=("10.0.0.9",)), tmp_path, overwrite=True).num_hosts == 2
    assert (tmp_path / "secret" / "auth_token").read_text() == token


def test_a_wheel_is_copied_and_installed_with_this_machines_version_of_ray(tmp_path: Path) -> None:
    import ray

    with pytest.raises(ConfigError, match="no wheel"):
        write(described(wheel=str(tmp_path / "nothing.whl")), tmp_path / "a")
    (tmp_path / "halfmoon-1.whl").write_bytes(b"wheel")
    config = write(described(wheel=str(tmp_path / "halfmoon-1.whl")), tmp_path / "b").ray
    assert (tmp_path / "b" / "wheel" / "halfmoon-1.whl").read_bytes() == b"wheel"
    assert f"ray[default]=={ray.__version__}" in config["setup_commands"][0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": Target.AWS, "region": ""}, "--region"),
        ({"ssh_user": ""}, "--ssh-user"),
        ({"workers": ("10.0.0.2", "10.0.0.2")}, "twice"),
        ({"num_gpus": 1, "workers": ("10.0.0.2",)}, "3 workers need a GPU each and the hosts have 2"),
        ({"target": Target.KUBERAY}, "--image"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        described(**changes)


def test_a_machine_type_is_asked_for_where_none_is_obvious(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--worker-type"):
        write(described(Target.AWS, num_gpus=3), tmp_path)


def test_settings_are_those_that_are_not_defaults_and_load_to_the_same() -> None:
    assert changed_settings(ClusterConfig()) == {}
    assert ClusterConfig.load(None, {f"{s}.{k}": v for s, keys in changed_settings(CONFIG).items() for k, v in keys.items()}) == CONFIG


def test_the_charts_values_hold_each_setting_once(tmp_path: Path) -> None:
    config = ClusterConfig(store=StoreConfig(arena_bytes=3 * 2**20 + 1), decode=DecodeConfig(num_workers=2, max_running=8))
    found = values(described(Target.KUBERAY, config=config, image="i", num_gpus=1))
    assert found["store"] == {"arenaMiB": 4} and found["decode"] == {"replicas": 2} and found["hosts"] == {"replicas": 3, "gpus": 1}
    assert found["config"] == {"decode": {"max_running": 8}}


def test_the_chart_has_the_packages_rules_and_dashboards_and_a_value_for_each_one_it_is_given(tmp_path: Path) -> None:
    description = described(Target.KUBERAY, image="i")
    write_chart(description, tmp_path)
    assert sorted(path.name for path in (tmp_path / "chart" / "files").iterdir()) == [
        *("alerts.yml", "conductor.json", "kv.json", "pd.json", "recording.yml", "slo.json")
    ]
    known = yaml.safe_load((tmp_path / "chart" / "values.yaml").read_text())
    for name, value in yaml.safe_load((tmp_path / "values.yaml").read_text()).items():
        assert name in known and (not isinstance(value, dict) or name == "config" or value.keys() <= known[name].keys())


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_prometheus_is_told_of_tls_and_token_where_the_chart_has_them_and_of_neither_elsewhere(tmp_path: Path) -> None:
    write_chart(described(Target.KUBERAY, image="i"), tmp_path)
    ca = {"ca": {"secret": {"name": "certs", "key": "authority.pem"}}, "serverName": "halfmoon-member"}
    secure = {"tlsConfig": ca, "authorization": {"type": "Bearer", "credentials": {"name": "opens", "key": "token"}}}
    for given, scheme, asked in (([], "http", {}), (["certsSecret=certs", "monitoring.tokenSecret=opens"], "https", secure)):
        scraped = rendered(tmp_path, "ScrapeConfig", "monitoring.scrapeConfig=true", *given)["spec"]
        (found,) = scraped["httpSDConfigs"]
        assert found == {"url": f"{scheme}://pd-proxy.default.svc:8001/metrics/targets", "refreshInterval": "5s"} | asked
        assert {key: scraped[key] for key in ("tlsConfig", "authorization") if key in scraped} == asked
        assert scraped.get("scheme", "HTTP") == scheme.upper()
        (endpoint,) = rendered(tmp_path, "ServiceMonitor", "monitoring.serviceMonitor=true", *given)["spec"]["endpoints"]
        assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "5s", "honorLabels": True} | asked | (
            {"scheme": "https"} if asked else {}
        )
        config = yaml.safe_load(rendered(tmp_path, "ConfigMap", *given)["data"]["halfmoon.yaml"])
        ClusterConfig.load(None, {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()})
        assert ("certs" in config["security"]) == ("metrics_token_file" in config["security"]) == bool(asked)
    assert "config.security.certs" in refused(tmp_path, "config.security.certs=x")


def helm(folder: Path, *values: str) -> subprocess.CompletedProcess[str]:
    settings = [argument for value in values for argument in ("--set", value)]
    command = ["helm", "template", "pd", str(folder / "chart"), "-f", str(folder / "values.yaml"), *settings]
    return subprocess.run(command, capture_output=True, text=True)


def rendered(folder: Path, kind: str, *values: str) -> dict[str, Any]:
    """The only object of its kind."""
    done = helm(folder, *values)
    assert done.returncode == 0, done.stderr
    (found,) = [one for one in yaml.safe_load_all(done.stdout) if one and one["kind"] == kind]
    return found


def refused(folder: Path, *values: str) -> str:
    done = helm(folder, *values)
    assert done.returncode != 0
    return done.stderr

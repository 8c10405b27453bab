"""deploy/renewal.py without Ray's processes, and what Prometheus is told of the pages' TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfmoon.deploy.certificates import init, rotate
from halfmoon.deploy.cli.dashboards import configure
from halfmoon.deploy.renewal import renew, watched_certificates
from halfmoon.protocol.credentials import Credentials
from halfmoon.protocol.errors import ConfigError
from halfmoon.protocol.exporter import Identity
from halfmoon.protocol.tls import Tls
from halfmoon.proxy.metrics_targets import targets

TOKEN = "0123456789abcdef0123456789abcdef"


class Method:
    """An actor's, as Ray shows it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.asked: list[Tls] = []

    def remote(self, tls: Tls) -> asyncio.Future[None]:
        self.asked.append(tls)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.error is None:
            future.set_result(None)
        else:
            future.set_exception(self.error)
        return future


class Actor:
    def __init__(self, error: Exception | None = None) -> None:
        self.renew = Method(error)


class Named:
    def __init__(self, actor: Actor | None) -> None:
        self.id, self.actor = "decode-0", actor


class Cluster:
    """A supervisor's members."""

    def __init__(self, tls: Tls, *actors: Actor | None) -> None:
        self.credentials = Credentials(TOKEN, tls)
        self.members = [Named(actor) for actor in actors]


async def test_every_member_that_runs_is_told_and_a_dead_one_stops_nobody(tmp_path: Path) -> None:
    from ray.exceptions import ActorDiedError

    init(tmp_path / "certs", [], 1)
    before = Tls.of_members(tmp_path / "certs")
    dead, well = Actor(ActorDiedError()), Actor()
    cluster: Any = Cluster(before, None, dead, well)
    watch = watched_certificates(tmp_path / "certs", cluster)
    await watch.look()
    assert cluster.credentials.tls is before and not well.renew.asked, "nothing is new"
    rotate(tmp_path / "certs", [], 1)
    await watch.look()
    after = Tls.of_members(tmp_path / "certs")
    assert cluster.credentials.tls == after != before, "who starts now begins with them"
    assert well.renew.asked == dead.renew.asked == [after]


async def test_nobody_is_told_of_certificates_that_members_would_refuse(tmp_path: Path) -> None:
    init(tmp_path / "certs", [], 1)
    init(tmp_path / "others", [], 1)
    well, before = Actor(), Tls.of_members(tmp_path / "certs")
    cluster: Any = Cluster(before, well)
    with pytest.raises(ConfigError, match=r"let authority\.pem hold both"):
        await renew(tmp_path / "others", cluster)
    assert cluster.credentials.tls is before and not well.renew.asked


def test_prometheus_is_told_the_scheme_and_whom_to_trust(tmp_path: Path) -> None:
    proxy = Identity("proxy", "proxy", "tiny")
    assert targets(proxy, "10.0.0.1:8001", [], has_tls=True)[0]["labels"] == proxy._asdict() | {"__scheme__": "https"}
    assert targets(proxy, "10.0.0.1:8001", [])[0]["labels"] == proxy._asdict()
    for ca, url in ((None, "http://10.0.0.1:8001/metrics/targets"), (tmp_path / "authority.pem", "https://10.0.0.1:8001/metrics/targets")):
        scraped = yaml.safe_load(configure(tmp_path / "written", "10.0.0.1:8001", ca=ca).read_text())["scrape_configs"][0]
        found = scraped["http_sd_configs"][0]
        assert found["url"] == url
        expected = None if ca is None else {"ca_file": str(ca), "server_name": "halfmoon-member"}
        assert scraped.get("tls_config") == found.get("tls_config") == expected
        assert "authorization" not in scraped and "authorization" not in found
    scraped = yaml.safe_load(configure(tmp_path / "written", "x:1", token_file=tmp_path / "token").read_text())["scrape_configs"][0]
    wanted = {"type": "Bearer", "credentials_file": str(tmp_path / "token")}
    assert scraped["authorization"] == scraped["http_sd_configs"][0]["authorization"] == wanted

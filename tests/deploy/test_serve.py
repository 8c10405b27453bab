"""`halfmoon serve` as a user runs it: a process of its own, its endpoints, SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfmoon.client import Client
from halfmoon.deploy.cli import app
from halfmoon.deploy.page_opener import page_opener
from halfmoon.deploy.ray_session import LOOPBACK

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

METRICS_TOKEN = "0123456789abcdef0123456789abcdef"
HALFMOON = Path(sys.executable).parent / "halfmoon"


class Served:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._up = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self._up.wait(300), "".join(self.lines)
        text = "".join(self.lines)
        assert "serving" in text, text
        self.http = re.search(r"http://([\d.:]+)/v1", text)[1]  # type: ignore[index]
        self.grpc = re.search(r"gRPC +([\d.:]+)", text)[1]  # type: ignore[index]
        self.control = re.search(r"control +([\d.:]+)", text)[1]  # type: ignore[index]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "halfmoon chat" in line:
                self._up.set()
        self._up.set()

    def ended(self) -> int:
        code = self.process.wait(timeout=300)
        self._reader.join()
        return code


@pytest.fixture
def served(model_folder: Path, tmp_path: Path) -> Iterator[Served]:
    flags = ["--model", str(model_folder), "--http-port", "0", "--grpc-port", "0", "--set", "proxy.drain_timeout_s=20"]
    flags += ["--set", "proxy.control_port=0", "--set", "proxy.metrics_port=0"]
    (tmp_path / "metrics").write_text(METRICS_TOKEN)
    flags += ["--set", f"security.metrics_token_file={tmp_path / 'metrics'}"]
    process = subprocess.Popen([HALFMOON, "serve", *flags], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        yield Served(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def halfmoon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HALFMOON, *arguments], capture_output=True, text=True, timeout=300)


def test_a_served_cluster_answers_is_looked_at_and_drains_on_sigterm(served: Served) -> None:
    answered = halfmoon("generate", "Once upon a time", "--max-tokens", "8", "--address", served.grpc)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    assert "time to first token" in answered.stderr

    looked = halfmoon("status", "--json", "--control", served.control)
    members = {member["id"] for member in json.loads(looked.stdout)["members"]}
    assert members == {"store-0", "prefill-0", "decode-0"}
    assert all(member["address"].startswith(LOOPBACK) for member in json.loads(looked.stdout)["members"])
    text = "".join(served.lines)
    assert "prompt and answer up to 4096 tokens" in text and "store-0 holds 262144 tokens of KV, 64.0 prompts of 4096" in text
    assert any("prefill-0: loading weights, " in line for line in served.lines), "how far a start has come, in plain lines"

    examined = halfmoon("doctor", "--proxy", served.grpc, "--control", served.control, "--json")
    report = json.loads(examined.stdout)
    assert [one for one in report["findings"] if one["severity"] == "fault"] == [], examined.stdout
    assert {(one["store_id"], one["transport"]) for one in report["links"]} == {("store-0", name) for name in ("shm", "tcp", "grpc")}
    assert report["phases"]["prefill_worker"] == "prefill-0" and report["phases"]["predicted_ttft_s"] > 0

    for member in json.loads(looked.stdout)["members"]:
        page = f"{member['metrics_address']}/metrics"
        with page_opener(None, METRICS_TOKEN)(page, 60.0) as reply:
            assert reply.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            page_opener(None)(page, 60.0)

    pids = [member["pid"] for member in json.loads(looked.stdout)["members"]]
    with Client(served.grpc) as client, client.stream(prompt="Once", max_tokens=400, ignore_eos=True) as stream:
        next(stream)
        served.process.send_signal(signal.SIGTERM)
        completion = stream.completion()  # the drain lets it end
    assert completion.usage.num_completion_tokens == 400
    assert served.ended() == 0, "".join(served.lines)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def told(*arguments: str) -> str:
    """By a command that fails before it starts anything, so without a process of its own."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    assert result.exit_code == 1 and "Traceback" not in result.output
    return result.stderr


def test_a_wrong_setting_is_one_line_and_no_process() -> None:
    assert "proxy.policy" in told("serve", "--set", "proxy.polcy=random")


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in told("serve", "--model", str(tmp_path / "nothing"))


def test_a_token_or_certificates_that_are_not_there_are_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfmoon.deploy.cli.serve.ray_session", None)
    flags = [flag for key in ("http", "grpc", "control", "metrics") for flag in ("--set", f"proxy.{key}_port=0")]
    for key in ("metrics_token_file", "certs"):
        assert str(tmp_path / "none") in told("serve", *flags, "--set", f"security.{key}={tmp_path / 'none'}")


def test_a_port_that_is_taken_is_told_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfmoon.deploy.cli.serve.ray_session", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} is taken" in told(
            "serve", "--http-port", "0", "--set", "proxy.control_port=0", "--set", "proxy.metrics_port=0", "--grpc-port", port
        )


def test_no_ray_at_the_address_is_said() -> None:
    assert "no Ray to join" in told("serve", "--address", "127.0.0.1:1")

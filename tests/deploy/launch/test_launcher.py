"""What the launcher runs, with programs in place of ray and ssh that write down how they were called."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfmoon.deploy.launch import head
from halfmoon.deploy.launch.description import Description, Target
from halfmoon.deploy.launch.folder import write
from halfmoon.deploy.launch.launcher import Launcher
from halfmoon.protocol.config import ClusterConfig
from halfmoon.protocol.errors import Unavailable

STUB = """#!{python}
import json, os, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps([{name!r}, sys.argv[1:], {{k: v for k, v in os.environ.items() if k.startswith("RAY_")}}]) + "\\n")
print("| a line for the user")
print("a line for the log")
sys.exit({code})
"""


class Bench:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.said: list[str] = []
        self._calls = folder / "calls"
        (folder / "bin").mkdir()
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        for name in ("ray", "ssh"):
            self.stub(name, 0)
        place = {"head": "10.0.0.1", "workers": ("10.0.0.2",), "ssh_user": "root", "ssh_key": "/key"}
        deployment = write(Description(name="pd", target=Target.LOCAL, config=ClusterConfig(), **place), folder / "pd")
        self.launcher = Launcher(deployment, self.said.append, str(folder / "bin" / "ray"))

    def stub(self, name: str, code: int) -> None:
        path = self.folder / "bin" / name
        path.write_text(STUB.format(python=sys.executable, calls=str(self._calls), name=name, code=code))
        path.chmod(0o755)

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        found = [json.loads(line) for line in self._calls.read_text().splitlines()]
        return [(words, environment) for called, words, environment in found if called == name]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_up_keeps_a_ray_that_runs_uses_the_older_autoscaler_and_passes_on_what_the_head_says(bench: Bench) -> None:
    bench.launcher.up()
    (up, environment), (copy, _), (start, _) = bench.calls("ray")
    assert up[0] == "up" and "--no-restart" in up and "--no-config-cache" in up
    assert environment["RAY_UP_enable_autoscaler_v2"] == "0" and environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(bench.folder / "pd" / "secret" / "auth_token")
    assert copy[0] == "rsync-up" and copy[-1] == "~/halfmoon/halfmoon.yaml"
    assert start[0] == "exec" and start[-1].endswith("head up 2"), "the head and one worker"
    assert "a line for the user" in bench.said and "a line for the log" not in bench.said
    assert "a line for the log" in (bench.folder / "pd" / "deploy.log").read_text()


def test_up_starts_ray_anew_on_demand(bench: Bench) -> None:
    bench.launcher.up(restart_ray=True)
    assert "--no-restart" not in bench.calls("ray")[0][0]


def test_a_command_of_ray_that_fails_is_told_with_its_end(bench: Bench) -> None:
    bench.stub("ray", 3)
    with pytest.raises(Unavailable, match=r"ray up ended with 3.*a line for the log"):
        bench.launcher.up()


def test_down_drains_and_stops_ray_on_every_host_itself(bench: Bench) -> None:
    assert bench.launcher.down() == []
    assert [words[0] for words, _ in bench.calls("ray")] == ["exec", "down"]
    assert sorted(words[-2] for words, _ in bench.calls("ssh")) == ["root@10.0.0.1", "root@10.0.0.2"]
    assert all("ray stop --force" in words[-1] and "/key" in words for words, _ in bench.calls("ssh"))


@pytest.mark.parametrize(("code", "told"), [(255, "does not answer"), (2, "still has 2 processes")])
def test_down_names_hosts_where_something_is_left(bench: Bench, code: int, told: str) -> None:
    bench.stub("ssh", code)
    problems = bench.launcher.down()
    assert len(problems) == 2 and all(told in problem for problem in problems)


def test_serve_is_found_by_its_number_only_while_that_is_serve(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    assert head.running(pid) is None
    pid.write_text(str(os.getpid()))
    assert head.running(pid) is None, "another process has its number"
    lasts = "import time; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", lasts, "serve"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()  # until then the kernel may not know its words yet
            pid.write_text(str(process.pid))
            assert head.running(pid) == process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(("answer", "code"), [("applied: decode-2 added", 0), ("refused: no GPU is free", 1)])
def test_an_order_to_serve_is_followed_to_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, code: int
) -> None:
    log = tmp_path / "serve.log"
    monkeypatch.setattr(head, "LOG", log)
    log.write_text("applied: an earlier one\n")
    obeys = "import signal\nsignal.signal(signal.SIGHUP, lambda *_: print({answer!r}, flush=True))\nprint('ready', flush=True)\n"
    obeys += "while True: signal.pause()"
    with log.open("a") as file, subprocess.Popen([sys.executable, "-c", obeys.format(answer=answer)], stdout=file) as process:
        assert head._follow(process.pid, 1, head.re.compile("ready")) == 0
        assert head._signalled(process.pid, signal.SIGHUP) == code
        process.kill()
    assert capsys.readouterr().out.splitlines() == ["| ready", f"| {answer}"]

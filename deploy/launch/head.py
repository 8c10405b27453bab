"""Runs on the head host, called by deploy/launch/launcher.py through ssh: starts `halfmoon serve` there, tells it to change, stops it.

up HOSTS   starts it, or has it read halfmoon.yaml again     restart   rolling restart
status     halfmoon status --once                            down      drains it and waits for its end

serve lives in a session of its own, because the terminal of ssh goes.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..change import APPLIED, REFUSED, RESTARTED
from ..ray_session import hosts_joined, ray_session
from .ray_yaml import HOST_ENVIRONMENT

FOLDER = Path("~/halfmoon").expanduser()
CONFIG, LOG, PID = FOLDER / "halfmoon.yaml", FOLDER / "serve.log", FOLDER / "serve.pid"
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml").expanduser()  # where `ray up` leaves its configuration
FROM_HEAD = "| "  # begins each line for the user
CONTROL = re.compile(r"  control +([^\s,]+)")
SERVES = re.compile(r"  try +halfmoon chat --address (\S+)")
DONE = re.compile("|".join((APPLIED, RESTARTED, REFUSED)))


def say(text: str) -> None:
    print(f"{FROM_HEAD}{text}", flush=True)


def running(pid_file: Path) -> int | None:
    """The process id of serve, where it runs. A number that another process has by now is none."""
    try:
        pid = int(pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if b"serve" in words else None


def up(num_hosts: int) -> int:
    bootstrap = yaml.safe_load(BOOTSTRAP.read_text())
    _tell_provider(bootstrap)
    if (pid := running(PID)) is not None:
        with ray_session("auto"):
            asyncio.run(hosts_joined(num_hosts, say, addresses_of(bootstrap["provider"])))
        return _signalled(pid, signal.SIGHUP)
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = ["halfmoon", "serve", "--address", "auto", "--config", str(CONFIG), "--hosts", str(num_hosts)]
    with LOG.open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    PID.write_text(str(process.pid))
    return _follow(process.pid, 0, SERVES)


def restart() -> int:
    pid = running(PID)
    if pid is None:
        say("nothing is served here; `halfmoon deploy up` starts it")
        return 1
    return _signalled(pid, signal.SIGUSR1)


def status() -> int:
    if running(PID) is None:
        say(f"nothing is served here; its last log is {LOG}")
        return 1
    address = CONTROL.findall(LOG.read_text())
    if not address:
        say("starting; its log so far:")
        shown = LOG.read_text()
    else:
        shown = subprocess.run(["halfmoon", "status", "--once", "--control", address[-1]], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        say(line)
    return 0


def down() -> int:
    pid = running(PID)
    if pid is not None:
        num_lines = _num_lines()
        os.kill(pid, signal.SIGTERM)
        _follow(pid, num_lines, None)
    PID.unlink(missing_ok=True)
    say("serve has ended")
    return 0


def _signalled(pid: int, number: signal.Signals) -> int:
    num_lines = _num_lines()
    os.kill(pid, number)
    return _follow(pid, num_lines, DONE)


def _num_lines() -> int:
    return len(LOG.read_text().splitlines())


def _follow(pid: int, skip: int, last: re.Pattern[str] | None) -> int:
    """Passes on what serve logs, behind the first `skip` lines, up to the line that `last` matches or to serve's end."""
    command = ["tail", "-n", f"+{skip + 1}", f"--pid={pid}", "-f", str(LOG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        for line in tail.stdout:
            say(line.rstrip())
            if last is not None and last.match(line):
                tail.terminate()
                return 1 if line.startswith(REFUSED) else 0
    return 0 if last is None else 1  # it ended before


def addresses_of(provider: Mapping[str, Any]) -> list[str]:
    """The hosts of a provider that lists them. A cloud's are not known before: none."""
    return [provider["head_ip"], *provider["worker_ips"]] if provider["type"] == "local" else []


def _tell_provider(bootstrap: Mapping[str, Any]) -> None:
    """Of hosts that were added since the autoscaler's start: it knows those of a file that only a new provider object updates."""
    if bootstrap["provider"]["type"] == "local":
        from ray.autoscaler._private.local.node_provider import LocalNodeProvider

        LocalNodeProvider(bootstrap["provider"], bootstrap["cluster_name"])


def main(arguments: Sequence[str]) -> int:
    os.environ.update({name: os.path.expandvars(value) for name, value in HOST_ENVIRONMENT.items()})
    verbs = {"restart": restart, "status": status, "down": down}
    return up(int(arguments[1])) if arguments[0] == "up" else verbs[arguments[0]]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

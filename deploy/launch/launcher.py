"""What `halfmoon deploy up`, `status`, `restart` and `down` do: `ray up` and its like, with what has to be known to use them.

- `ray up` on a cluster that runs must not restart Ray under it (--no-restart).
- With hosts that are there (provider local), Ray's newer autoscaler never starts the last host, because it counts the head among them; the
  older one is chosen by an environment variable.
- For the same hosts, `ray down` stops the head alone: workers would stay for a minute or two. Each is told by ssh.
- `ray exec` needs a terminal that it does not have in scripts; its own cache of configurations outlives the cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...protocol.errors import ConfigError, Unavailable
from .folder import HALFMOON_YAML, Deployment
from .ray_yaml import ENVIRONMENT, REMOTE, SECRET, TOKEN

# exit status of a host's shell after `ray stop`: how many processes of Ray are left, counted by what they run
STOP = "RAY_AUTH_MODE=token ray stop --force > /dev/null 2>&1; exit $(pgrep -fc '[r]ay/core/src/|^[r]ay::')"
SSH_SETTINGS = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=10", "BatchMode=yes")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Launcher:
    """run: as subprocess.run. say: takes a line for the user."""

    def __init__(self, deployment: Deployment, say: Callable[[str], None], run: Run = subprocess.run) -> None:
        self._deployment = deployment
        self._say = say
        self._run = run

    def up(self, restart_ray: bool = False) -> None:
        """Hosts, Ray, `halfmoon serve`; on a cluster that runs, whatever changed. Returns when it serves. Raises Unavailable."""
        self._say(f"ray up: {self._deployment.num_hosts} hosts")
        self._ray("up", "-y", "--no-config-cache", *([] if restart_ray else ["--no-restart"]))
        self._ray("rsync-up", extra=(str(self._deployment.folder / HALFMOON_YAML), f"{REMOTE}/{HALFMOON_YAML}"))
        self._on_head("up", str(self._deployment.num_hosts))

    def restart(self) -> None:
        """Rolling, of workers and stores."""
        self._on_head("restart")

    def status(self) -> None:
        self._on_head("status")

    def down(self) -> list[str]:
        """Drains, stops everything. Returns hosts that did not answer or that still run Ray, with the reason."""
        try:
            self._on_head("down")
        except Unavailable as error:
            self._say(f"the head did not drain: {error.message}")
        self._ray("down", "-y", "--no-config-cache")
        config = self._deployment.ray
        if config["provider"]["type"] != "local":
            return []
        hosts = [config["provider"]["head_ip"], *config["provider"]["worker_ips"]]
        with ThreadPoolExecutor(max_workers=32) as pool:
            return [problem for problem in pool.map(self._stop, hosts) if problem]

    def _stop(self, host: str) -> str:
        auth = self._deployment.ray["auth"]
        key = ["-i", auth["ssh_private_key"]] if "ssh_private_key" in auth else []
        settings = [word for setting in SSH_SETTINGS for word in ("-o", setting)]
        command = ["ssh", "-q", *settings, *key, f"{auth['ssh_user']}@{host}", f"bash --login -c {_quoted(STOP)}"]
        code = self._run(command, text=True, capture_output=True).returncode
        if code == 0:
            self._say(f"{host}: no Ray process is left")
            return ""
        return f"{host} does not answer by ssh" if code == 255 else f"{host} still has {code} processes of Ray"

    def _on_head(self, *arguments: str) -> None:
        """Runs deploy/launch/head.py there. What it prints is passed on."""
        words = " ".join(("python3", "-m", "halfmoon.deploy.launch.head", *arguments))
        self._ray("exec", "--no-config-cache", extra=(words,), passes_on=True)

    def _ray(self, verb: str, *flags: str, extra: Sequence[str] = (), passes_on: bool = False) -> None:
        """Raises Unavailable with the end of what Ray said. What it said in full is in the folder's log."""
        command = [_ray_command(), verb, *flags, str(self._deployment.ray_path), *extra]
        log = self._deployment.folder / "deploy.log"
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = self._run(command, env=self._environment(), text=True, **streams)
        with log.open("a") as file:
            file.write(f"$ {' '.join(command[1:])}\n{done.stdout}")
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if passes_on:
            for line in lines:
                if line.startswith("| "):  # head.py's
                    self._say(line[2:])
        if done.returncode:
            raise Unavailable(f"ray {verb} ended with {done.returncode}; {log} has all of it. Its end: {' / '.join(lines[-4:])}")

    def _environment(self) -> dict[str, str]:
        token = str((self._deployment.folder / SECRET / TOKEN).absolute())
        ours = {**ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": token, "RAY_UP_enable_autoscaler_v2": "0"}
        return {**os.environ, **ours}


def _ray_command() -> str:
    path = Path(sys.executable).with_name("ray")
    if not path.exists():
        raise ConfigError(f"there is no {path}; this command needs Ray: pip install 'halfmoon[server]'")
    return str(path)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'

"""What `halfmoon deploy up`, `status`, `restart` and `down` do: `ray up` and its like, with what has to be known to use them.

- `ray up` on a cluster that runs must not restart Ray under it (--no-restart).
- With hosts that are there (provider local), Ray's newer autoscaler never starts the last host, because it counts the head among them; the
  older one is chosen by an environment variable.
- For the same hosts, `ray down` stops the head alone: workers would stay for a minute or two. Each is told by ssh.
- Ray's cache of configurations outlives the cluster that they were for (--no-config-cache, where a command has it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError, Unavailable
from .folder import HALFMOON_YAML, Deployment
from .head import FROM_HEAD, addresses_of
from .ray_yaml import HOST_ENVIRONMENT, REMOTE, SECRET, TOKEN

# exit status of a host's shell after `ray stop`: how many processes of Ray are left, counted by what they run
STOP = "RAY_AUTH_MODE=token ray stop --force > /dev/null 2>&1; exit $(pgrep -fc '[r]ay/core/src/|^[r]ay::')"
LINES_TOLD = 4  # of a command that failed
SSH_SETTINGS = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=10", "BatchMode=yes")


class Launcher:
    """say: takes a line for the user. ray: the command."""

    def __init__(self, deployment: Deployment, say: Callable[[str], None], ray: str) -> None:
        self._deployment = deployment
        self._say = say
        self._ray_command = ray

    def up(self, restart_ray: bool = False) -> None:
        """Hosts, Ray, `halfmoon serve`; on a cluster that runs, whatever changed. Returns when it serves. Raises Unavailable."""
        self._say(f"ray up: {self._deployment.num_hosts} hosts; what it does is in {self._log}")
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
        self._ray("down", "-y")
        with ThreadPoolExecutor(max_workers=32) as pool:
            return [problem for problem in pool.map(self._stop, addresses_of(self._deployment.ray["provider"])) if problem]

    def _stop(self, host: str) -> str:
        auth = self._deployment.ray["auth"]
        key = ["-i", auth["ssh_private_key"]] if "ssh_private_key" in auth else []
        settings = [word for setting in SSH_SETTINGS for word in ("-o", setting)]
        command = ["ssh", "-q", *settings, *key, f"{auth['ssh_user']}@{host}", f"bash --login -c {_quoted(STOP)}"]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
        if code == 0:
            self._say(f"{host}: no Ray process is left")
            return ""
        return f"{host} does not answer by ssh" if code == 255 else f"{host} still has {code} processes of Ray"

    @property
    def _log(self) -> Path:
        return self._deployment.folder / "deploy.log"

    def _on_head(self, *arguments: str) -> None:
        """Runs deploy/launch/head.py there. What it prints is passed on."""
        words = " ".join(("python3", "-m", "halfmoon.deploy.launch.head", *arguments))
        self._ray("exec", "--no-config-cache", extra=(words,))

    def _ray(self, verb: str, *flags: str, extra: Sequence[str] = ()) -> None:
        """Raises Unavailable with the end of what Ray said. The log has all of it."""
        command = [self._ray_command, verb, *flags, str(self._deployment.ray_path), *extra]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        last: deque[str] = deque(maxlen=LINES_TOLD)
        with self._log.open("a") as log, subprocess.Popen(command, env=self._environment(), text=True, **streams) as process:
            log.write(f"$ {' '.join(command[1:])}\n")
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                if line.startswith(FROM_HEAD):
                    self._say(line.removeprefix(FROM_HEAD).rstrip())
                elif line.strip():
                    last.append(line.strip())
        if process.returncode:
            raise Unavailable(f"ray {verb} ended with {process.returncode}; {self._log} has all of it. Its end: {' / '.join(last)}")

    def _environment(self) -> dict[str, str]:
        token = str((self._deployment.folder / SECRET / TOKEN).absolute())
        ours = {**HOST_ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": token, "RAY_UP_enable_autoscaler_v2": "0"}
        return {**os.environ, **ours}


def ray_command() -> str:
    """Of the environment that this runs in. Raises ConfigError."""
    path = Path(sys.executable).with_name("ray")
    if not path.exists():
        raise ConfigError(f"there is no {path}; this command needs Ray: pip install 'halfmoon[server]'")
    return str(path)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'

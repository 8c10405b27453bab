"""A rack of hosts on one machine: each is its own network, mount, process and name space with an sshd, an address, a /tmp and a /dev/shm.

    rack = Rack(folder); rack.open(); rack.add("w1"); rack.run("w1", "hostname"); rack.kill("w1"); rack.close()

Needs root, iproute2, openssh-server and rsync. The hosts' only network is a bridge without a way out. Their file system is this machine's,
copied on write. What a host starts sees the processes of that host alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PREFIX = "hm-lab"
NET = "10.77.0"
SSHD = "/usr/sbin/sshd"
COMMANDS = (SSHD, "ip", "rsync", "unshare", "nsenter", "ssh-keygen")
BOOT_S = 30.0

BOOT = """set -e
mount --make-rprivate /
mkdir -p {host}/upper {host}/work {root}
mount -t overlay overlay -o lowerdir=/,upperdir={host}/upper,workdir={host}/work {root}
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev; mount --make-rslave {root}/dev
umount -l {root}/dev/shm; mount -t tmpfs -o size=2g tmpfs {root}/dev/shm
mount -t tmpfs -o size=1g tmpfs {root}/tmp; mount -t tmpfs tmpfs {root}/run; mkdir -p {root}/run/sshd
hostname {name}
rm -rf {root}/root/.ssh {root}/root/.ray {root}/root/halfmoon; mkdir -p -m 700 {root}/root/.ssh
cp {keys}/user.pub {root}/root/.ssh/authorized_keys; cp {keys}/user {root}/root/.ssh/id; chmod 600 {root}/root/.ssh/*
printf '127.0.0.1 localhost\\n{address} {name}\\n' > {root}/etc/hosts
printf 'export PATH={path} PYTHONPATH={pythonpath} RAY_USAGE_STATS_ENABLED=0\\n' > {root}/root/.bash_profile
cp {root}/root/.bash_profile {root}/root/.bashrc
exec chroot {root} {sshd} -D -e -f /dev/null -h {keys}/host -p 22 -o PermitRootLogin=prohibit-password -o PasswordAuthentication=no \
  -o UsePAM=no -o MaxStartups=100 -o MaxSessions=100 -o PidFile=none -o Subsystem='sftp internal-sftp'
"""


def missing() -> str:
    """What keeps a rack from being built here, in words; empty: nothing."""
    if os.geteuid() != 0:
        return "not root"
    if lacking := [command for command in COMMANDS if shutil.which(command) is None]:
        return f"no {', '.join(lacking)} (Debian: openssh-server, iproute2, rsync, util-linux)"
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True).returncode:
        return "this root may not make name spaces"
    return ""


class Rack:
    """folder: on a disk, and not under /tmp, which hosts have of their own; it is removed at the end. Nor is the code that they run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers: dict[str, int] = {}

    def open(self) -> None:
        (self._folder / "keys").mkdir(parents=True)
        for key in ("user", "host"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / "keys" / key))
        _call("ip", "netns", "add", f"{PREFIX}-switch")
        _call("ip", "-n", f"{PREFIX}-switch", "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", f"{PREFIX}-switch", "link", "set", "br0", "up")

    @property
    def names(self) -> list[str]:
        """Of the hosts that live."""
        return list(self._hosts)

    def address(self, name: str) -> str:
        return f"{NET}.{11 + self._numbers[name]}"

    def add(self, name: str) -> str:
        """Returns the address of the new host, whose sshd listens."""
        self._numbers[name] = len(self._numbers)
        host, net = self._folder / name, f"{PREFIX}-{name}"
        host.mkdir()
        _call("ip", "netns", "add", net)
        _call("ip", "-n", net, "link", "set", "lo", "up")
        _call("ip", "-n", net, "link", "add", "eth0", "type", "veth", "peer", "name", f"v-{name}", "netns", f"{PREFIX}-switch")
        _call("ip", "-n", f"{PREFIX}-switch", "link", "set", f"v-{name}", "master", "br0", "up")
        _call("ip", "-n", net, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _call("ip", "-n", net, "link", "set", "eth0", "up")
        _call("ip", "-n", net, "route", "add", "default", "via", f"{NET}.1")  # nobody is there; Ray looks which address it would use
        boot = BOOT.format(
            name=name,
            address=self.address(name),
            host=host,
            root=host / "root",
            keys=self._folder / "keys",
            sshd=SSHD,
            path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            pythonpath=os.environ.get("PYTHONPATH", ""),
        )
        spaces = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", net, *spaces, "bash", "-c", boot],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._hosts[name] = process
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line.decode())
            if "Server listening" in said[-1]:
                return self.address(name)
        raise RuntimeError(f"{name} did not start: {''.join(said)}")

    def command(self, name: str, text: str) -> list[str]:
        """That runs text in a login shell on the host."""
        first = _first_process(self._hosts[name].pid)
        inside = ["nsenter", "--target", str(first), "--net", "--mount", "--pid", "--uts", "--ipc", "--root"]
        environment = ["env", "--chdir=/root", "-i", "HOME=/root", "USER=root", "LANG=C.UTF-8", "TERM=dumb"]
        return [*inside, *environment, "bash", "--login", "-c", text]

    def run(self, name: str, text: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(name, text), text=True, capture_output=True, timeout=timeout_s)

    def processes(self, name: str) -> list[str]:
        """The command lines of the host's processes."""
        space = os.readlink(f"/proc/{_first_process(self._hosts[name].pid)}/ns/pid")
        return [_command_line(pid) for pid in _pids() if _pid_space(pid) == space]

    def kill(self, name: str) -> None:
        """As if its power was cut: first its cable, so that nobody hears a farewell."""
        _call("ip", "-n", f"{PREFIX}-switch", "link", "set", f"v-{name}", "down")
        self._end(name)

    def close(self) -> None:
        for name in list(self._hosts):
            self._end(name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _call("ip", "netns", "del", f"{PREFIX}-switch")
        shutil.rmtree(self._folder)

    def _end(self, name: str) -> None:
        process = self._hosts.pop(name)
        with contextlib.suppress(ProcessLookupError, StopIteration):
            os.kill(_first_process(process.pid), signal.SIGKILL)  # the kernel ends all others of its process space
        process.wait()
        _call("ip", "netns", "del", f"{PREFIX}-{name}")


def leftovers(folder: Path) -> list[str]:
    """What a rack left on this machine: name spaces, mounts, processes. In words."""
    spaces = [line for line in _call("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line]
    processes = [line for pid in _pids() if str(folder) in (line := _command_line(pid)) and pid != os.getpid()]
    return spaces + mounts + processes + ([str(folder)] if folder.exists() else [])


def _call(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def _first_process(unshare_pid: int) -> int:
    """The host's process 1: unshare's child."""
    children = Path(f"/proc/{unshare_pid}/task/{unshare_pid}/children").read_text().split()
    return int(next(iter(children)))


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _pid_space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

"""`halfmoon deploy` on separate hosts, start to end, on one machine: `python tests/lab/ray_up.py` as root.

An admin host, a head and two workers in name spaces of their own. Up, 200 streams over two decode hosts, a host without power under load, a
host more, a rolling restart, down. Ends with 1 and the reason where anything is not as it has to be. tests/lab/rack.py says what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from rack import Rack, leftovers, missing

LOAD = Path(__file__).with_name("load.py")
DISK = Path("/var/tmp")  # the hosts have a /tmp of their own
DEPLOYMENT = "/root/lab"
SETTINGS = "prefill.transport=grpc", "decode.transport=grpc", "model.max_model_len=1024", "store.arena_bytes=67108864"


class Lab:
    def __init__(self, rack: Rack) -> None:
        self.rack = rack
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)

    def halfmoon(self, words: str) -> None:
        """On the admin host; its lines are ours. Raises AssertionError where it fails."""
        self.say(f"$ halfmoon {words}")
        with subprocess.Popen(
            self.rack.command("admin", f"halfmoon {words}"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.say(f"    {line.rstrip()}")
        if process.returncode:
            self.say(self.rack.run("admin", f"tail -n 60 {DEPLOYMENT}/deploy.log").stdout)
            self.say(self.rack.run("head", "tail -n 30 /root/halfmoon/serve.log; tail -n 30 /tmp/ray/session_latest/logs/monitor.*").stdout)
        assert process.returncode == 0, f"halfmoon {words.split()[1]} ended with {process.returncode}"

    def init(self, workers: list[str], num_decode: int, more: str = "") -> None:
        addresses = ",".join(self.rack.address(name) for name in workers)
        settings = " ".join(f"--set {setting}" for setting in SETTINGS)
        self.halfmoon(
            f"deploy init {DEPLOYMENT} --target local --name lab --head {self.rack.address('head')} --workers {addresses} "
            f"--ssh-user root --ssh-key /root/.ssh/id --prefill 1 --decode {num_decode} {settings} {more}"
        )

    def load(self, words: str) -> list[str]:
        return self.rack.command("admin", f"python3 {LOAD} {self.rack.address('head')}:50051 {words}")

    def requests(self, count: int) -> dict[str, Any]:
        done = subprocess.run(self.load(f"--requests {count}"), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return self.judged(done.stdout)

    def judged(self, output: str) -> dict[str, Any]:
        found = json.loads(output)
        self.say("load: " + ", ".join(f"{name} {value}" for name, value in found.items() if value != []))
        assert found["failed"] == 0, f"{found['failed']} requests failed"
        assert found["different"] == 0, f"{found['different']} answers differ from the first one to the same prompt"
        return found

    @contextlib.contextmanager
    def under_load(self) -> Iterator[None]:
        """Requests run before, during and after the block, and all have to be answered."""
        until = "/tmp/load-ends"
        self.rack.run("admin", f"rm -f {until}")
        with subprocess.Popen(self.load(f"--until {until}"), text=True, stdout=subprocess.PIPE) as process:
            try:
                self.requests(4)
                yield
                self.requests(8)
            finally:
                self.rack.run("admin", f"touch {until}")
                output, _ = process.communicate(timeout=300)
        self.judged(output)


def ray_processes(rack: Rack, hosts: list[str]) -> list[str]:
    return [line for host in hosts for line in rack.processes(host) if "ray/core/src/" in line or line.startswith("ray::")]


def up(lab: Lab) -> None:
    for name in ("admin", "head", "w1", "w2"):
        lab.rack.add(name)
    lab.say("hosts: " + ", ".join(f"{name} {lab.rack.address(name)}" for name in ("admin", "head", "w1", "w2")))
    lab.init(["w1", "w2"], 2)
    lab.halfmoon(f"deploy up {DEPLOYMENT}")


def serve(lab: Lab) -> None:
    lab.halfmoon(f"deploy status {DEPLOYMENT}")
    found = lab.requests(200)
    assert set(found["decoded_by"]) == {"decode-0", "decode-1"}, "both decode hosts have to take part"
    assert set(found["transports"]) == {"grpc"}, "KV has to travel over grpc"


def kill_a_host(lab: Lab) -> None:
    with lab.under_load():
        lab.say("w2 loses its power")
        lab.rack.kill("w2")
    lab.init(["w1"], 2, "--overwrite")


def add_a_host(lab: Lab) -> None:
    lab.rack.add("w3")
    lab.say(f"hosts: w3 {lab.rack.address('w3')} is new")
    lab.init([*(name for name in ("w1", "w2") if name in lab.rack.names), "w3"], 3, "--overwrite")
    with lab.under_load():
        lab.halfmoon(f"deploy up {DEPLOYMENT}")
    on = {member["id"]: member["address"].rpartition(":")[0] for member in members(lab)}
    new = [worker for worker, address in on.items() if address == lab.rack.address("w3") and worker.startswith("decode")]
    assert new, f"no decode worker is on the new host: {on}"
    found = lab.requests(12)
    assert any(worker in found["decoded_by"] for worker in new), "the new host has to take work"


def members(lab: Lab) -> list[dict[str, Any]]:
    done = lab.rack.run("head", f"halfmoon status --json --control {lab.rack.address('head')}:50052")  # the token is there
    return json.loads(done.stdout)["members"]


def restart(lab: Lab) -> None:
    before = {member["id"]: member["pid"] for member in members(lab)}
    with lab.under_load():
        lab.halfmoon(f"deploy restart {DEPLOYMENT}")
    after = {member["id"]: member["pid"] for member in members(lab)}
    # more may be there by then: a worker whose host died takes a while to move
    assert before.keys() <= after.keys() and all(before[one] != after[one] for one in before), f"{before} is now {after}"


def down(lab: Lab) -> None:
    hosts = [name for name in lab.rack.names if name != "admin"]
    lab.halfmoon(f"deploy down {DEPLOYMENT}")
    assert not (left := ray_processes(lab.rack, hosts)), left
    served = [line for host in hosts for line in lab.rack.processes(host) if "halfmoon serve" in line]
    assert not served, served
    lab.say(f"no process of Ray or Halfmoon is left on {', '.join(hosts)}")


PARTS = {
    "all": (up, serve, kill_a_host, add_a_host, restart, down),
    "failure": (up, serve, kill_a_host, down),
    "down": (up, down),
    "host": (up, add_a_host, down),
    "restart": (up, restart, down),
}


def main(part: str) -> int:
    if reason := missing():
        print(f"cannot run here: {reason}")
        return 1
    folder = Path(tempfile.mkdtemp(prefix="halfmoon-lab-", dir=DISK)) / "rack"
    rack = Rack(folder)
    lab = Lab(rack)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # and so the rack is taken down
    try:
        rack.open()
        for step in PARTS[part]:
            step(lab)
    except AssertionError as error:
        lab.say(f"FAILED: {error}")
        return 1
    finally:
        rack.close()
        folder.parent.rmdir()
    if left := leftovers(folder):
        lab.say(f"FAILED: left on this machine: {left}")
        return 1
    lab.say("passed; no process, name space, mount or file is left")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="all",
        help="down: nothing between; failure: 200 streams, then a host without power; host: one more; restart: rolling",
    )
    sys.exit(main(parser.parse_args().part))

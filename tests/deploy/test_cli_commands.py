"""deploy/cli: the commands that talk to a cluster, against a real proxy."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfmoon.deploy.cli import COMMANDS, app

ANSWER = "The quick brown fox, 日本語 and 😀 jumps over the lazy dog."
HALFMOON = [sys.executable, "-P", "-m", "halfmoon"]


FACE_TOKEN = "the-token-of-a-cluster-of-scripted-workers"


def run(*arguments: str, text: str | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=text, env={"COLUMNS": "160", "HALFMOON_CLUSTER_TOKEN": FACE_TOKEN})


def test_help_names_every_command_without_importing_what_they_need() -> None:
    code = (
        "import sys; from halfmoon.deploy.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(', '.join({'torch', 'ray', 'fastapi', 'yaml'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert name in done.stdout and command.help[:40] in done.stdout


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("serve", "--prefill"),
        ("generate", "--max-tokens"),
        ("chat", "--system"),
        ("status", "--once"),
        ("simulate", "--trace"),
        ("bench", "name"),
    ],
)
def test_every_command_explains_its_options(name: str, option: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0 and option in result.stdout


def test_a_command_whose_package_is_not_installed_says_what_to_install() -> None:
    code = "import sys; sys.modules['yaml'] = None; from halfmoon.deploy.cli import app; app(['serve'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "halfmoon: this command needs yaml: pip install 'halfmoon[server]'\n"


def test_bench_lists_what_can_be_run_and_not_what_that_shares() -> None:
    from halfmoon.deploy.cli.bench import FOLDER, benchmarks

    shared = {"engine_alone", "front_peers", "measure", "roofline", "shapes", "vllm_peer"}
    assert shared <= {path.stem for path in FOLDER.glob("*.py")}
    found = set(benchmarks())
    assert not shared & found and {"cluster", "engine", "flash_prefill", "front", "overhead", "placement", "rms_norm"} <= found
    result = run("bench", "measure")
    assert result.exit_code == 2 and "overhead" in result.output and "shapes" not in result.output


def test_serves_flags_are_keys_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import halfmoon.deploy.cli.serve as module

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "serve", lambda *arguments: calls.append(arguments))
    flags = ["--model", "/m", "--prefill", "2", "--decode", "3", "--http-port", "0", "--policy", "random", "--dtype", "float32"]
    result = run("serve", *flags, "--set", "decode.max_running=8", "--address", "auto", "--max-model-len", "64", "--hosts", "3")
    assert result.exit_code == 0, result.output
    ((serving, address, log_level),) = calls
    config = serving.config
    assert (config.decode.max_running, address, log_level) == (8, "auto", "warning")
    assert (config.model.path, config.prefill.num_workers, config.decode.num_workers, config.proxy.http_port) == ("/m", 2, 3, 0)
    assert (config.proxy.policy, config.model.dtype, config.model.max_model_len) == ("random", "float32", 64)
    assert serving.num_hosts == 3


def test_serve_reads_its_file_again_under_the_same_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import halfmoon.deploy.cli.serve as module

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "serve", lambda *arguments: calls.append(arguments))
    file = tmp_path / "halfmoon.yaml"
    file.write_text("decode: {num_workers: 2, max_running: 4}")
    assert run("serve", "--config", str(file), "--set", "decode.max_running=8").exit_code == 0
    file.write_text("decode: {num_workers: 3, max_running: 5}")
    again = calls[0][0].reload()
    assert (again.decode.num_workers, again.decode.max_running) == (3, 8)


@pytest.mark.parametrize(
    ("flags", "given"), [([], False), (["--host", "::"], False), (["--decode", "1"], True), (["--set", "prefill.num_workers=1"], True)]
)
def test_serve_knows_whether_the_user_said_how_many_workers(monkeypatch: pytest.MonkeyPatch, flags: list[str], given: bool) -> None:
    import halfmoon.deploy.cli.serve as module

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "serve", lambda *arguments: calls.append(arguments))
    assert run("serve", *flags).exit_code == 0 and calls[0][0].counts_given is given


def test_serves_help_shows_the_defaults() -> None:
    from halfmoon.protocol.config import ClusterConfig

    shown = " ".join(run("serve", "--help").stdout.split())
    proxy = ClusterConfig().proxy
    for default in ("127.0.0.1", proxy.http_port, proxy.grpc_port, proxy.policy, proxy.order):
        assert f"[default: ({default})]" in shown
    assert shown.count("[default: (1)]") == 2, "workers for prefill and for decode"


def test_the_version_is_told() -> None:
    result = run("--version")
    assert result.exit_code == 0 and re.fullmatch(r"halfmoon \S+\n", result.stdout)


def test_a_command_that_is_nearly_one_is_told_which() -> None:
    result = run("serv")
    assert result.exit_code == 2 and "Did you mean 'serve'?" in result.output
    assert "Did you mean" not in run("zzz").output


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "127.0.0.1", "localhost:http"])
def test_an_address_that_grpc_would_not_understand_is_refused_at_once(address: str) -> None:
    result = run("status", "--control", address)
    assert result.exit_code == 2 and "host:port" in result.output


def test_serve_takes_no_prefill_worker_and_at_least_one_decode_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    import halfmoon.deploy.cli.serve as module

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "serve", lambda *arguments: calls.append(arguments))
    assert run("serve", "--prefill", "0").exit_code == 0 and calls[0][0].config.prefill.num_workers == 0
    assert run("serve", "--decode", "0").exit_code == 2 and len(calls) == 1


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (["--both", "2"], (0, 0, 2)),
        (["--both", "2", "--decode", "1"], (0, 1, 2)),
        (["--both", "1", "--prefill", "1", "--decode", "0"], (1, 0, 1)),
        (["--both", "0"], (1, 1, 0)),
        (["--set", "both.num_workers=1"], (1, 1, 1)),
    ],
)
def test_workers_of_both_roles_come_in_the_place_of_those_that_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], counts: tuple[int, int, int]
) -> None:
    import halfmoon.deploy.cli.serve as module

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "serve", lambda *arguments: calls.append(arguments))
    result = run("serve", *flags)
    assert result.exit_code == 0, result.output
    ((serving, _, _),) = calls
    config = serving.config
    assert (config.prefill.num_workers, config.decode.num_workers, config.both.num_workers) == counts


def test_serve_refuses_what_others_could_use_or_read_unless_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    import halfmoon.deploy.cli.serve as module
    from halfmoon.deploy.plan import make_plan
    from halfmoon.deploy.ray_session import RayNode
    from halfmoon.protocol.config import ClusterConfig
    from halfmoon.protocol.errors import ConfigError

    text = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=text, width=300))
    nodes = [RayNode("node-0", "10.1.2.3", 0.0)]

    def require(**changes: Any) -> None:
        config = ClusterConfig.load(None, {"proxy.host": "0.0.0.0", **changes})
        module._require_secure(config, make_plan(config, nodes))

    with pytest.raises(ConfigError, match=r"can use the model.*without TLS.*members on 10\.1\.2\.3 talk without TLS.*say --insecure"):
        require()
    assert text.getvalue() == ""
    require(**{"security.insecure": True})
    assert text.getvalue().count("INSECURE: ") == 3
    secure = {"proxy.keys_file": "k", "proxy.tls_certificate": "c", "proxy.tls_key": "t", "security.certs": "d"}
    require(**secure)
    for key in ("proxy.keys_file", "security.certs"):
        with pytest.raises(ConfigError):
            require(**{**secure, key: ""})
    assert text.getvalue().count("INSECURE: ") == 3, "what is secure is quiet"


def test_serve_says_who_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    from types import SimpleNamespace

    from rich.console import Console

    import halfmoon.deploy.cli.serve as module
    from halfmoon.protocol.config import ClusterConfig

    supervisor: Any = SimpleNamespace(
        http_address="127.0.0.1:1", grpc_address="127.0.0.1:2", control_address="127.0.0.1:3", metrics_address="127.0.0.1:4"
    )
    for num_prefill, words in ((2, "with 2 prefill and 3 decode workers on CPU"), (0, "with 3 decode workers, which prefill too")):
        text = io.StringIO()
        monkeypatch.setattr(module, "console", Console(file=text, width=160))
        overrides = {"prefill.num_workers": num_prefill, "decode.num_workers": 3}
        module._print_endpoints(supervisor, ClusterConfig.load(None, overrides), "cpu")
        assert words in text.getvalue()


def test_generate_streams_the_answer_and_ends_with_the_phase_record(face: Any) -> None:
    result = run("generate", "Hello", "--address", face.grpc, "--max-tokens", "100", "--seed", "5", "--temperature", "0", "--top-k", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{ANSWER}\n"
    for words in ("time to first token", "prefill-0 → decode-0 (shm)", "750.0 ms", f"6 (4) + {len(face.answer) + 1}"):
        assert words in result.stderr
    sampling = face.workers.requests[0].sampling
    assert (sampling.seed, sampling.temperature, sampling.top_k, sampling.max_tokens) == (5, 0.0, 3, 100)


def test_generate_ends_at_its_stop_texts(face: Any) -> None:
    result = run("generate", "Hello", "--address", face.grpc, "--stop", "never", "--stop", " fox")
    assert result.stdout == "The quick brown\n"


def test_an_answer_with_markup_is_printed_as_it_is(face: Any) -> None:
    text = "[bold]x[/] :smile: {1} [/nothing]"
    face.workers.script = lambda sequence: [*face.tokenizer.encode(text, add_special_tokens=False), 1]
    assert run("generate", "Hello", "--address", face.grpc).stdout == f"{text}\n"


@pytest.mark.parametrize(
    "command", [["generate", "x", "--address"], ["chat", "--address"], ["status", "--once", "--control"], ["status", "--control"]]
)
def test_no_cluster_is_one_line_and_exit_code_1(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfmoon.client.attempts.FIRST_DELAY_S", 0.001)
    result = run(*command, "127.0.0.1:1")
    assert result.exit_code == 1 and result.stdout == ""
    assert re.fullmatch(r"halfmoon: the proxy at 127\.0\.0\.1:1: unavailable: .*\n", result.stderr)


def test_a_refused_request_is_one_line_and_exit_code_1(face: Any) -> None:
    result = run("generate", "x" * 3000, "--address", face.grpc)
    assert result.exit_code == 1 and result.stdout == ""
    assert re.fullmatch(r"halfmoon: This model.s maximum context length is 512 tokens .* has \d+ tokens .*\n", result.stderr)


def test_status_once_is_a_table_of_members_and_latencies(face: Any) -> None:
    run("generate", "Hello", "--address", face.grpc)
    result = run("status", "--control", face.control.address, "--once")
    assert result.exit_code == 0, result.output
    for words in ("chatty, up", "prefill-0", "decode-0", "store-0", "25%", "time to first token", "p99", "done"):
        assert words in result.stdout
    assert re.search(r"time to first token +[\d.]+ m?s +[\d.]+ m?s +[\d.]+ m?s +\d+", result.stdout)


def test_status_is_whole_at_80_columns(face: Any) -> None:
    import io

    from rich.console import Console

    from halfmoon.client import Client
    from halfmoon.deploy.cli.status import picture

    with Client(face.grpc, control=face.control) as client:
        found = client.status()
    for width in (80, 140):
        text = io.StringIO()
        Console(file=text, width=width).print(picture(found, width))
        lines = text.getvalue().splitlines()
        assert max(map(len, lines)) <= width and "…" not in text.getvalue()
        assert any(re.match(r"prefill-0 +prefill .*cpu +1 +2 +0 +25%", line) for line in lines)
        assert (face.grpc.split(":")[0] in text.getvalue()) == (width > 80)


def test_status_says_which_workers_took_on_another_role_and_why_and_which_did_not() -> None:
    import io

    from rich.console import Console

    from halfmoon.client import ClusterStatus
    from halfmoon.deploy.cli.status import picture
    from halfmoon.protocol.v1 import control_pb2

    reply, why = control_pb2.StatusReply(), "98% of the last 160 requests in SLO with 1 prefill workers, 60% with 0"
    roles = {"former": control_pb2.ROLE_DECODE, "role": control_pb2.ROLE_PREFILL}
    reply.role_changes.add(member="both-1", reason=why, error="its pages are full", ago_s=3.0, **roles)
    reply.role_changes.add(member="both-0", reason=why, ago_s=75.0, **roles)
    found = ClusterStatus.from_proto(reply)
    assert [(one.member, one.former, one.role, one.error) for one in found.role_changes] == [
        ("both-1", "decode", "prefill", "its pages are full"),
        ("both-0", "decode", "prefill", ""),
    ]
    text = io.StringIO()
    Console(file=text, width=140).print(picture(found, 140))
    assert "3s ago: both-1 stayed decode and did not become prefill: its pages are full" in text.getvalue()
    assert f"1m15s ago: both-0 became prefill and was decode: {why}" in text.getvalue()


def test_status_json_is_one_object(face: Any) -> None:
    result = run("status", "--control", face.control.address, "--json")
    found = json.loads(result.stdout)
    assert found["model"] == "chatty" and {member["role"] for member in found["members"]} == {"prefill", "decode", "store"}
    assert found["ttft_s"].keys() == {"p50", "p90", "p99", "count"}


def test_chat_remembers_the_turns_and_puts_a_document_before_the_next(face: Any, tmp_path: Path) -> None:
    document = tmp_path / "notes.txt"
    document.write_text("the moon is half full")
    text = f"\n/nonsense\n/document {tmp_path}/none\n/document {document}\nwhat?\nand now?\n/quit\nnever sent\n"
    result = run("chat", "--address", face.grpc, "--system", "Be brief.", "--max-tokens", "50", text=text)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(ANSWER) == 2
    for words in ("chatty, 512 tokens", "no command /nonsense", "cannot read", "notes.txt, 21 characters", "4 cached"):
        assert words in result.stderr, words
    first, second = (face.tokenizer.decode(list(sequence.token_ids), skip_special_tokens=False) for sequence in face.workers.requests)
    assert first == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDocument notes.txt:\nthe moon is half full\n\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert second == f"{first}{ANSWER}<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_that_fails_is_taken_back_and_the_chat_goes_on(face: Any) -> None:
    result = run("chat", "--address", face.grpc, text=f"{'x' * 3000}\nshort\n")
    assert result.exit_code == 0 and "context length is 512" in result.stderr and ANSWER in result.stdout
    assert len(face.workers.requests) == 1


class Terminal:
    """A command on a terminal of its own, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(COLUMNS="120", LINES="40")
            os.execv(sys.executable, [*HALFMOON, *arguments])
        self.seen = ""

    def read_until(self, words: str, start: int = 0) -> None:
        deadline = time.monotonic() + 60
        while words not in self.seen[start:]:
            assert time.monotonic() < deadline, f"no {words!r} in {self.seen[start:]!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    self.seen += os.read(self._fd, 65536).decode(errors="replace")

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self._fd, 65536):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield make
    for one in opened:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        os.close(one._fd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(one.pid, 0)


def test_ctrl_c_in_chat_cancels_the_turn_and_not_the_chat(face: Any, terminal: Callable[..., Terminal]) -> None:
    face.workers.gate_at = 3
    chat = terminal("chat", "--address", face.grpc)
    chat.read_until("> ")
    chat.write("first\n")
    chat.read_until("quick brown")
    chat.write("\x03")
    assert face.workers.cancelled.wait(60)
    chat.read_until("the turn is taken back")
    face.open_gate()
    chat.write("second\n")
    chat.read_until("lazy dog.")
    prompt = face.tokenizer.decode(list(face.workers.requests[-1].token_ids), skip_special_tokens=False)
    assert "second" in prompt and "first" not in prompt
    chat.write("/quit\n")
    assert chat.exit_code() == 0


def test_status_is_live_until_interrupted(face: Any, terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFMOON_CLUSTER_TOKEN", FACE_TOKEN)
    status = terminal("status", "--control", face.control.address, "--interval", "0.1")
    status.read_until("prefill-0")
    face.workers.gate_at = 0
    generating = threading.Thread(target=run, args=("generate", "Hello", "--address", face.grpc))
    generating.start()
    status.read_until("waiting 1")
    face.open_gate()
    status.read_until("waiting 0", start=len(status.seen))
    status.write("\x03")
    assert status.exit_code() == 0
    generating.join()


def test_deploy_init_takes_any_key_of_the_configuration(tmp_path: Path) -> None:
    hosts = ["--head", "10.0.0.1", "--workers", "10.0.0.2", "--ssh-user", "me"]
    result = run("deploy", "init", str(tmp_path / "lab"), "--target", "local", *hosts, "--set", "decode.max_running=7")
    assert result.exit_code == 0, result.output
    assert "max_running: 7" in (tmp_path / "lab" / "halfmoon.yaml").read_text()

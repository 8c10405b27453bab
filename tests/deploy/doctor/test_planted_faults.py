"""Each planted fault is named in doctor's first line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import halfmoon.deploy.doctor.links as links
from halfmoon.client import PhaseRecord
from halfmoon.deploy.cli import app
from halfmoon.deploy.doctor.here import is_here, is_stopped
from halfmoon.deploy.doctor.probe import judge, send_probe
from halfmoon.kvstore.writer import BlockWriter
from halfmoon.protocol.config import PORTS
from halfmoon.protocol.schema import KVSchema

FREE_PORTS = [word for key in PORTS for word in ("--set", f"proxy.{key}=0")]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"HALFMOON_CLUSTER_TOKEN": "no-token-is-asked-for-by-this-proxy"})


def first_line(*arguments: str) -> str:
    """Of a doctor that found a fault."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    return result.stdout.splitlines()[0]


async def test_a_cluster_without_a_fault_is_well_and_every_transport_is_measured(site: Any) -> None:
    report = await site.report()
    assert report.is_well, report.findings
    assert {(link.store_id, link.transport) for link in report.links} == {("store-0", name) for name in ("shm", "tcp", "grpc")}
    assert all(link.num_bytes > 0 and link.bytes_per_s > 0 for link in report.links)
    stats = site.store.stats()
    assert (stats.num_bytes_leased, stats.num_bytes_cached, stats.num_handoffs) == (0, 0, 0), "nothing of a measurement stays"


async def test_a_store_that_is_down_is_named_before_what_follows_from_it(site: Any) -> None:
    site.lose("store-0", "it left the cluster")
    site.lose("prefill-0", "it left the cluster")
    worst = (await site.findings())[0]
    assert worst.severity == "fault" and worst.what.startswith("store-0 is down for 7 s") and "decode-0 find no prefix in it" in worst.what


async def test_a_store_that_the_proxy_still_lists_and_that_does_not_answer_is_named(site: Any) -> None:
    await site.store.stop(0)
    worst = (await site.findings())[0]
    assert (worst.check, worst.severity) == ("store", "fault") and "store-0 at 127.0.0.1" in worst.what


@pytest.mark.parametrize(
    "store_schema", [KVSchema(model_fingerprint="other", dtype="float16", num_layers=2, num_kv_heads=2, head_dim=16, block_size=16)]
)
async def test_a_store_of_another_model_is_named_with_both_formats(site: Any) -> None:
    worst = (await site.findings())[0]
    assert (worst.check, worst.severity, worst.code) == ("schema", "fault", "schema_mismatch")
    assert "KV formats differ in model_fingerprint, dtype" in worst.what and "store-0" in worst.what


async def test_a_worker_that_was_refused_for_its_schema_is_named(site: Any) -> None:
    site.lose("decode-0", "refused: KV formats differ in dtype: the cluster has float16, decode decode-0 has float32")
    worst = (await site.findings())[0]
    assert worst.check == "schema" and worst.what.startswith("decode-0 is refused: KV formats differ in dtype")


async def test_a_worker_that_is_stopped_is_named_with_its_process(site: Any, process: Callable[[], subprocess.Popen[bytes]]) -> None:
    found = process()
    os.kill(found.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, found.pid, os.WSTOPPED | os.WNOWAIT)
    for is_left in (False, True):
        site.member("prefill-0").info.pid = found.pid
        if is_left:
            site.lose("prefill-0", "it has not reported for 2.6 s")
        worst = (await site.findings())[0]
        assert worst.severity == "fault" and f"prefill-0 is stopped: its process {found.pid}" in worst.what
        assert f"kill -CONT {found.pid}" in worst.remedy


async def test_a_frozen_worker_of_another_machine_is_named_by_what_the_proxy_saw(site: Any) -> None:
    site.member("decode-0").info.address = "192.0.2.1:5000"
    site.member("decode-0").silent_s = 1.7
    assert "decode-0 has not reported for 1.7 s" in (await site.findings())[0].what
    site.lose("decode-0", "it has not reported for 2.6 s")
    assert "the decode worker decode-0 is gone for 7 s: it has not reported for 2.6 s" in (await site.findings())[0].what


async def test_a_worker_at_one_step_or_one_copy_for_long_is_named(site: Any) -> None:
    site.member("prefill-0").load.transfer_age_s = 12
    assert "prefill-0 has been at one copy to or from a store for 12 s" in (await site.findings())[0].what
    site.member("prefill-0").load.step_age_s = 40
    assert "prefill-0 has been at one step for 40 s" in (await site.findings())[0].what


async def test_an_arena_too_small_for_the_model_is_named(site: Any) -> None:
    site.member("store-0").info.kv_capacity_tokens = 256
    worst = (await site.findings())[0]
    assert worst.severity == "fault" and "arena is too small for the model: it holds 256 tokens and a prompt may have 512" in worst.what


async def test_prefill_workers_that_compute_nothing_while_requests_end_are_named(site: Any) -> None:
    site.pages["prefill-0"].num_tokens = 0
    worst = (await site.findings())[0]
    assert worst.severity == "slow" and worst.what.startswith("zero prefill traffic: 5 requests have ended, and prefill-0 computed none")
    site.status.outcomes["done"] = 0
    assert (await site.report()).is_well, "nobody has asked yet"


async def test_a_slow_link_is_named_with_its_store_transport_and_bandwidth(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is pushed late, and the bound is one that the others meet by far: no bound in time."""
    pushed = BlockWriter.push

    def push(self: BlockWriter, layer: int, first_block: int, blocks: Any) -> None:
        if self._transport.name == "tcp":
            time.sleep(0.5)
        pushed(self, layer, first_block, blocks)

    monkeypatch.setattr(BlockWriter, "push", push)
    num_bytes = NUM_MOVED * SCHEMA_BYTES
    monkeypatch.setattr(links, "SLOW_BYTES_PER_S", {"shm": 0.0, "tcp": num_bytes / 1.0, "grpc": 0.0})
    worst = (await site.findings())[0]
    assert (worst.check, worst.severity) == ("link", "slow") and worst.what.startswith("the link to store-0 by tcp: ")
    assert "iperf3" in worst.remedy


NUM_MOVED = 64 // links.ARENA_SHARE  # blocks
SCHEMA_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # of a block


async def test_a_link_on_which_nothing_passes_is_named(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(links, "measure", never)
    monkeypatch.setattr(links, "TIMEOUT_S", 0.01)
    assert "the link to store-0 by auto is slow: " in (await site.findings())[0].what


async def test_a_clock_that_is_off_is_a_warning_and_no_fault(site: Any) -> None:
    site.pages["decode-0"].skew_s = -90
    report = await site.report()
    (found,) = (one for one in report.findings if one.check == "clocks")
    assert report.is_well and found.severity == "warning" and "decode-0's machine is 90 s behind ours" in found.what.replace("89", "90")


async def test_a_port_of_a_member_that_is_not_reached_is_told(site: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        site.member("decode-0").info.address = f"127.0.0.1:{free.getsockname()[1]}"
    (found,) = (one for one in await site.findings() if one.check == "ports")
    assert found.severity == "warning" and "decode-0's gRPC port" in found.what


def test_no_proxy_at_the_address_is_named() -> None:
    assert "no proxy answers: the proxy's control at 127.0.0.1:1" in first_line("--proxy", "127.0.0.1:1", "--control", "127.0.0.1:1")


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = first_line(*FREE_PORTS, "--set", f"proxy.grpc_port={port}")
    assert line.startswith("fault") and f"port {port} is taken on 127.0.0.1" in line


def test_a_tiny_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, statvfs = SimpleNamespace(f_bavail=512, f_blocks=512, f_frsize=4096), os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda folder: tiny if str(folder) == "/dev/shm" else statvfs(folder))
    line = first_line(*FREE_PORTS)
    assert line.startswith("fault") and "/dev/shm has 2.1 MB free, which is too small" in line


def test_an_arena_that_is_set_too_small_is_named_before_a_start() -> None:
    line = first_line(*FREE_PORTS, "--set", "store.arena_bytes=4194304")
    assert line.startswith("fault") and "the KV store's arena is too small for the model: it holds 512 tokens" in line


def test_a_model_folder_that_is_missing_is_named_once(tmp_path: Path) -> None:
    result = run("--model", str(tmp_path / "none"), "--json", *FREE_PORTS)
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["well"]
    (fault,) = (one for one in report["findings"] if one["severity"] == "fault")
    assert fault == report["findings"][0] and "no model folder at" in fault["what"] and fault["code"] == "checkpoint_error"


def test_a_machine_without_a_fault_is_exit_code_0() -> None:
    result = run(*FREE_PORTS)
    assert result.exit_code == 0 and result.stdout.startswith("well"), result.output
    for words in ("torch", "memlock", "open files", "/dev/shm"):
        assert words in result.stdout


async def test_a_probe_tells_its_phases_and_a_failure(face: Any) -> None:
    probe = await send_probe(face.grpc, 512)
    assert probe.phases is not None and probe.usage is not None
    assert (probe.phases.prefill_worker, probe.usage.num_completion_tokens) == ("prefill-0", 16)
    assert 0 < len(face.workers.requests[-1].token_ids) <= 512
    assert (await send_probe("127.0.0.1:1", 512)).finding.severity == "fault"


def test_a_slow_probe_names_the_phase_that_took_longest() -> None:
    slow = judge(PhaseRecord(ttft_s=3.0, predicted_ttft_s=0.1, prefill_s=0.1, handoff_wait_s=2.7))
    assert slow.severity == "slow" and "2.700 s of it went into the hand-off to decode" in slow.what and "0.100 s predicted" in slow.what
    for fine in (PhaseRecord(ttft_s=3.0, predicted_ttft_s=2.0), PhaseRecord(ttft_s=0.2, predicted_ttft_s=0.001)):
        assert judge(fine).severity == "ok"


def test_only_a_process_of_this_machine_is_called_stopped(process: Callable[[], subprocess.Popen[bytes]]) -> None:
    assert is_here("127.0.0.1:5") and is_here("[::1]:5") and not is_here("192.0.2.1:5")
    found = process()
    assert not is_stopped(found.pid, "127.0.0.1:5") and not is_stopped(0, "127.0.0.1:5")
    os.kill(found.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, found.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_stopped(found.pid, "127.0.0.1:5") and not is_stopped(found.pid, "192.0.2.1:5")

"""Ports, addresses, shared memory, memory and GPUs of this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfmoon.deploy.checks.machine import check_ports, check_shm
from halfmoon.protocol.config import PORTS, ClusterConfig, PrefillConfig, ProxyConfig, StoreConfig
from halfmoon.protocol.errors import ConfigError, MachineError
from halfmoon.protocol.schema import KVSchema

MIB = 2**20
SCHEMA = KVSchema(model_fingerprint="f", dtype="float32", num_layers=4, num_kv_heads=2, head_dim=64, block_size=64)  # 256 KiB a block
BLOCK = SCHEMA.block_bytes


@pytest.fixture
def free_shm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """free_shm(num_bytes): of every folder, from now on."""

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=num_bytes // 4096, f_frsize=4096))

    return set_free


def config(arena_bytes: int = 0, num_prefill: int = 1) -> ClusterConfig:
    return ClusterConfig(store=StoreConfig(arena_bytes=arena_bytes), prefill=PrefillConfig(num_workers=num_prefill))


def test_a_port_that_another_process_listens_on_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for key in PORTS:
            ports: Any = {**dict.fromkeys(PORTS, 0), key: port}
            with pytest.raises(MachineError, match=rf"port {port} is taken on 127\.0\.0\.1.*proxy\.{key}, or 0") as raised:
                check_ports(ProxyConfig(**ports))
            assert raised.value.fields == {"key": f"proxy.{key}"}
    assert check_ports(ProxyConfig(http_port=port, grpc_port=0, control_port=0, metrics_port=0)).severity == "ok"


@pytest.mark.parametrize("host", ["203.0.113.9", "2001:db8::9"])
def test_an_address_that_is_not_this_machine_s_is_named(host: str) -> None:
    with pytest.raises(MachineError) as raised:
        check_ports(ProxyConfig(host=host))
    assert raised.value.message.startswith(f"proxy.host is {host}, which is no address of this machine")


def test_a_host_that_is_no_name_is_named() -> None:
    with pytest.raises(MachineError, match=r"'no such host'"):
        check_ports(ProxyConfig(host="no such host"))


def test_an_arena_larger_than_what_is_free_is_told_with_both_sizes(free_shm: Any) -> None:
    free_shm(64 * MIB)
    with pytest.raises(MachineError, match=r"/dev/shm is too small: store\.arena_bytes is 134217728 and 67\.1 MB are free.*--shm-size"):
        check_shm(config(arena_bytes=128 * MIB), SCHEMA, 4096)


def test_shared_memory_that_holds_no_prompt_ends_a_cluster_that_hands_off_and_no_coupled_one(free_shm: Any) -> None:
    free_shm(2 * 4 * BLOCK)  # half of it: 4 blocks
    with pytest.raises(
        MachineError, match=r"/dev/shm has 2\.1 MB free, which is too small: half of it holds the KV of 256 tokens.*--prefill 0"
    ):
        check_shm(config(), SCHEMA, 4096)
    assert check_shm(config(num_prefill=0), SCHEMA, 4096).severity == "ok"
    assert check_shm(config(), SCHEMA, 256).severity == "ok", "a prompt of this model has no more"


def test_shared_memory_without_room_for_a_block_is_refused(free_shm: Any) -> None:
    free_shm(BLOCK)
    with pytest.raises(ConfigError, match=r"one KV block takes 262\.1 kB"):
        check_shm(config(num_prefill=0), SCHEMA, 4096)


def test_an_arena_that_is_too_small_for_the_model_is_told_and_serves_shorter_prompts(free_shm: Any) -> None:
    free_shm(1024 * MIB)
    found = check_shm(config(arena_bytes=8 * BLOCK), SCHEMA, 4096)
    assert found.severity == "fault" and "arena is too small for the model: it holds 512 tokens and a prompt may have 4096" in found.what
    assert found.remedy == "raise store.arena_bytes"
    assert check_shm(config(arena_bytes=64 * BLOCK), SCHEMA, 4096).severity == "ok"
    assert check_shm(config(arena_bytes=8 * BLOCK, num_prefill=0), SCHEMA, 4096).severity == "ok", (
        "a cache, and no prompt passes through it"
    )


def test_the_models_default_is_64_of_its_longest_prompts(free_shm: Any, tmp_path: Path) -> None:
    free_shm(10**12)
    assert "262144 tokens, 64.0 prompts of 4096" in check_shm(config(), SCHEMA, 4096, tmp_path).what

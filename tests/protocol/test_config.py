from __future__ import annotations

from pathlib import Path

import pytest

from halfmoon.protocol.config import ClusterConfig
from halfmoon.protocol.errors import ConfigError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "halfmoon.yaml"
    path.write_text(text)
    return path


def test_a_file_and_flags_together_make_one_configuration_and_flags_win(tmp_path: Path) -> None:
    path = written(tmp_path, "proxy:\n  policy: random\n  http_port: 9000\nprefill:\n  num_workers: 3\n")
    config = ClusterConfig.load(path, {"proxy.http_port": 9001})
    assert (config.proxy.policy, config.proxy.http_port, config.prefill.num_workers) == ("random", 9001, 3)
    assert config.decode == ClusterConfig().decode


def test_without_a_file_the_defaults_hold() -> None:
    assert ClusterConfig.load() == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("proxy:\n  polcy: random\n", "'proxy.polcy'; did you mean 'proxy.policy'"),
        ("prefil:\n  num_workers: 1\n", "'prefil'; did you mean 'prefill'"),
        ("proxy:\n  policy: fastest\n", "'fastest'; it must be one of 'random'"),
        ("model:\n  tool_parser: qwen\n", "'qwen'; it must be one of 'auto', 'none', 'hermes', 'llama3_json', 'mistral', 'pythonic'"),
        ("model:\n  reasoning_parser: r2\n", "'r2'; it must be one of 'auto', 'none', 'qwen3', 'deepseek_r1'"),
        ("proxy:\n  http_port: many\n", "proxy.http_port is 'many'; it must be of type int"),
        ("prefill:\n  num_workers: true\n", "prefill.num_workers is True; it must be of type int"),
        ("prefill:\n  num_workers: -1\n", "prefill.num_workers is -1; it must be a finite number and not negative"),
        ("prefill:\n  tensor_parallel: 0\n", "prefill.tensor_parallel is 0; it must be at least 1"),
        ("decode:\n  tensor_parallel: 0\n", "decode.tensor_parallel is 0; it must be at least 1"),
        ("proxy:\n  drain_timeout_s: .nan\n", "proxy.drain_timeout_s is nan; it must be a finite number"),
        ("proxy:\n  http_port: 70000\n", "proxy.http_port is 70000; a port is at most 65535"),
        ("proxy:\n  http_port: 50051\n", "proxy.http_port and proxy.grpc_port are both 50051"),
        ("proxy: 3\n", "proxy is 3; it must be a section"),
        ("- 1\n", "holds list"),
        ("proxy: [\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_the_value_and_what_to_write(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.load(written(tmp_path, text))
    assert told in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        ClusterConfig.load(tmp_path / "nowhere.yaml")


def test_a_workers_ranks_are_those_of_its_role_and_both_has_decodes(tmp_path: Path) -> None:
    text = "prefill: {num_workers: 2, tensor_parallel: 4}\ndecode: {num_workers: 1, tensor_parallel: 2}\nboth: {num_workers: 3}\n"
    config = ClusterConfig.load(written(tmp_path, text))
    assert [config.ranks_of(role) for role in ("prefill", "decode", "both")] == [4, 2, 2]
    assert (config.num_workers, config.num_ranks) == (6, 2 * 4 + 1 * 2 + 3 * 2)


def test_an_integer_is_taken_for_seconds(tmp_path: Path) -> None:
    config = ClusterConfig.load(written(tmp_path, "proxy:\n  drain_timeout_s: 5\n"))
    assert config.proxy.drain_timeout_s == 5.0
    assert isinstance(config.proxy.drain_timeout_s, float)

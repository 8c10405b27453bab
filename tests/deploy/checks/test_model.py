"""What a broken model folder is told as, before anything is started."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halfmoon.deploy.checks.before_start import StartChecks, require_startable
from halfmoon.deploy.checks.finding import Finding, run_check, worst_first
from halfmoon.engine.resolve import DEMO_FOLDER
from halfmoon.protocol.config import ClusterConfig, ModelOptions, ProxyConfig
from halfmoon.protocol.errors import CheckpointError, ConfigError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 16060522904\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def config_of(folder: Path) -> ClusterConfig:
    return ClusterConfig(
        model=ModelOptions(path=str(folder), device="cpu"), proxy=ProxyConfig(http_port=0, grpc_port=0, control_port=0, metrics_port=0)
    )


def test_of_a_whole_folder_its_memory_is_told_and_nothing_else(folder: Path) -> None:
    told = require_startable(config_of(folder), own_ray=True)
    assert [(found.check, found.severity) for found in told] == [("memory", "ok"), ("/dev/shm", "ok")]
    assert "prefill: 21.5 MB of weights; decode: 21.5 MB of weights" in told[0].what


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)


def weights_are_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)


def tokenizer_is_a_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(POINTER)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def template_does_not_parse(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (shard_missing, ["model-00002-of-00002.safetensors", "finish the download"]),
        (weights_are_a_pointer, ["model.safetensors", "git-LFS pointer", "git lfs pull"]),
        (tokenizer_is_a_pointer, ["tokenizer.json", "git-LFS pointer", "git lfs pull"]),
        (no_tokenizer, ["no tokenizer.json in"]),
        (template_does_not_parse, ["the chat template does not parse", "line 1"]),
        (lambda folder: (folder / "config.json").write_bytes(POINTER), ["config.json", "git lfs pull"]),
    ],
)
def test_what_is_wrong_in_a_folder_is_named_with_what_to_do(folder: Path, fault: Callable[[Path], None], words: list[str]) -> None:
    fault(folder)
    with pytest.raises(CheckpointError) as raised:
        require_startable(config_of(folder), own_ray=True)
    assert all(word in raised.value.message for word in words), raised.value.message
    worst = worst_first([run_check(check) for check in StartChecks(config_of(folder)).all()])[0]
    assert worst.severity == "fault" and words[0] in worst.what


def test_ranks_that_the_model_can_not_be_divided_into_are_named_with_what_it_takes(folder: Path) -> None:
    asked = config_of(folder)
    asked = dataclasses.replace(asked, decode=dataclasses.replace(asked.decode, tensor_parallel=64))
    with pytest.raises(ConfigError, match=r"decode\.tensor_parallel is 64, and num_kv_heads of the model is \d+.*this model takes 1"):
        require_startable(asked, own_ray=True)


def test_a_folder_without_a_chat_template_serves_and_says_so(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (warning,) = (found for found in require_startable(config_of(folder), own_ray=True) if found.severity != "ok")
    assert (warning.severity, warning.check) == ("warning", "tokenizer") and "has no chat template" in warning.what


def test_the_worst_comes_first_and_of_two_as_bad_the_earlier() -> None:
    found = [
        Finding(name, severity, "") for name, severity in (("a", "ok"), ("b", "warning"), ("c", "fault"), ("d", "slow"), ("e", "fault"))
    ]  # type: ignore[arg-type]
    assert [one.check for one in worst_first(found)] == ["c", "e", "d", "b", "a"]

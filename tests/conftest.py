"""Fixtures that several rooms share. What they bring is heavy, so it is loaded where one of them is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if not Path("/dev/nvidiactl").exists():
    # triton reads it when it is first imported, and a test of another room may be the first to do that
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Ray forks to start its processes; gRPC's handlers for that, in a process whose threads call it, now and then crash the child
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# a shell that runs the suite in the background has it ignored, and so would have every process that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


def _load(name: str) -> Any:
    """tests/<name>.py; importlib mode has no name to import it by."""
    spec = importlib.util.spec_from_file_location(f"halfmoon_test_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """load("cluster"): a file of tests/benchmarks, whose files import each other by their bare names."""
    folder = Path(__file__).with_name("benchmarks")
    names = [path.stem for path in folder.glob("*.py")]
    monkeypatch.syspath_prepend(str(folder))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """checkpoint(variant, max_shard_size="1GB") -> its folder and transformers' own model; tests/checkpoints.py."""
    return _load("checkpoints").Checkpoints(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def faces() -> Any:
    return _load("faces")


@pytest.fixture(scope="session")
def loop_gap() -> Any:
    """with loop_gap(loop) as gap: ...; gap.longest_s. tests/loop_gap.py."""
    return _load("loop_gap").loop_gap


@pytest.fixture(scope="session")
def chat_model_folder(faces: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config, tokenizer and chat template of a small model, "chatty"; no weights."""
    return faces.write_model_folder(tmp_path_factory.mktemp("models") / "chatty")


@pytest.fixture(scope="session")
def chat_tokenizer(chat_model_folder: Path) -> Any:
    from halfmoon.proxy.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(chat_model_folder)


@pytest.fixture(scope="session")
def make_face(faces: Any, chat_model_folder: Path, chat_tokenizer: Any) -> Iterator[Callable[..., Any]]:
    """make_face(**proxy config) -> Face."""
    made: list[Any] = []

    def make(**config: Any) -> Any:
        made.append(faces.Face(chat_model_folder, chat_tokenizer, **config))
        return made[-1]

    yield make
    for face in made:
        face.stop()


@pytest.fixture(scope="session")
def shared_face(make_face: Callable[..., Any]) -> Any:
    return make_face()


@pytest.fixture
def face(shared_face: Any) -> Iterator[Any]:
    """The session's proxy with fresh scripts; a request that a test leaves behind fails it."""
    shared_face.reset()
    yield shared_face
    shared_face.open_gate()
    deadline = time.monotonic() + 2
    while shared_face.num_under_way and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shared_face.num_under_way == 0

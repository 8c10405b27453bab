"""Fixtures that several rooms share. What they bring is heavy, so it is loaded where one of them is asked for."""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import gc
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

if not Path("/dev/nvidiactl").exists():
    # triton reads it when it is first imported, and a test of another room may be the first to do that
    os.environ.setdefault("TRITON_INTERPRET", "1")
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if NUM_WORKERS > 1:
    # torch, numpy and Triton's interpreter take all cores each; the workers of one run share them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // NUM_WORKERS)))
# Ray forks to start its processes; gRPC's handlers for that, in a process whose threads call it, now and then crash the child
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# a shell that runs the suite in the background has it ignored, and so would have every process that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
# an example may take as long as it has to: on a busy machine it would fail after 200 ms, or for being slow to draw
hypothesis.settings.register_profile("halfmoon", deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow])
# --hypothesis-profile=thorough, for who changes what such a test is about; a test with a number of its own keeps it
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("halfmoon"), max_examples=1000)
hypothesis.settings.load_profile("halfmoon")


EXIT_S = 60  # from the last test to the end of the process
WORKER_EXIT_S = 8  # of one of `pytest -n`, from its exit: xdist kills it after 10


def _load(name: str) -> Any:
    """tests/<name>.py; importlib mode has no name to import it by."""
    spec = importlib.util.spec_from_file_location(f"halfmoon_test_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_leaks = _load("leaks")
_open_objects = _leaks.OpenObjects()


def pytest_configure(config: pytest.Config) -> None:
    import grpc.aio

    # gRPC's poller lives as long as the process: else it starts and ends with each test's first and last channel, and the end is a
    # wait without a limit, which at exit is the garbage collector's
    grpc.aio.init_grpc_aio()


LONGEST = (
    "deploy/clusters", "kernels/test_compile_ahead.py", "deploy/test_serve.py", "test_packaging.py",
    "decode_worker/test_architectures.py",
    "decode_worker/test_worker.py", "decode_worker/test_prefix_cache.py", "decode_worker/test_local_prefill.py", "test_floors.py",
    "kernels/test_portable_paged_decode.py", "kernels/test_portable_flash_prefill.py", "decode_worker/test_grammar.py",
    "decode_worker/test_both_roles.py", "engine/test_demo_model.py", "engine/test_engine.py",
)  # fmt: skip
"""Groups that take longest: begun first, or one worker would be left alone with them at the end."""


def group_of(nodeid: str) -> str:
    """Tests of a group run on one worker: those of a file, and all whose clusters share one Ray."""
    path = nodeid.split("::")[0].removeprefix("tests/")
    return "deploy/clusters" if path.startswith("deploy/clusters/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay together, and those of all files whose clusters share one Ray.

    Not xdist's own groups: with pytest 9.2 its workers don't tell their names, and each test would be a group of its own.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What imports make stays. The garbage collector waits while they run and looks at none of it later: its rounds would take a third of
    the time that this takes, and a second here and there in the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `pytest -n`: the longest groups first. Ray fixes at its import whether a process brings a token: a file that imports it while
    it is collected breaks every Ray that this process starts."""
    if "ray" in sys.modules:
        raise pytest.UsageError("a test file imports ray where it is collected; import it in the test, behind ray_environment")
    if config.getoption("numprocesses", None) or NUM_WORKERS > 1:
        rank = {group: index for index, group in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(rank)))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A process that hangs at its exit shows where, and fails. The time of a worker, which may wait for the others, begins at its exit."""
    if hasattr(config, "workerinput"):
        atexit.register(faulthandler.dump_traceback_later, WORKER_EXIT_S, file=sys.__stderr__)
    else:
        faulthandler.dump_traceback_later(EXIT_S, exit=True, file=sys.__stderr__)


@pytest.fixture(autouse=True)
async def leaves_nothing_open() -> AsyncIterator[None]:
    """Set up before a test's other fixtures and torn down after them; what fixtures of a wider scope hold stays."""
    found, tasks = await _open_objects.find(), asyncio.all_tasks()
    yield
    await _leaks.cancel_tasks(tasks)
    left = await _open_objects.find() - found
    if left:
        pytest.fail(f"left behind by the test or its fixtures:\n{_open_objects.describe(left)}", pytrace=False)


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
def quantized(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """quantized(form, variant="llama_biased") -> a folder: `quantized`, and `plain` as it means; tests/quantized_checkpoints.py."""
    forms, made = _load("quantized_checkpoints"), {}

    def make(form: str, variant: str = "llama_biased", plain_modules: tuple[str, ...] = ()) -> Path:
        key = form, variant, plain_modules
        if key not in made:
            made[key] = forms.write(form, checkpoint(variant).folder, tmp_path_factory.mktemp(form), plain_modules)
        return made[key]

    return make


@pytest.fixture(scope="session")
def calibrated_once() -> Iterator[None]:
    """A worker like one that this process has had takes over what that one measured at its load, and does not run the same steps again."""
    from halfmoon.engine import worker

    calibrate, found = worker.calibrate, dict[Any, Any]()

    def once(executor: Any, allocator: Any, max_chunk_tokens: int) -> Any:
        key = (executor.facts.schema.fingerprint, allocator.num_free, max_chunk_tokens)
        if key not in found:
            found[key] = calibrate(executor, allocator, max_chunk_tokens)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "calibrate", once)
        yield


@pytest.fixture(scope="session")
def worker_views() -> Any:
    return _load("worker_views")


@pytest.fixture(scope="session")
def store_closing() -> Any:
    return _load("store_closing")


@pytest.fixture(scope="session")
def faces() -> Any:
    return _load("faces")


@pytest.fixture(scope="session")
def fuzz() -> Any:
    """fuzz(address, service descriptors) -> how often each status came. tests/grpc_fuzz.py."""
    return _load("grpc_fuzz").fuzz


@pytest.fixture(scope="session")
def loop_gap() -> Any:
    """with loop_gap(loop) as gap: ...; gap.longest_s. tests/loop_gap.py."""
    return _load("loop_gap").loop_gap


@pytest.fixture(scope="session")
def schemas() -> dict[str, dict[str, Any]]:
    """By name; tests/schemas.py."""
    return _load("schemas").SCHEMAS


@pytest.fixture(scope="session")
def drawn_schemas() -> dict[str, dict[str, Any]]:
    """140 of a seed, by name; tests/schemas.py."""
    return _load("schemas").drawn(140)


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
    """make_face(**proxy config) -> Face; of another model with folder, tokenizer and options."""
    made: list[Any] = []

    def make(folder: Path = chat_model_folder, tokenizer: Any = chat_tokenizer, options: Any = None, **config: Any) -> Any:
        made.append(faces.Face(folder, tokenizer, options, **config))
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
    deadline = time.monotonic() + 60
    while shared_face.num_under_way and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shared_face.num_under_way == 0

"""The house: folders are floors, and an import may only go down (docs/architecture.md)."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT: dict[str, set[str]] = {
    "protocol": set(),
    "kernels": set(),
    "client": {"protocol"},
    "kvstore": {"protocol"},
    "engine": {"kernels", "kvstore", "protocol"},
    "prefill_worker": {"engine", "kvstore", "kernels", "protocol"},
    "decode_worker": {"engine", "kvstore", "kernels", "protocol"},
    "proxy": {"client", "kvstore", "protocol"},
    "simulator": {"proxy", "prefill_worker", "decode_worker", "kvstore", "engine", "protocol"},
    "deploy": {"simulator", "proxy", "prefill_worker", "decode_worker", "engine", "kvstore", "kernels", "client", "protocol"},
}

PROXY_FLOORS: dict[str, set[str]] = {
    "request": set(),
    "conductor": set(),
    "text": set(),
    "request_process": {"text"},
    "model_card": {"text"},
    "verdict": {"conductor"},
    "face_metrics": set(),
    "tracing": {"request"},
    "member_metrics": set(),
    "timeline": set(),
    "metrics": {"request", "verdict", "face_metrics", "member_metrics", "timeline"},
    "members": {"conductor", "metrics", "member_metrics"},
    "prefixes": {"conductor", "members"},
    "tenants": set(),
    "requests": {"request", "tenants", "conductor", "text", "model_card", "metrics", "verdict", "tracing", "members", "prefixes"},
    "page": {"requests", "tenants", "members", "timeline"},
    "openai": {"page", "requests", "tenants", "request_process", "text", "members", "face_metrics"},
    "slow_reader": set(),
    "inference_service": {"requests", "tenants", "request_process", "text", "slow_reader"},
    "control_service": {"requests"},
    "metrics_targets": {"members"},
    "server": {
        "control_service",
        "inference_service",
        "openai",
        "request_process",
        "requests",
        "tenants",
        "members",
        "metrics",
        "metrics_targets",
        "model_card",
        "text",
        "tracing",
    },
}
"""proxy/'s own rooms and root files, and what of proxy/ each may import."""

PROXY_ROOMS_OUTSIDE = {
    "simulator": {"conductor", "prefixes"},
    "deploy": {"conductor", "model_card", "prefixes", "server", "tenants", "text"},
}
"""What of proxy/ its users may import. deploy starts the server, and checks tokenizer and defaults as it will read them."""


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imported_modules(path: Path) -> list[list[str]]:
    """What of halfmoon a module imports, by parts, at its top or anywhere in it; `import halfmoon.x`, `from ..x import y` alike."""
    package = ["halfmoon", *path.relative_to(ROOT).parent.parts]
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names.update([stem] if stem != "halfmoon" else [f"halfmoon.{alias.name}" for alias in node.names])
    return [parts for parts in (name.split(".") for name in names) if parts[0] == "halfmoon" and len(parts) > 1]


def imported_rooms(path: Path) -> set[str]:
    return {parts[1] for parts in imported_modules(path) if parts[1] in MAY_IMPORT}


def imported_proxy_rooms(path: Path) -> set[str]:
    return {parts[2] for parts in imported_modules(path) if parts[1] == "proxy" and len(parts) > 2}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_floors_below_it(room: str) -> None:
    for path in modules(room):
        upward = imported_rooms(path) - MAY_IMPORT[room] - {room}
        assert not upward, f"{path.relative_to(ROOT)} imports {', '.join(sorted(upward))}; {room} stands below or beside"


@pytest.mark.parametrize("room", PROXY_FLOORS)
def test_a_room_of_the_proxy_imports_only_from_floors_below_it(room: str) -> None:
    found = modules(f"proxy/{room}") or [ROOT / "proxy" / f"{room}.py"]
    for path in found:
        upward = imported_proxy_rooms(path) - PROXY_FLOORS[room] - {room}
        assert not upward, f"{path.relative_to(ROOT)} imports proxy/{', '.join(sorted(upward))}; {room} stands below or beside"


def test_the_proxy_s_floors_are_drawn_without_a_circle_and_name_all_of_it() -> None:
    tuple(graphlib.TopologicalSorter(PROXY_FLOORS).static_order())  # raises CycleError
    assert set(PROXY_FLOORS) == {path.stem for path in (ROOT / "proxy").iterdir() if not path.name.startswith("__")}


@pytest.mark.parametrize("room", PROXY_ROOMS_OUTSIDE)
def test_who_uses_the_proxy_imports_its_pure_rooms_alone(room: str) -> None:
    for path in modules(room):
        assert imported_proxy_rooms(path) <= PROXY_ROOMS_OUTSIDE[room], path.relative_to(ROOT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_inside_the_package_imports_between_rooms_are_relative(room: str) -> None:
    for path in modules(room):
        if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):  # protoc knows only absolute imports
            continue
        for node in ast.walk(tree_of(path)):
            absolute = isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "halfmoon"
            assert not absolute, f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module} by its full name"


def test_every_folder_of_the_tree_is_a_listed_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["halfmoon", *path.parent.relative_to(ROOT).parts])
        for room in MAY_IMPORT
        for path in [*(ROOT / room).rglob("*.py")]
        if "__pycache__" not in path.parts
    }
    assert listed == found | {"halfmoon"}


def test_the_root_holds_no_other_python_file() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", ["kernels", "proxy"])
def test_folders_named_like_foreign_packages_hold_no_code_in_their_init(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").read_text() == ""


def test_a_transformers_model_imports_in_a_process_started_in_the_root() -> None:
    # transformers probes for a package called kernels, and breaks where it meets ours under that name
    code = "from transformers import LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=_environment_without_safe_path())


def import_all(modules: Sequence[str], *, without: Sequence[str]) -> None:
    """In one process of their own, one after the other. Fails at the first that imports one of `without`."""
    code = (
        f"import importlib, sys\nfor name in {list(modules)!r}:\n"
        f"    importlib.import_module(name)\n    found = {set(without)!r} & set(sys.modules)\n    assert not found, (name, found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_simulator_runs_imports_neither_torch_nor_ray() -> None:
    schedulers = ("engine.combined_scheduler", "prefill_worker.scheduler", "decode_worker.scheduler")
    others = ("engine.sequence", "engine.page_allocator", "proxy.conductor.conductor", "kvstore.eviction")
    import_all([f"halfmoon.{name}" for name in (*schedulers, *others)], without=["torch", "ray"])


def test_what_stands_above_the_executor_imports_no_torch() -> None:
    modules = [f"halfmoon.{name}" for name in ("engine.executor", "engine.worker", "prefill_worker.worker", "decode_worker.worker")]
    import_all(modules, without=["torch", "ray"])


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (["proxy.server"], ["torch", "ray"]),
        (["kvstore.server"], ["torch", "fastapi", "ray"]),
        (["engine.worker", "engine.engine", "deploy.worker"], ["fastapi", "ray"]),
    ],
    ids=["proxy", "store", "worker"],
)
def test_a_members_process_loads_nothing_that_only_others_need(modules: list[str], unwanted: list[str]) -> None:
    """Ray itself starts it, and a machine with a GPU runs a worker without it."""
    import_all([f"halfmoon.{name}" for name in ("deploy.actors", *modules)], without=unwanted)


def test_the_conductor_imports_neither_grpc_nor_torch_nor_ray() -> None:
    names = [".".join(["halfmoon", *path.relative_to(ROOT).with_suffix("").parts]) for path in modules("proxy/conductor")]
    import_all(names, without=["grpc", "torch", "ray"])


def test_no_function_is_longer_than_a_screen_and_no_file_than_500_lines() -> None:
    for room in MAY_IMPORT:
        for path in modules(room):
            if "_pb2" in path.name:
                continue
            text = path.read_text()
            assert len(text.splitlines()) <= 500, f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines"


def test_nobody_starts_a_task_but_protocol_tasks() -> None:
    """A task without an owner is one whose exception nobody sees. asyncio.TaskGroup is an owner, too."""
    for room in MAY_IMPORT:
        for path in modules(room):
            if path == ROOT / "protocol" / "tasks.py":
                continue
            tree = tree_of(path)
            groups = {
                item.optional_vars.id
                for node in ast.walk(tree)
                if isinstance(node, ast.AsyncWith)
                for item in node.items
                if ast.unparse(item.context_expr) == "asyncio.TaskGroup()" and isinstance(item.optional_vars, ast.Name)
            }
            for node in ast.walk(tree):
                starts = isinstance(node, ast.Attribute) and node.attr in ("create_task", "ensure_future")
                owned = starts and isinstance(node.value, ast.Name) and node.value.id in groups
                assert not starts or owned, f"{path.relative_to(ROOT)}:{node.lineno}: use Tasks or beside of protocol/tasks.py"


def _environment_without_safe_path() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}

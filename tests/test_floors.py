"""The house: folders are floors, and an import may only go down (docs/architecture.md)."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
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
    "tasks": set(),
    "conductor": set(),
    "text": set(),
    "request_process": {"text"},
    "model_card": {"text"},
    "verdict": {"conductor"},
    "face_metrics": set(),
    "tracing": {"request"},
    "member_metrics": set(),
    "metrics": {"request", "verdict", "face_metrics", "member_metrics"},
    "members": {"conductor", "metrics", "member_metrics", "tasks"},
    "prefixes": {"conductor", "members", "tasks"},
    "requests": {"request", "conductor", "text", "model_card", "metrics", "verdict", "tracing", "members", "prefixes", "tasks"},
    "openai": {"requests", "request_process", "text", "members", "face_metrics"},
    "inference_service": {"requests", "request_process", "text"},
    "control_service": {"requests"},
    "server": {
        "control_service",
        "inference_service",
        "openai",
        "request_process",
        "requests",
        "members",
        "metrics",
        "model_card",
        "text",
        "tracing",
    },
}
"""proxy/'s own rooms and root files, and what of proxy/ each may import."""

PROXY_ROOMS_OUTSIDE = {"simulator": {"conductor", "prefixes"}, "deploy": {"conductor", "prefixes", "server"}}
"""What of proxy/ its users may import. deploy starts the server, and knows nothing of what is in it."""


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> list[list[str]]:
    """What of halfmoon a module imports, by parts, at its top or anywhere in it; `import halfmoon.x`, `from ..x import y` alike."""
    package = ["halfmoon", *path.relative_to(ROOT).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
        for node in ast.walk(ast.parse(path.read_text())):
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


@pytest.mark.parametrize(
    "module",
    ["halfmoon.engine.sequence", "halfmoon.engine.page_allocator", "halfmoon.engine.combined_scheduler",
     "halfmoon.prefill_worker.scheduler", "halfmoon.decode_worker.scheduler",
     "halfmoon.proxy.conductor.conductor", "halfmoon.kvstore.eviction"],
)  # fmt: skip
def test_what_the_simulator_runs_imports_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; found = {{'torch', 'ray'}} & set(sys.modules); sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module", ["halfmoon.engine.executor", "halfmoon.engine.worker", "halfmoon.prefill_worker.worker", "halfmoon.decode_worker.worker"]
)
def test_what_stands_above_the_executor_imports_no_torch(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = sys.modules['ray'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_conductor_imports_neither_grpc_nor_torch_nor_ray() -> None:
    names = [".".join(["halfmoon", *path.relative_to(ROOT).with_suffix("").parts]) for path in modules("proxy/conductor")]
    code = f"import sys, {', '.join(names)}; found = {{'grpc', 'torch', 'ray'}} & set(sys.modules); sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module", ["halfmoon.engine.engine", "halfmoon.engine.worker", "halfmoon.kvstore.server", "halfmoon.deploy.worker"]
)
def test_what_runs_on_a_gpu_machine_imports_without_ray(module: str) -> None:
    code = f"import sys; sys.modules['ray'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_function_is_longer_than_a_screen_and_no_file_than_500_lines() -> None:
    for room in MAY_IMPORT:
        for path in modules(room):
            if "_pb2" in path.name:
                continue
            text = path.read_text()
            assert len(text.splitlines()) <= 500, f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines"


def _environment_without_safe_path() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}

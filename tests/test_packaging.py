"""What a user installs, and what the repository promises about itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from halfmoon.protocol.generate import PROTO_FOLDER, generate

ROOT = Path(__file__).parent.parent


def test_the_generated_stubs_match_the_proto_files(tmp_path: Path) -> None:
    fresh = {path.name: path.read_text() for path in generate(tmp_path)}
    committed = {path.name: path.read_text() for path in PROTO_FOLDER.glob("*_pb2*")}
    assert fresh == committed, "the .proto files changed: run `make proto`"


def test_the_base_install_asks_for_neither_torch_nor_ray() -> None:
    wanted = [Requirement(text) for text in requires("halfmoon") or []]
    base = {found.name for found in wanted if found.marker is None or found.marker.evaluate({"extra": ""})}
    assert base == {"grpcio", "protobuf"}


@pytest.mark.slow
def test_the_sdk_installed_alone_imports_and_brings_neither_torch_nor_ray(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    # built from a copy: pip builds in the source folder, and what it leaves there would come along in the next wheel
    source = shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "docs", "tests")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]  # ours, which need not be installed there first
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("halfmoon-*.whl")
    assert wheel.stat().st_size < 2**21  # the code alone, and no weights
    subprocess.run([*pip, "install", "-q", "--no-compile", "-c", constraints, wheel], check=True, cwd=tmp_path)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    names = {line.split("==")[0].lower() for line in listed.splitlines()}
    assert {"halfmoon", "grpcio", "protobuf"} <= names
    assert not names & {"torch", "ray", "triton", "numpy", "fastapi"}
    subprocess.run([python, "-c", "from halfmoon.client import Client, AsyncClient"], check=True, cwd=tmp_path)
    told = subprocess.run([tmp_path / "venv" / "bin" / "halfmoon"], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 1
    assert "halfmoon[cli]" in told.stderr


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    for text in requires("halfmoon") or []:
        wanted = Requirement(text)
        if wanted.name.lower() == "halfmoon":
            continue
        name = canonicalize_name(wanted.name)
        assert name in pins, f"{name} is not in constraints.txt"
        assert wanted.specifier.contains(Version(pins[name]), prereleases=True), f"{name}=={pins[name]} is outside {wanted.specifier}"


def test_every_dependency_has_its_reason_written_down() -> None:
    decisions = (ROOT / "docs" / "decisions.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*extras["dependencies"], *(text for group in extras["optional-dependencies"].values() for text in group)]
    for text in texts:
        name = Requirement(text).name
        assert name == "halfmoon" or re.search(rf"`{re.escape(name)}`", decisions), f"docs/decisions.md gives no reason for {name}"


def test_python_runs_the_cli_as_a_module() -> None:
    told = subprocess.run([sys.executable, "-P", "-m", "halfmoon", "--help"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    for command in ("serve", "generate", "chat", "status"):
        assert command in told.stdout

"""Where the demo model is, and Ray's import."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmoon.deploy.ray_session import ray_environment
from halfmoon.engine.resolve import DEMO_FOLDER


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return DEMO_FOLDER


@pytest.fixture(scope="session", autouse=True)
def _ray_knows_its_token() -> None:
    """Ray fixes at its import whether a process brings a token, and whoever imports it first here may be a test without a cluster."""
    with ray_environment():
        import ray  # noqa: F401  # pyright: ignore[reportUnusedImport]

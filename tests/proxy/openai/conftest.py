"""A server of a model whose chat template has tools and reasoning; its answers are what a test has it say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfmoon.proxy.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def caller_folder(faces: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faces.write_model_folder(tmp_path_factory.mktemp("models") / "caller", faces.TOOLS_CHATML, max_model_len=4096)


@pytest.fixture(scope="module")
def caller(make_face: Callable[..., Any], caller_folder: Path) -> Any:
    return make_face(caller_folder, Tokenizer.from_folder(caller_folder))

"""client/__init__.py is the SDK's public face, and it is light."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import halfmoon
import halfmoon.client as sdk


def test_all_names_what_is_public_and_nothing_else() -> None:
    public = {name for name, value in vars(sdk).items() if not name.startswith("_") and not inspect.ismodule(value)} - {"annotations"}
    assert set(sdk.__all__) == public
    assert sdk.__all__ == sorted(sdk.__all__)


def test_everything_public_has_words_for_it() -> None:
    undocumented = [name for name in sdk.__all__ if name != "Event" and not inspect.getdoc(getattr(sdk, name))]
    assert undocumented == []


@pytest.mark.parametrize("module", ["halfmoon.client", "halfmoon.Client"])
def test_importing_the_sdk_brings_neither_torch_nor_ray_nor_pydantic_nor_prometheus(module: str) -> None:
    statement = "from halfmoon import Client" if module == "halfmoon.Client" else f"import {module}"
    heavy = "{'torch', 'ray', 'pydantic', 'prometheus_client', 'numpy', 'fastapi', 'tokenizers', 'rich', 'typer', 'yaml'}"
    code = f"{statement}; import sys; found = {heavy} & set(sys.modules); sys.exit(', '.join(found) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_package_offers_the_clients_on_first_use() -> None:
    assert halfmoon.Client is sdk.Client and halfmoon.AsyncClient is sdk.AsyncClient
    with pytest.raises(AttributeError, match="Clint"):
        _ = halfmoon.Clint  # type: ignore[attr-defined]

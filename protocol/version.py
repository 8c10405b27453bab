"""The version of the package that runs."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    try:
        return importlib.metadata.version("halfmoon")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"

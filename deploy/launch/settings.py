"""A configuration as the file that says it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...protocol.config import ClusterConfig


def changed_settings(config: ClusterConfig) -> dict[str, dict[str, Any]]:
    """Every setting that is not its default, by section."""
    found: dict[str, dict[str, Any]] = {}
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        default = type(values)()
        kept = {key.name: value for key in dataclasses.fields(values) if (value := getattr(values, key.name)) != getattr(default, key.name)}
        if kept:
            found[section.name] = kept
    return found

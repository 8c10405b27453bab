"""The file of what tenants have used, JSON, written by the proxy alone. It holds counts and no key.

{"acme": {"day": ["2026-11-28", 120344], "month": ["2026-11", 981223]}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError
from .usage import Usage
from .whole_file import write_whole


def load_usage(path: Path, clock: Callable[[], float]) -> dict[str, Usage]:
    """By tenant; none where there is no file yet. Raises ConfigError: nobody's quota begins anew by an accident."""
    try:
        tree = json.loads(path.read_text())
        return {str(name): _restored(values, clock) for name, values in tree.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read what tenants have used in {path}: {error.strerror}", key="proxy.usage_file") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold what tenants have used ({type(error).__name__}); put a copy in its place, or remove it, and all quotas "
            "begin anew",
            key="proxy.usage_file",
        ) from error


def frozen(used: Mapping[str, Usage]) -> dict[str, Any]:
    """For save_usage, of one moment."""
    counts = {name: {"day": usage.day, "month": usage.month} for name, usage in used.items()}
    return {name: {what: [count.period.name, count.num_tokens] for what, count in found.items()} for name, found in counts.items()}


def save_usage(path: Path, tree: Mapping[str, Any]) -> None:
    """At once and whole. Blocks until it is on the disk. Raises OSError."""
    write_whole(path, json.dumps(tree))


def _restored(values: Mapping[str, Any], clock: Callable[[], float]) -> Usage:
    usage = Usage(clock)
    for what, count in (("day", usage.day), ("month", usage.month)):
        name, num_tokens = values[what]
        count.restore(name, int(num_tokens))
    return usage

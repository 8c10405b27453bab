"""A deployment's folder: what `halfmoon deploy init` writes and the other commands read. Its files may be edited; each use checks them.

ray.yaml        for `ray up`                halfmoon.yaml   for `halfmoon serve`
secret/         the token of this cluster's Ray; keep it to yourself
wheel/          of Halfmoon, where hosts are to install it
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...protocol.config import ClusterConfig
from ...protocol.errors import ConfigError
from .description import Description
from .ray_yaml import SECRET, TOKEN, WHEEL, ray_yaml
from .settings import changed_settings

INSECURE = """# security.insecure: clients reach the head without an API key and without TLS, and members talk without TLS, until
# proxy.keys_file, proxy.tls_certificate, proxy.tls_key and security.certs name files on the head. `halfmoon keys` and `halfmoon certs`
# make them. Keep the hosts in a private network until then.
"""
RAY_YAML, HALFMOON_YAML = "ray.yaml", "halfmoon.yaml"


@dataclass(frozen=True, slots=True)
class Deployment:
    folder: Path
    ray: dict[str, Any]  # ray.yaml, checked

    @property
    def ray_path(self) -> Path:
        return self.folder / RAY_YAML

    @property
    def num_hosts(self) -> int:
        """That Ray has once everything is up, with the head."""
        types = self.ray.get("available_node_types")
        if types is None:
            return 1 + len(self.ray["provider"]["worker_ips"])
        return 1 + sum(node.get("min_workers", 0) for name, node in types.items() if name != self.ray["head_node_type"])


def write(description: Description, folder: Path, overwrite: bool = False) -> Deployment:
    """The token of a folder that is overwritten stays. Raises ConfigError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not overwrite and any((folder / name).exists() for name in (RAY_YAML, HALFMOON_YAML)):
        raise ConfigError(f"{folder} holds a deployment; --overwrite writes its files anew and keeps its token")
    (folder / SECRET).mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        with os.fdopen(os.open(folder / SECRET / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    if description.wheel:
        _copy_wheel(Path(description.wheel), folder / WHEEL)
    config = ray_yaml(description, folder)
    check_ray(config)
    (folder / RAY_YAML).write_text(yaml.safe_dump(config, sort_keys=False, width=1000))
    settings = yaml.safe_dump(changed_settings(description.config), sort_keys=False)
    (folder / HALFMOON_YAML).write_text((INSECURE if description.config.security.insecure else "") + settings)
    return Deployment(folder, config)


def _copy_wheel(wheel: Path, to: Path) -> None:
    if wheel.suffix != ".whl" or not wheel.is_file():
        raise ConfigError(f"{wheel} is no wheel; `pip wheel --no-deps .` in a checkout makes one")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    shutil.copy(wheel, to)


def read(folder: Path) -> Deployment:
    """Raises ConfigError for files that are missing, or that Ray or Halfmoon would refuse."""
    try:
        config = yaml.safe_load((folder / RAY_YAML).read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"no {RAY_YAML} in {folder}; `halfmoon deploy init` writes it") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder / RAY_YAML} is not YAML: {error}") from error
    check_ray(config)
    ClusterConfig.load(folder / HALFMOON_YAML)
    return Deployment(folder, config)


def check_ray(config: Any) -> None:
    """As `ray up` will: its defaults filled in, then its own schema. Raises ConfigError."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        raise ConfigError(f"Ray refuses {RAY_YAML} at {'.'.join(map(str, error.absolute_path)) or 'its top'}: {error.message}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"Ray refuses {RAY_YAML}: {error}") from error

"""What a cluster is to be, before it is written in the words of its target."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass

from ...protocol.config import ClusterConfig
from ...protocol.errors import ConfigError

NAME = re.compile(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?")  # what every cloud and Kubernetes accept


class Target(enum.StrEnum):
    LOCAL = "local"
    AWS = "aws"
    GCP = "gcp"
    KUBERAY = "kuberay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """num_gpus: of each host that has workers; 0: they compute on CPU."""

    name: str
    target: Target
    config: ClusterConfig
    num_gpus: int = 0
    num_hosts: int = 0  # beside the head; 0: as many as the workers need. Cloud targets
    head: str = ""  # address, local
    workers: tuple[str, ...] = ()  # addresses, local
    ssh_user: str = ""
    ssh_key: str = ""  # empty: on clouds one that Ray makes
    wheel: str = ""  # of Halfmoon, to install on each host; empty: it is there
    region: str = ""
    zone: str = ""
    project: str = ""  # gcp
    head_type: str = ""  # machine types and image of a cloud
    worker_type: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} cannot name a cluster; use small letters, digits and hyphens, at most 42, a letter first")
        required = {Target.LOCAL: ("head", "ssh_user"), Target.AWS: ("region",), Target.GCP: ("region", "zone", "project")}
        required[Target.KUBERAY] = ("image",)
        for field in required.get(self.target, ()):
            if not getattr(self, field):
                raise ConfigError(f"the target {self.target} needs --{field.replace('_', '-')}")
        if self.target is Target.LOCAL and len({self.head, *self.workers}) != 1 + len(self.workers):
            raise ConfigError("a host is named twice among --head and --workers; each is one host of Ray")
        have = self.num_gpus * (len(self.workers) + 1 if self.target is Target.LOCAL else self.num_worker_hosts)
        if self.num_gpus and have < self.config.num_ranks:
            each = "a GPU each" if self.config.num_ranks == self.config.num_workers else f"{self.config.num_ranks} GPUs"
            raise ConfigError(
                f"{self.config.num_workers} workers need {each} and the hosts have {have}; add hosts or ask for fewer workers"
            )

    @property
    def num_worker_hosts(self) -> int:
        """Hosts beside the head. On CPU one for each worker, if not said."""
        if self.target is Target.LOCAL:
            return len(self.workers)
        return self.num_hosts or math.ceil((self.config.num_ranks if self.num_gpus else self.config.num_workers) / max(self.num_gpus, 1))

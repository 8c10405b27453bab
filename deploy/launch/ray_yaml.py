"""The configuration of `ray up`, as plain data: on hosts that are there, on AWS, on Google Cloud."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError
from ..ray_session import ENVIRONMENT, OBJECT_STORE_BYTES, OWN_ENVIRONMENT
from .description import Description, Target

REMOTE = "~/halfmoon"  # Halfmoon's folder on each host
WHEEL = "wheel"  # likewise: a folder with the one file
RAY_PORT = 6379
SECRET, TOKEN = "secret", "auth_token"  # folder and file, here and there
# the processes of Ray inherit these, and so do the cluster's members
HOST_ENVIRONMENT = {**ENVIRONMENT, **OWN_ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": f"$HOME/halfmoon/{SECRET}/{TOKEN}"}
CHECK = "halfmoon --help > /dev/null || { echo 'halfmoon is not installed here: install it, or give deploy init --wheel'; exit 1; }"
DISK_GB = 200


def ray_yaml(description: Description, folder: Path) -> dict[str, Any]:
    """folder: of the deployment, on this machine."""
    mounts = {f"{REMOTE}/{SECRET}": str(folder.absolute() / SECRET)}
    setup = [CHECK]
    if description.wheel:
        mounts[f"{REMOTE}/{WHEEL}"] = str(folder.absolute() / WHEEL)
        wheel = f"$HOME/halfmoon/{WHEEL}/{Path(description.wheel).name}"
        # one version of Ray everywhere, or its processes do not understand each other
        setup.insert(0, f'python3 -m pip install -q "{wheel}[server]" "ray[default]=={version("ray")}"')
    return {
        "cluster_name": description.name,
        "idle_timeout_minutes": 525600,  # no host is idle: its workers are actors that Ray counts no CPU for
        "file_mounts": mounts,
        "setup_commands": setup,
        "head_start_ray_commands": _start(description, head=True),
        "worker_start_ray_commands": _start(description, head=False),
        **HOSTS[description.target](description),
    }


def _start(description: Description, head: bool) -> list[str]:
    exports = "export " + " ".join(f"{name}={value}" for name, value in HOST_ENVIRONMENT.items())
    # Halfmoon's actors take no CPU of Ray's, and nothing goes through its object store. Without CPUs Ray starts no idle processes.
    flags = f"--num-cpus=0 --object-store-memory={OBJECT_STORE_BYTES} --disable-usage-stats"
    if description.num_gpus and (description.target is Target.LOCAL or not head):
        flags += f" --num-gpus={description.num_gpus}"
    if head:
        own = f"--node-ip-address={description.head} " if description.target is Target.LOCAL else ""
        flags = f"--head {own}--port={RAY_PORT} --autoscaling-config=~/ray_bootstrap_config.yaml --include-dashboard=false {flags}"
    else:
        flags = f"--address=$RAY_HEAD_IP:{RAY_PORT} {flags}"
    # memory that GPUs copy from is locked; where a limit cannot be raised, it stays
    return [f"{exports}; ray stop", f"{exports}; ulimit -n 65536; ulimit -l unlimited; ray start {flags}"]


def _local(description: Description) -> dict[str, Any]:
    return {
        "provider": {"type": "local", "head_ip": description.head, "worker_ips": list(description.workers)},
        "auth": _auth(description),
        "min_workers": len(description.workers),
        "max_workers": len(description.workers),
    }


def _auth(description: Description, user: str = "") -> dict[str, str]:
    key = {"ssh_private_key": description.ssh_key} if description.ssh_key else {}
    return {"ssh_user": description.ssh_user or user, **key}


def _cloud(description: Description, head: dict[str, Any], worker: dict[str, Any]) -> dict[str, Any]:
    count = description.num_worker_hosts
    return {
        "max_workers": count,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {}, "min_workers": 0, "max_workers": 0, "node_config": head},
            "worker": {"resources": {}, "min_workers": count, "max_workers": count, "node_config": worker},
        },
    }


def _of_gpus(count: int, none: str, one: str, four: str) -> str:
    """A machine type for a host's GPUs. Raises ConfigError where there is no obvious one."""
    if count not in (0, 1, 4):
        raise ConfigError(f"no machine type is known for {count} GPUs a host; name one with --worker-type")
    return {0: none, 1: one, 4: four}[count]


def _aws(description: Description) -> dict[str, Any]:
    def node(instance_type: str) -> dict[str, Any]:
        image = {"ImageId": description.image} if description.image else {}  # else Ray's: the region's Deep Learning AMI
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": DISK_GB, "VolumeType": "gp3"}}
        return {"InstanceType": instance_type, **image, "BlockDeviceMappings": [disk]}

    zone = {"availability_zone": description.zone} if description.zone else {}
    worker_type = description.worker_type or _of_gpus(description.num_gpus, "m7i.2xlarge", "g6.xlarge", "g6.12xlarge")
    return {
        "provider": {"type": "aws", "region": description.region, **zone, "cache_stopped_nodes": False},
        "auth": _auth(description, "ubuntu"),
        **_cloud(description, node(description.head_type or "m7i.2xlarge"), node(worker_type)),
        "head_setup_commands": ["python3 -m pip install -q boto3"],
    }


def _gcp(description: Description) -> dict[str, Any]:
    image = description.image or "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570"

    def node(machine_type: str, num_gpus: int) -> dict[str, Any]:
        disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": {"diskSizeGb": DISK_GB, "sourceImage": image}}
        config: dict[str, Any] = {"machineType": machine_type, "disks": [disk]}
        if num_gpus:  # machines with GPUs cannot be moved while they run
            config["scheduling"] = [{"onHostMaintenance": "TERMINATE"}]
            config["metadata"] = {"items": [{"key": "install-nvidia-driver", "value": "True"}]}
        return config

    worker_type = description.worker_type or _of_gpus(description.num_gpus, "n2-standard-8", "g2-standard-12", "g2-standard-48")
    return {
        "provider": {
            "type": "gcp",
            "region": description.region,
            "availability_zone": description.zone,
            "project_id": description.project,
            "cache_stopped_nodes": False,
        },
        "auth": _auth(description, "ubuntu"),
        **_cloud(description, node(description.head_type or "n2-standard-8", 0), node(worker_type, description.num_gpus)),
        "head_setup_commands": ["python3 -m pip install -q google-api-python-client google-auth cryptography"],
    }


HOSTS = {Target.LOCAL: _local, Target.AWS: _aws, Target.GCP: _gcp}

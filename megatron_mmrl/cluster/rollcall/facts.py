"""What one rank knows of itself and its machine. Nothing here talks to other ranks."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

import megatron_mmrl
from megatron_mmrl.checkpoint.output_dir import settings_of
from megatron_mmrl.config import Config
from megatron_mmrl.doctor.versions import installed_versions
from megatron_mmrl.parallel.device import device

_SHM = "/dev/shm"
_NETWORK = ("NCCL_", "GLOO_", "UCX_")  # environment variables that all ranks of a network must agree on
_OF_A_NODE = ("_IFNAME", "_HCA")  # but for those that name a machine's own hardware
_OWN_KEYS = ("cluster.network_interface",)  # of the configuration: may differ from node to node


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Bytes of a file system or a memory."""

    total: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of one rank."""

    rank: int
    host: str
    node: int  # torchrun's GROUP_RANK
    local_rank: int
    local_world_size: int
    versions: Mapping[str, str]
    config_hash: str
    model: str  # hash of config.json under model.path, or why it cannot be read
    model_is_read: bool
    device: str  # its name
    device_id: str  # unique in the world; empty for a CPU
    device_memory: Place | None  # None for a CPU
    memory: Place  # of the machine
    shm: Place
    disk: Place | None  # at run.output_dir
    shared: str  # what is wrong with run.output_dir as this rank sees it; empty: nothing
    port: str  # why no port can be opened on loopback; empty: one can
    clock_s: float  # since the epoch, at a moment that all ranks share
    environment: Mapping[str, str]


def own_facts(config: Config, *, rank: int, shared: str, clock_s: float) -> Facts:
    """This rank's; ``shared`` and ``clock_s`` come from what the ranks did together."""
    model, is_read = _model(Path(config.model.path))
    at = device()
    properties = torch.cuda.get_device_properties(at) if at.type == "cuda" else None
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        node=int(os.environ.get("GROUP_RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        versions=_versions(),
        config_hash=config_hash(config),
        model=model,
        model_is_read=is_read,
        device=properties.name if properties else f"CPU {platform.machine()}",
        device_id=str(properties.uuid) if properties else "",
        device_memory=_device_memory(at) if properties else None,
        memory=Place(total=psutil.virtual_memory().total, free=psutil.virtual_memory().available),
        shm=_place(Path(_SHM)) or Place(total=0, free=0),
        disk=_place(Path(config.run.output_dir)),
        shared=shared,
        port=_port_problem(),
        clock_s=clock_s,
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_NETWORK) and not name.endswith(_OF_A_NODE)
        },
    )


def compared_settings(config: Config) -> dict[str, str]:
    """Every key that all ranks must agree on, with its value as text."""
    return {key: repr(value) for key, value in settings_of(config) if key not in _OWN_KEYS}


def config_hash(config: Config) -> str:
    """sha256 over ``compared_settings``."""
    return hashlib.sha256(repr(compared_settings(config)).encode()).hexdigest()


@cache
def source_hash() -> str:
    """Of this package's files: what a version number does not tell."""
    root = Path(megatron_mmrl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    versions = installed_versions() | {"CUDA of torch": torch.version.cuda or "none"}
    versions["megatron_mmrl"] += f", source {source_hash()}"
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _model(path: Path) -> tuple[str, bool]:
    try:
        return hashlib.sha256((path / "config.json").read_bytes()).hexdigest()[:12], True
    except OSError as error:
        return f"{error.strerror}: {path / 'config.json'}", False


def _device_memory(at: torch.device) -> Place:
    free, total = torch.cuda.mem_get_info(at)
    return Place(total=total, free=free)


def _place(path: Path) -> Place | None:
    """Of the file system that holds ``path``, or will."""
    for place in (path.absolute(), *path.absolute().parents):
        if place.exists():
            usage = shutil.disk_usage(place)
            return Place(total=usage.total, free=usage.free)
    return None


def _port_problem() -> str:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return ""
    except OSError as error:
        return str(error)

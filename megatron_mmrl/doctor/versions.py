"""Versions of everything that has to go together on this machine; without importing what may be broken."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

import megatron_mmrl

PACKAGES = (
    "torch",
    "sglang",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "transformers",
    "tokenizers",
    "numpy",
    "ray",
    "math-verify",
)
ABSENT = "not installed"


def installed_versions() -> dict[str, str]:
    """Name -> version, in the order in which they are shown."""
    versions = {"megatron_mmrl": megatron_mmrl.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ABSENT
    return versions


def device_versions() -> dict[str, str]:
    """What torch was built for, and the devices that it finds."""
    import torch

    versions = {"CUDA of torch": torch.version.cuda or "none"}
    if torch.version.cuda:
        versions["compiled for"] = " ".join(torch.cuda.get_arch_list()) or "unknown: no device here"
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions["devices"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "CPU only"
    return versions


def as_text(versions: Mapping[str, str]) -> str:
    """One aligned line each."""
    width = max(map(len, versions))
    return "".join(f"{name:<{width}}  {version}\n" for name, version in versions.items())

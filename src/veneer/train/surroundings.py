"""What a run ran on, for its log: versions, the machine, and the process."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("veneer", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "bitsandbytes")


def surroundings() -> dict[str, Any]:
    """Versions by package (those that are installed), the host and its cores, the device, and this process's id."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "host": platform.node(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "process": os.getpid(),
    }

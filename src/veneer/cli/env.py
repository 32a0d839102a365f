"""``veneer env``: what a bug report needs to know about the machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "veneer",
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "huggingface-hub",
    "peft",
    "gguf",
    "pyarrow",
)
"""Packages whose versions are told: those veneer needs and those it works with."""


def env() -> dict[str, Any]:
    """Show versions, devices, threads, memory and caches.

    Example: veneer env
    """
    from veneer.cli.output import console
    from veneer.report.tables import megabytes, sections

    facts = environment()
    versions = {name: value or "not installed" for name, value in facts["versions"].items()}
    memory = {name: "unknown" if size is None else megabytes(size) for name, size in facts["memory"].items()}
    console().print(sections({**facts, "versions": versions, "memory": memory}))
    return facts


def environment() -> dict[str, Any]:
    """The facts, in sections: from section to a mapping of name to value. Memory is in bytes."""
    return {
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
        },
        "device": _devices(),
        "memory": memory(),
        "caches": _caches(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    from veneer.engine import matmul, precision
    from veneer.engine.allocator import allocator

    cuda = torch.cuda.is_available()
    used = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    return {
        "used": used,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "allocator": allocator(),
        "matmul_auto": str(matmul.measure(512) or "torch") if used == "cpu" else None,
        "precision_auto": str(precision.measure(512, torch.device(used))),
    }


def memory() -> dict[str, int | None]:
    """Total and available bytes where the system tells (Linux); otherwise None."""
    found: dict[str, int | None] = {"total": None, "available": None}
    meminfo = Path("/proc/meminfo")
    if sys.platform == "linux" and meminfo.is_file():
        kilobytes = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        found["total"] = int(kilobytes["MemTotal"].split()[0]) * 1024
        found["available"] = int(kilobytes["MemAvailable"].split()[0]) * 1024
    return found


def _caches() -> dict[str, Any]:
    from huggingface_hub import constants

    from veneer.core.cache import cache_folder

    return {
        "hub": str(constants.HF_HUB_CACHE),
        "veneer": str(cache_folder()),
        "hub_offline": bool(constants.HF_HUB_OFFLINE),
    }

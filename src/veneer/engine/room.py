"""How much memory a device has left for this process, and how much the process holds."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")


def held(device: torch.device) -> int:
    """Bytes that this process holds: tensors on a GPU, else resident memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not _STATM.is_file():
        return 0
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free(device: torch.device) -> int | None:
    """Bytes that this process can still take: of the GPU; else of main memory, or of its control group if that is less.

    None where the system does not tell.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if not _MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limited = _in_group()
    return available if limited is None else min(available, limited)


@contextlib.contextmanager
def highest(device: torch.device, every: float = 0.002) -> Iterator[list[int]]:
    """The most bytes ``held`` inside, in a list that has its one number at the end.

    >>> with highest(device) as most:
    ...     loss.backward()
    >>> most[0]

    Args:
        device: whose memory.
        every: seconds between two looks at main memory; a GPU keeps count by itself.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    seen, done = [held(device)], threading.Event()

    def look() -> None:
        while not done.wait(every):
            seen.append(held(device))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield found
    finally:
        seen.append(held(device))
        done.set()
        looking.join()
    found.append(max(seen))


def _in_group() -> int | None:
    """What the control group (version 2, then 1) leaves; file pages that can be dropped count as free."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        most = _CGROUP / limit
        if not most.is_file():
            continue
        text = most.read_text(encoding="ascii").strip()
        if not text.isdigit():
            return None
        stat = dict(line.split() for line in (most.parent / "memory.stat").read_text(encoding="ascii").splitlines())
        taken = int((_CGROUP / used).read_text(encoding="ascii")) - int(stat.get(cache, 0))
        return max(0, int(text) - taken)
    return None

"""glibc's allocator, told to keep what a training step frees, since the next step asks for it again.

By default glibc maps every buffer above 32 MiB anew, smaller ones too until it has adapted, and gives memory at its
heap's end back: each step's activations are then pages that the kernel must find and clear again. In a loop that only
fills and frees activation-sized buffers that was two thirds of the time, and half of a real step's page faults. The
peak of a training run was 3 % higher when memory is kept (a bare loop of few, large buffers can be unluckier: small
objects that stay split their places), and what a run has freed stays with the process until it ends. See mallopt(3).
"""

from __future__ import annotations

import ctypes
import functools
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@functools.cache
def keep_freed_memory() -> bool:
    """From here on, memory that is freed stays with the process; a second call changes nothing.

    >>> keep_freed_memory()
    True

    Returns:
        Whether glibc was told so. False where ``allocator()`` says why not.
    """
    if _reason():
        return False
    library = ctypes.CDLL(None)
    return library.mallopt(_MMAP_MAX, 0) == 1 and library.mallopt(_TRIM_THRESHOLD, -1) == 1


def allocator() -> str:
    """In words: what training does about the allocator of this process, or why it does nothing."""
    return _reason() or "glibc's, told to keep freed memory while training"


def _reason() -> str:
    """Why the allocator is left alone; empty if it is not."""
    try:
        known = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError):
        known = None
    if not known:
        return "the system's, as it is: only glibc can be told to keep freed memory"
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return f"left alone: another one is loaded by LD_PRELOAD={os.environ['LD_PRELOAD']}"
    own = [name for name in _OWN_SETTINGS if name in os.environ]
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    return f"glibc's, left as {', '.join(own)} set it" if own else ""

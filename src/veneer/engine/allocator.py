"""glibc's allocator, told to keep what a training step frees, since the next step asks for it again.

By default glibc gives memory at its heap's end back, and maps every buffer anew that is above a threshold, which
follows the buffers that were freed up to 32 MiB: some steps' activations are then pages that the kernel must find and
clear again. Here the threshold is 32 MiB from the start, the most that glibc takes, and the heap's end stays. Larger
buffers still come and go; they are the logits of many tokens. Kept in the heap too (``M_MMAP_MAX=0``) they split each
other's places: that saved nothing measurable where logits are computed in chunks, and a trainer that computes all
logits of a batch held twice the memory. See mallopt(3).
"""

from __future__ import annotations

import ctypes
import functools
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest that glibc takes.
_LARGEST = 32 * 2**20
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@functools.cache
def keep_freed_memory() -> bool:
    """From here on, freed memory stays with the process but for buffers above 32 MiB; a second call changes nothing.

    >>> keep_freed_memory()
    True

    Returns:
        Whether glibc was told so. False where ``allocator()`` says why not.
    """
    if _reason():
        return False
    library = ctypes.CDLL(None)
    return library.mallopt(_MMAP_THRESHOLD, _LARGEST) == 1 and library.mallopt(_TRIM_THRESHOLD, -1) == 1


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

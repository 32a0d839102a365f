"""Freed memory that is kept: fewer page faults for the same work, and nobody's own settings overruled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from veneer.engine import allocator

glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="needs glibc")

STEPS = """
import json, resource, sys
from veneer.engine.allocator import keep_freed_memory
import torch
kept = [keep_freed_memory(), keep_freed_memory()] if sys.argv[1] == "keep" else []
def step(tokens):
    alive = [torch.ones(tokens, width) for width in (576, 1536, 1536, 576) for _ in range(3)]
    alive.append(torch.ones(24 << 18))
    while alive:
        alive.pop()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
for tokens in 12 * (900, 300, 1100):
    step(tokens)
before = resource.getrusage(resource.RUSAGE_SELF)
for tokens in (900, 300, 1100):
    step(tokens)
after = resource.getrusage(resource.RUSAGE_SELF)
quiet = resident()
logits = torch.ones(256 << 18)
full = resident()
del logits
print(json.dumps({"kept": kept, "faults": after.ru_minflt - before.ru_minflt, "peak": after.ru_maxrss,
                  "megabytes": [quiet, full, resident()]}))
"""


def steps(mode: str, **environment: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, mode], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@glibc
def test_a_step_finds_the_pages_of_the_step_before_and_no_larger_buffer_stays() -> None:
    kept, plain = steps("keep"), steps("plain")
    assert kept["kept"] == [True, True]
    # A step fills 10,000 to 20,000 pages, of which some small ones may be new.
    assert kept["faults"] < 1_000
    assert kept["peak"] < 1.2 * plain["peak"]
    quiet, full, left = kept["megabytes"]
    assert full > quiet + 250
    assert left < quiet + 10


@glibc
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, "MALLOC_MMAP_THRESHOLD_"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=100"}, "GLIBC_TUNABLES"),
        ({"LD_PRELOAD": "libjemalloc.so"}, "LD_PRELOAD=libjemalloc.so"),
    ],
)
def test_settings_of_the_users_own_stay(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in allocator.allocator()
    assert allocator.keep_freed_memory.__wrapped__() is False


@pytest.mark.parametrize("error", [AttributeError, ValueError])
def test_another_system_is_left_alone(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise error(name)

    monkeypatch.setattr(os, "confstr", absent)
    assert "only glibc" in allocator.allocator()
    assert allocator.keep_freed_memory.__wrapped__() is False

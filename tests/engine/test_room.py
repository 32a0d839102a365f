"""What is free, from files of a system that is made here."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
import torch

from veneer.engine import room

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   8000 kB\n")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    return tmp_path


def version_2(system: Path, most: str) -> None:
    for name, text in {"max": most, "current": "3000000", "stat": "anon 5\ninactive_file 1000000\n"}.items():
        (system / f"memory.{name}").write_text(text)


def test_what_the_machine_has(system: Path) -> None:
    assert room.free(CPU) == 8000 * 1024


@pytest.mark.parametrize(
    ("most", "free"), [("max\n", 8000 * 1024), ("5000000\n", 3_000_000), ("1000000", 0), ("99000000000", 8000 * 1024)]
)
def test_what_a_control_group_leaves(system: Path, most: str, free: int) -> None:
    version_2(system, most)
    assert room.free(CPU) == free


def test_a_control_group_of_version_1(system: Path) -> None:
    (system / "memory").mkdir()
    for name, text in {
        "limit_in_bytes": "5000000",
        "usage_in_bytes": "4000000",
        "stat": "total_inactive_file 0\n",
    }.items():
        (system / "memory" / f"memory.{name}").write_text(text)
    assert room.free(CPU) == 1_000_000


def test_another_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(room, "_STATM", tmp_path / "none")
    assert room.free(CPU) is None
    assert room.held(CPU) == 0


def test_the_highest_of_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([5, 9, 30])
    looked = threading.Event()

    def held(device: torch.device) -> int:
        found = next(moments, 7)
        if found == 30:
            looked.set()
        return found

    monkeypatch.setattr(room, "held", held)
    with room.highest(CPU, every=0.0) as most:
        assert looked.wait(60)
    assert most == [30]


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
def test_what_a_process_holds_grows_with_it() -> None:
    # Mapped for this test alone: what the allocator hands out may be pages that the process holds already.
    size = 160_000_000
    before = room.held(CPU)
    with mmap.mmap(-1, size) as more:
        more.write(b"1" * size)
        grown = room.held(CPU) - before
    assert grown > 0.9 * size

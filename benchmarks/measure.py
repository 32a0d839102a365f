"""How every benchmark measures: peers in processes of their own, in turn, on one machine, in one run.

Absolute times belong to a machine and an hour; only ratios taken side by side are compared.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

RESULTS = Path(__file__).with_name("results.csv")
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
"""The shape of SmolLM2-135M, as fields of a LlamaConfig."""

_QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Row:
    """One line of results.csv."""

    date: str
    benchmark: str
    case: str
    metric: str
    veneer: str
    peer: str
    ratio: str
    unit: str
    machine: str
    versions: str
    note: str


class Worker:
    """A subprocess that runs a benchmark script as one peer and answers each line sent to it with one of JSON."""

    def __init__(self, script: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_QUIET,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            RuntimeError: the worker ended instead of answering; its own message is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self._process.wait()} at {command!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def in_turn(workers: Mapping[str, Worker], command: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Ask every worker the same, one after the other, ``repeats`` times; who goes first changes each time."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(repeats):
        for name in list(workers) if number % 2 == 0 else list(reversed(workers)):
            answers[name].append(workers[name].ask(command))
    return answers


def fresh(code: str, names: Sequence[str], repeats: int, *, warm: bool = True) -> dict[str, list[float]]:
    """The seconds that ``code`` prints in fresh interpreters, in turn for each name put in for ``NAME``.

    With ``warm``, one round before the first is thrown away: it fills the file cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1 if warm else 0, repeats):
        for name in names if number % 2 else reversed(names):
            out = subprocess.run(
                [sys.executable, "-c", code.replace("NAME", name)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=_QUIET,
            ).stdout
            if number >= 0:
                seconds[name].append(float(out.split()[-1]))
    return seconds


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The ratio of the two medians, of measurements that were taken in turn."""
    return statistics.median(ours) / statistics.median(theirs)


def reset_peak_memory() -> None:
    """Let ``peak_memory`` count from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """The most resident memory that this process has had, in MB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024 / 1e6


def gemm_limits(seconds: float = 2.0) -> dict[str, float]:
    """The most GFLOP/s that a matrix product reaches here on torch's threads: in fp32 by either library, and in bf16.

    "fp32" is the faster of "fp32 torch" and "fp32 onednn"; without "bf16" that is too slow here to be of use.
    """
    import torch

    from veneer.engine import precision
    from veneer.engine.matmul import multiplying

    found = {"fp32 torch": gemm_limit(seconds)}
    with multiplying("onednn"):
        found["fp32 onednn"] = gemm_limit(seconds)
    found = {"fp32": max(found.values()), **found}
    if precision.measure(1024, torch.device("cpu")).chosen == "bf16":
        found["bf16"] = gemm_limit(seconds, torch.bfloat16)
    return found


def gemm_limit(seconds: float = 2.0, dtype: Any = None) -> float:
    """The most GFLOP/s that a matrix product reaches here on torch's threads, in float32 or another dtype."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size).to(dtype or torch.float32) for _ in range(2))
    out = torch.empty(size, size, dtype=a.dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def machine() -> str:
    """The processor and the number of cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found.group(1).strip() if found else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def load_note() -> str:
    """Empty on a quiet machine; otherwise what to keep in mind about the numbers."""
    before = _ticks()
    time.sleep(1)
    idle, total = (now - then for now, then in zip(_ticks(), before, strict=True))
    busy = 1 - idle / max(total, 1)
    return f"preliminary: other work took {busy:.0%} of the processor before the start" if busy > 0.1 else ""


def _ticks() -> tuple[int, int]:
    """(idle, all) processor ticks since the machine started (Linux)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


class Results:
    """Prints every measured number and appends it to a CSV file."""

    def __init__(self, benchmark: str, path: Path | None) -> None:
        self.benchmark = benchmark
        self.path = path
        self.note = load_note()
        self.rows: list[Row] = []
        print(f"{benchmark} on {machine()}{f' ({self.note})' if self.note else ''}")

    def add(self, case: str, metric: str, ours: float, theirs: float | None, ratio: float | None, unit: str) -> None:
        """Print and keep one number of ours, beside the peer's where there is one."""
        row = Row(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            benchmark=self.benchmark,
            case=case,
            metric=metric,
            veneer=f"{ours:.4g}",
            peer="" if theirs is None else f"{theirs:.4g}",
            ratio="" if ratio is None else f"{ratio:.3f}",
            unit=unit,
            machine=machine(),
            versions=" ".join(f"{name} {version(name)}" for name in ("veneer", "torch", "transformers", "peft")),
            note=self.note,
        )
        self.rows.append(row)
        beside = "" if theirs is None else f"   peer {row.peer:>8} {unit}   ratio {row.ratio}"
        print(f"  {case:<62} {metric:<14} {row.veneer:>8} {unit}{beside}", flush=True)

    def save(self) -> None:
        """Append what was added to the file, if there is one."""
        if self.path is None:
            return
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow([f.name for f in fields(Row)])
            writer.writerows(astuple(row) for row in self.rows)
        print(f"  appended {len(self.rows)} rows to {self.path}")

"""The benchmark scripts run, on a shape too small to say anything about speed."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COLUMNS = ["date", "benchmark", "case", "metric", "veneer", "peer", "ratio", "unit", "machine", "versions", "note"]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True, timeout=300
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def test_step_measures_both_peers(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    done = run("bench_step.py", "--tiny", "--case", "q,v", "--repeats", "1", "--length", "8", "--results", str(results))
    assert done.returncode == 0, done.stderr
    found = {row["metric"]: row for row in rows(results)}
    assert set(found) == {"step time", "peak memory", "of GEMM limit", "GEMM limit"}
    assert float(found["step time"]["ratio"]) > 0
    assert float(found["peak memory"]["veneer"]) > 0


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "vera", "lorafa"])
def test_variants_measures_both_peers_beside_lora(variant: str, tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    given = ("--tiny", "--variant", variant, "--repeats", "1", "--length", "8", "--results", str(results))
    done = run("bench_variants.py", *given)
    assert done.returncode == 0, done.stderr
    found = [(row["case"].rpartition("beside ")[2], row["metric"]) for row in rows(results)]
    others = [f"peft {variant}"] + ([] if variant == "lora" else ["veneer lora"])
    assert found == [(other, metric) for other in others for metric in ("step time", "peak memory")]


def test_inject_measures_both_peers_and_appends(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    results.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    done = run("bench_inject.py", "--tiny", "--repeats", "1", "--results", str(results))
    assert done.returncode == 0, done.stderr
    assert [row["metric"] for row in rows(results)] == ["get_peft_model"] + ["import"] * 4


def test_qlora_measures_all_peers_and_merges(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    results, picture = tmp_path / "results.csv", tmp_path / "curves.png"
    sizes = ("--tiny", "--steps", "2", "--every", "1", "--length", "8", "--batch", "2", "--held-out", "1")
    done = run("bench_qlora.py", *sizes, "--results", str(results), "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    found = rows(results)
    assert [row["metric"] for row in found] == [
        *["held-out loss"] * 3,
        "weights",
        *["step time", "peak memory"] * 2,
        *["held-out loss", "logits moved"] * 3,
    ]
    moved = {
        row["case"].split("merged ")[1].split(",")[0]: float(row["ratio"]) for row in found if "merged" in row["case"]
    }
    assert moved["dequantised"] < 0.001 < moved["requantised"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inits_measures_times_and_errors_against_both_peers(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    done = run("bench_inits.py", "--tiny", "--repeats", "1", "--results", str(results))
    assert done.returncode == 0, done.stderr
    found = rows(results)
    assert [row["metric"] for row in found] == ["seconds", "subspace error"] * 4
    assert all(float(row["veneer"]) < 1e-3 for row in found if row["metric"] == "subspace error")


def test_adapters_measures_both_peers(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    sizes = ("--tiny", "--repeats", "1", "--many", "14", "--peft", "12", "--length", "4")
    done = run("bench_adapters.py", *sizes, "--results", str(results))
    assert done.returncode == 0, done.stderr
    assert [row["metric"] for row in rows(results)] == ["load"] * 3 + ["forward"] * 6 + ["set_adapter", "hotswap"]
    assert run("bench_adapters.py", "--many", "3").returncode == 2


@pytest.mark.parametrize(
    "script",
    ["bench_adapters.py", "bench_step.py", "bench_variants.py", "bench_inject.py", "bench_inits.py", "bench_qlora.py"],
)
def test_unknown_options_are_refused(script: str) -> None:
    done = run(script, "--sped")
    assert done.returncode == 2
    assert "--sped" in done.stderr


@pytest.mark.parametrize("case", ["ragged-q,v", "ragged-trainers", "classify"])
def test_train_measures_all_peers_on_the_same_examples(case: str, tmp_path: Path) -> None:
    results, picture = tmp_path / "results.csv", tmp_path / "losses.png"
    given = ("--tiny", "--case", case, "--steps", "1", "--batch", "2", "--plot", str(picture))
    done = run("bench_train.py", *given, "--results", str(results))
    assert done.returncode == 0, done.stderr
    limits = {row["case"].removesuffix(" 2048x2048x2048") for row in rows(results) if row["metric"] == "GEMM limit"}
    assert limits >= {"fp32", "fp32 torch", "fp32 onednn"}
    found = [(row["case"].rpartition("beside ")[2], row["metric"]) for row in rows(results)[len(limits) :]]
    others = ["peft fp32", "full fp32"]
    if case == "ragged-trainers":
        others = ["peft fp32", "peft fp32", "trl fp32", "trl fp32"]
    if case == "ragged-q,v" and "bf16" in limits:
        others += ["peft fp32", "peft bf16"]
    assert found == [(o, metric) for o in others for metric in ("tokens/s", "peak memory", "of GEMM limit")]
    assert picture.read_bytes().startswith(b"\x89PNG")

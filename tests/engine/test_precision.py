"""The choice of arithmetic from times that are given here, and that a real measurement ends."""

from __future__ import annotations

import pytest
import torch

from veneer.engine import precision
from veneer.engine.precision import measure

CPU = torch.device("cpu")


def machine(fp32: float, bf16: float):
    """A machine of so many GFLOP/s, and what it was asked to multiply."""
    asked: list[tuple[str, int]] = []

    def seconds(name: str, size: int) -> float:
        asked.append((name, size))
        return 2 * size**3 / ({"fp32": fp32, "bf16": bf16}[name] * 1e9)

    return seconds, asked


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(100, 0.3, "fp32"), (100, 100, "fp32"), (100, 149, "fp32"), (100, 150, "bf16"), (20_000, 150_000, "bf16")],
)
def test_half_precision_must_be_worth_it(fp32: float, bf16: float, chosen: str) -> None:
    seconds, _ = machine(fp32, bf16)
    found = measure(576, CPU, seconds=seconds)
    assert found.chosen == chosen
    assert found.gflops == pytest.approx({"fp32": fp32, "bf16": bf16})
    assert str(found).startswith(f"{chosen}, by matmuls of {found.size} x {found.size}: fp32 ")


def test_a_slow_arithmetic_is_not_asked_for_large_products() -> None:
    seconds, asked = machine(100, 0.3)
    found = measure(2048, CPU, seconds=seconds)
    assert found.size == max(size for name, size in asked if name == "bf16") <= 128
    spent = sum(precision._REPEATS * seconds(name, size) for name, size in list(asked))
    assert spent < 2 * precision.BUDGET


def test_products_are_as_large_as_the_models() -> None:
    seconds, _ = machine(1e6, 1e6)
    assert measure(576, CPU, seconds=seconds).size == 512
    assert measure(4096, CPU, seconds=seconds).size == 2048
    assert measure(8, CPU, seconds=seconds).size == 64


def test_a_real_measurement() -> None:
    found = measure(64, CPU)
    assert found.size == 64
    assert all(speed > 0 for speed in found.gflops.values())

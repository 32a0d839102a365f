"""Sums of task tensors, against PEFT's own functions."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from veneer.adapters.arithmetic import combiner, dropped, largest

WEIGHTS = ([0.7, 0.5, 1.3], [1.0, -2.0, 0.5], [-1.0, -1.0, -1.0])


def tasks(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(5, 7, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_methods(method: str, density: float, majority: str, weights: list[float]) -> None:
    theirs = {
        "linear": merge_utils.task_arithmetic,
        "magnitude_prune": merge_utils.magnitude_prune,
        "ties": merge_utils.ties,
        "dare_linear": merge_utils.dare_linear,
        "dare_ties": merge_utils.dare_ties,
    }[method]
    more = {} if method == "linear" else {"density": density}
    if method.endswith("ties"):
        more["majority_sign_method"] = majority
    torch.manual_seed(0)
    expected = theirs(tasks(), torch.tensor(weights), **more)
    torch.manual_seed(0)
    found = combiner(method, None if method == "linear" else density, majority)(tasks(), weights)
    torch.testing.assert_close(found, expected)


def test_all_is_kept_at_density_one() -> None:
    tensor = tasks(1)[0]
    assert torch.equal(largest(tensor, 1.0), tensor)
    assert torch.equal(dropped(tensor, 1.0), tensor)


def test_nothing_is_written_to() -> None:
    given = tasks()
    for method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        combiner(method, 0.5, "total")(given, WEIGHTS[0])
    assert all(torch.equal(a, b) for a, b in zip(given, tasks(), strict=True))


def test_dropping_keeps_the_expectation() -> None:
    torch.manual_seed(1)
    mean = torch.stack([dropped(torch.ones(1000), 0.25) for _ in range(40)]).mean()
    # 40,000 draws of 4 with probability 1/4: a standard error of 0.0087.
    assert abs(float(mean) - 1) < 0.035

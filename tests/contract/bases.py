"""One or more tiny modules for every base. A new file in ``bases/`` needs an entry here and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core import registry


@dataclass(frozen=True)
class BaseCase:
    """A module to adapt and inputs for it."""

    module: Callable[[], nn.Module]
    """Makes the module, seeded by the caller."""
    inputs: Callable[[], Tensor]
    """Makes an input: floating-point features, or token ids."""
    dense: Callable[[Tensor], Tensor]
    """The same input as rows that multiply the weight: ids become one-hot rows."""


class _ScaledEmbedding(nn.Embedding):
    """As in Gemma: the looked-up rows are scaled."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def _features() -> Tensor:
    return torch.randn(2, 3, 6)


def _ids() -> Tensor:
    return torch.randint(0, 9, (2, 3))


def _one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids, 9)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(5, 6)
    nn.init.normal_(module.weight)
    return nn.Module.requires_grad_(module, True)


CASES: dict[str, dict[str, BaseCase]] = {
    "linear": {
        "bias": BaseCase(lambda: nn.Linear(6, 5), _features, lambda x: x),
        "no-bias": BaseCase(lambda: nn.Linear(6, 5, bias=False), _features, lambda x: x),
    },
    "conv1d": {"bias": BaseCase(_conv1d, _features, lambda x: x)},
    "embedding": {
        "plain": BaseCase(lambda: nn.Embedding(9, 5), _ids, _one_hot),
        "scaled": BaseCase(lambda: _ScaledEmbedding(9, 5), _ids, lambda x: 3.0 * _one_hot(x)),
    },
}


def cases_of(base: str) -> dict[str, BaseCase]:
    """The modules for one base."""
    if base not in CASES:
        pytest.fail(f"bases/{base}.py is new: give it a module and an input in CASES of {__file__}.")
    return CASES[base]


def all_cases() -> list[tuple[str, str]]:
    """(base, case) for every base of the registry; one without an entry is kept, to fail in its tests."""
    return [(base, case) for base in registry.names("bases") for case in CASES.get(base, {"missing": None})]

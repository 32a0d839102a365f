"""Sums of tensors that belong to several tasks: plain, pruned, and with conflicting signs settled.

Each function takes one tensor a task, all of one shape, and a weight a task. Definitions and defaults are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from veneer.adapters.lowrank import check_rank
from veneer.core.errors import UsageError, nearest

MajoritySign = Literal["total", "frequency"]
Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""From the tasks' tensors and weights to one tensor of the same shape."""

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("linear", "cat", "svd", *(f"{name}{end}" for name in _PRUNING for end in ("", "_svd")))
"""The values of ``combination_type``."""


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w * tensor)``: task arithmetic (Ilharco et al., arXiv 2212.04089)."""
    return torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with all but its largest values set to zero; ``int(density * numel)`` of them stay."""
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)


def dropped(tensor: Tensor, density: float) -> Tensor:
    """Each value stays with probability ``density`` and is then divided by it, or becomes zero.

    So the expected value stays (DARE, Yu et al., arXiv 2311.03099). Draws from torch's default generator.
    """
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], majority: MajoritySign) -> Tensor:
    """The mean of the weighted values whose sign is the majority's, place by place (TIES, arXiv 2306.01708).

    The majority is that of the sum of the values ("total") or of their number ("frequency"), weights left aside;
    a tie counts as positive.
    """
    stacked = torch.stack(list(tensors))
    signs = stacked.sign()
    votes = (stacked if majority == "total" else signs).sum(0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    weighted = torch.stack([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)])
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def quantile(values: Tensor, share: float) -> Tensor:
    """As ``torch.quantile``, which takes at most 16 million values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    return torch.lerp(below, ordered[math.ceil(place)], place - math.floor(place))


def _pruned_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], *, prune: Callable[[Tensor, float], Tensor], density: float
) -> Tensor:
    return weighted_sum([prune(tensor, density) for tensor in tensors], weights)


def _pruned_mean(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    prune: Callable[[Tensor, float], Tensor],
    density: float,
    majority: MajoritySign,
) -> Tensor:
    return agreeing_mean([prune(tensor, density) for tensor in tensors], weights, majority)


def combiner(method: str, density: float | None, majority: MajoritySign) -> Combine:
    """The function behind a method: "linear", "ties", "dare_linear", "dare_ties" or "magnitude_prune".

    >>> combiner("linear", None, "total")([torch.ones(2), torch.ones(2)], [1.0, -3.0])
    tensor([-2., -2.])
    """
    if method == "linear":
        return weighted_sum
    assert density is not None
    prune = dropped if method.startswith("dare") else largest
    if method.endswith("ties"):
        return partial(_pruned_mean, prune=prune, density=density, majority=majority)
    return partial(_pruned_sum, prune=prune, density=density)


@dataclass(frozen=True)
class Recipe:
    """A way to combine adapters, checked."""

    kind: str
    rank: int | None
    clamp: float | None
    density: float | None
    majority: MajoritySign

    @property
    def on_factors(self) -> bool:
        """Whether it adds up factors, and not updates."""
        return self.kind != "cat" and not self.kind.endswith("svd")

    @property
    def exact(self) -> bool:
        """Whether one adapter with weight 1 comes out as it went in."""
        return self.kind in ("linear", "cat") or (self.kind == "svd" and self.rank is None and self.clamp is None)

    @property
    def combine(self) -> Combine:
        """The function that combines tensors."""
        method = "linear" if self.kind in ("cat", "svd") else self.kind.removesuffix("_svd")
        return combiner(method, self.density, self.majority)


def recipe_for(
    kind: str,
    rank: int | None,
    clamp: float | None,
    density: float | None,
    majority: MajoritySign,
    count: int,
) -> Recipe:
    """Check what is asked for.

    Args:
        kind: one of ``TYPES``.
        rank: the rank of the new factors, for the types with an SVD.
        clamp: the quantile that their values are clamped at, for the same types.
        density: the share of the values that pruning keeps.
        majority: how ties settles signs.
        count: how many adapters there are.

    Raises:
        UsageError: an unknown type, an option missing, or one that would do nothing.
    """
    if kind not in TYPES:
        raise UsageError(
            f"combination_type is {kind!r}; expected one of {', '.join(TYPES)}.{nearest(str(kind), TYPES)}"
        )
    if rank is not None:
        check_rank(rank)
        if not isinstance(rank, int):
            raise UsageError(f"svd_rank is {rank!r}; expected a whole number.")
    for option, value in (("svd_rank", rank), ("svd_clamp", clamp)):
        if value is not None and not kind.endswith("svd"):
            raise UsageError(f"{option} is given, but {kind!r} makes no SVD; leave it out, or use a type with svd.")
    if clamp is not None and not 0.5 < clamp <= 1:
        # The values of the factors lie around zero, so that a lower quantile would be a negative bound.
        raise UsageError(f"svd_clamp is {clamp!r}; expected a quantile from above 0.5 to 1.")
    prunes = kind.removesuffix("_svd") in _PRUNING
    if prunes and density is None:
        raise UsageError(f"{kind!r} prunes: give density, the share of the values to keep, from above 0 to 1.")
    if not prunes and density is not None:
        raise UsageError(
            f"density is given, but {kind!r} prunes nothing; leave it out, or use one of {', '.join(_PRUNING)}."
        )
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density is {density!r}; expected a share from above 0 to 1.")
    if majority not in ("total", "frequency"):
        raise UsageError(
            f"majority_sign_method is {majority!r}; expected total or frequency."
            f"{nearest(str(majority), ('total', 'frequency'))}"
        )
    if majority != "total" and "ties" not in kind:
        raise UsageError(f"majority_sign_method is given, but {kind!r} settles no signs; leave it out, or use a ties.")
    if "ties" in kind and count == 1:
        raise UsageError(f"{kind!r} settles conflicts of signs between adapters, and there is only one adapter.")
    return Recipe(kind, rank, clamp, density, majority)

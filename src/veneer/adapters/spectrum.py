"""What an update is made of: its directions, its effective rank, and how two updates lie to each other.

Shape legend: I inputs, O outputs, K directions of an update, L of another one.

An update is described by its singular value decomposition, which ``lowrank`` takes from the factors alone. All of it
is float64: stored factors are exact there, so what is reported is the file's content and no rounding of the report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.adapters.lowrank import Spectrum
from veneer.adapters.updates import LayerUpdate
from veneer.core.errors import UsageError, listed
from veneer.core.records import AdapterOverlap, AdapterSpectrum, LayerOverlap, LayerSpectrum

DEAD = 1e-3
"""A layer whose update is under this share of the median norm is dead."""


@dataclass(frozen=True)
class Directions:
    """The singular value decomposition of an update, without its zero part."""

    values: Tensor
    """(K,) singular values, descending."""
    left: Tensor
    """(O, K) orthonormal columns: the directions that the update writes to."""
    right: Tensor
    """(I, K) orthonormal columns: the directions that the update reads from."""

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.values.numel()


def directions(spectrum: Spectrum, most: int) -> Directions:
    """The leading directions of an update: at most so many, and none that rounding alone could have made.

    The bound is numpy's for the rank of a matrix: the largest singular value times the longer side times epsilon.
    """
    left, right = spectrum.vectors(most)
    values = above_rounding(spectrum.values[:most], max(left.shape[0], right.shape[1]))
    return Directions(values, left[:, : len(values)], right[: len(values)].T)


def above_rounding(values: Tensor, longer: int) -> Tensor:
    """The singular values, descending, that are more than rounding of a matrix with that longer side."""
    return values[values > values[:1].sum() * longer * torch.finfo(values.dtype).eps]


def effective_rank(values_K: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum; 0 for an update that is zero.

    It is K when all are equal and near 1 when one outweighs the rest. Roy and Vetterli, "The effective rank",
    EUSIPCO 2007.
    """
    if not values_K.numel():
        return 0.0
    share = values_K / values_K.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def principal_angles(first_NK: Tensor, second_NL: Tensor) -> Tensor:
    """The angles between the spaces that orthonormal columns span, in radians, ascending; min(K, L) of them.

    Both the cosine and the sine of each angle are computed, so that small angles are as exact as large ones
    (Björck and Golub, "Numerical methods for computing angles between linear subspaces", 1973).
    """
    wide, thin = (first_NK, second_NL) if first_NK.shape[1] >= second_NL.shape[1] else (second_NL, first_NK)
    shared = wide.T @ thin
    cosines = torch.linalg.svdvals(shared)
    sines = torch.linalg.svdvals(thin - wide @ shared).flip(0)
    return torch.atan2(sines, cosines)


def subspace_similarity(first_NK: Tensor, second_NL: Tensor) -> Tensor:
    """The LoRA paper's φ(i, j) for every i and j, as a (K, L) matrix with values from 0 to 1.

    φ(i, j) is the squared Frobenius norm of U_iᵀ V_j divided by min(i, j), where U_i and V_j are the first i and
    j columns: 1 when the smaller space lies in the larger one, 0 when they are orthogonal (section 7.2).
    """
    K, L = first_NK.shape[1], second_NL.shape[1]
    overlap = (first_NK.T @ second_NL).square().cumsum(0).cumsum(1)
    smaller = torch.minimum(torch.arange(1, K + 1).unsqueeze(1), torch.arange(1, L + 1))
    return overlap / smaller


def inner_product(first: Spectrum, second: Spectrum) -> float:
    """The sum of the products of two updates' elements, from thin matrices where both are products of such."""
    if first.left is None or first.right is None or second.left is None or second.right is None:
        return float((_dense(first) * _dense(second)).sum())
    shared = (first.left.T @ second.left) * (first.right @ second.right.T)
    return float(first.values @ shared @ second.values)


def _dense(spectrum: Spectrum) -> Tensor:
    if spectrum.update is not None:
        return spectrum.update.double()
    left, right = spectrum.vectors(len(spectrum.values))
    return left * spectrum.values @ right


def adapter_spectrum(updates: Iterable[LayerUpdate]) -> AdapterSpectrum:
    """What every update of an adapter is made of, and which layers have none to speak of.

    A layer is dead when its update is zero, or its norm under a thousandth of the median of those that are not.

    >>> adapter_spectrum(updates_in_file(files.read("./adapter"))).layers[0].effective_rank
    3.7
    """
    layers, whole = [], True
    for update in updates:
        layers.append(layer_spectrum(update))
        whole = whole and update.whole
    alive = [layer.update_norm for layer in layers if layer.update_norm > 0]
    median = statistics.median(alive) if alive else 0.0
    told = (replace(layer, dead=layer.update_norm == 0 or layer.update_norm < DEAD * median) for layer in layers)
    return AdapterSpectrum(tuple(told), whole, median)


def layer_spectrum(update: LayerUpdate) -> LayerSpectrum:
    """What the update of one layer is made of; whether it is dead is for all layers together to say."""
    spectrum = update.spectrum()
    values = above_rounding(spectrum.values, max(update.shape))
    norm = float(values.norm())
    a_norm, b_norm = update.norms or (None, None)
    ranks = [spectrum.rank_for(share) if len(values) else 0 for share in (0.9, 0.95, 0.99)]
    return LayerSpectrum(
        path=update.path,
        shape=update.shape,
        r=update.r,
        scaling=update.scaling,
        a_norm=a_norm,
        b_norm=b_norm,
        update_norm=norm,
        relative_norm=None if not update.weight_norm else norm / update.weight_norm,
        singular_values=tuple(values.tolist()),
        effective_rank=effective_rank(values),
        rank_90=ranks[0],
        rank_95=ranks[1],
        rank_99=ranks[2],
        dead=norm == 0,
    )


def adapter_overlap(first: Iterable[LayerUpdate], second: Iterable[LayerUpdate]) -> AdapterOverlap:
    """How the updates of two adapters of one model lie to each other, on every layer that both change.

    Raises:
        UsageError: they have no layer in common, or one of another shape: they are for different models.
    """
    one, other = ({update.path: update for update in updates} for updates in (first, second))
    _check_comparable(one, other)
    layers, products = [], []
    for path in (path for path in one if path in other):
        layer, inner, norms = _layer_overlap(one[path], other[path])
        layers.append(layer)
        products.append((inner, *norms))
    inner, squares_one, squares_other = (math.fsum(column) for column in zip(*products, strict=True))
    length = math.sqrt(squares_one * squares_other)
    known = [layer for layer in layers if layer.phi_in is not None and layer.phi_out is not None]
    return AdapterOverlap(
        layers=tuple(layers),
        only_first=tuple(path for path in one if path not in other),
        only_second=tuple(path for path in other if path not in one),
        cosine=inner / length if length else 0.0,
        phi_in=_mean(layer.phi_in for layer in known),
        phi_out=_mean(layer.phi_out for layer in known),
        chance_in=_mean(layer.chance_in for layer in known),
        chance_out=_mean(layer.chance_out for layer in known),
    )


def _layer_overlap(one: LayerUpdate, other: LayerUpdate) -> tuple[LayerOverlap, float, tuple[float, float]]:
    """One layer's record, the inner product of its two updates, and their squared norms."""
    first, second = one.spectrum(), other.spectrum()
    inner, squares = inner_product(first, second), (first.energy, second.energy)
    a, b = (directions(spectrum, _most(spectrum, r)) for spectrum, r in ((first, one.r), (second, other.r)))
    outputs, inputs = one.shape
    zero = not a.rank or not b.rank
    larger = max(a.rank, b.rank)
    return (
        LayerOverlap(
            path=one.path,
            ranks=(a.rank, b.rank),
            cosine=0.0 if zero else inner / math.sqrt(squares[0] * squares[1]),
            angles_in=() if zero else _degrees(a.right, b.right),
            angles_out=() if zero else _degrees(a.left, b.left),
            phi_in=None if zero else float(subspace_similarity(a.right, b.right)[-1, -1]),
            phi_out=None if zero else float(subspace_similarity(a.left, b.left)[-1, -1]),
            chance_in=larger / inputs,
            chance_out=larger / outputs,
        ),
        inner,
        squares,
    )


def _most(spectrum: Spectrum, r: int) -> int:
    """All directions of a product; of a dense update, whose smallest are everywhere, as many as its rank."""
    return len(spectrum.values) if spectrum.update is None else r


def _degrees(first: Tensor, second: Tensor) -> tuple[float, ...]:
    return tuple(principal_angles(first, second).rad2deg().tolist())


def _check_comparable(one: Mapping[str, LayerUpdate], other: Mapping[str, LayerUpdate]) -> None:
    common = [path for path in one if path in other]
    if not common:
        raise UsageError(
            f"The two adapters have no layer in common: {listed(one, most=2)}, and {listed(other, most=2)}."
        )
    for path in common:
        if one[path].shape != other[path].shape:
            raise UsageError(
                f"The two adapters are for different models: on {path!r} the update of one is {_size(one[path])}, "
                f"that of the other {_size(other[path])}."
            )


def _size(update: LayerUpdate) -> str:
    return " x ".join(map(str, update.shape))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None

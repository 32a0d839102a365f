"""Principal components of rows that come in batches, so that no batch need be kept.

Shape legend: N rows of a batch, D features, K components, S rows that stand for all earlier batches.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from veneer.kernels.svd import leading_svd


@final
class Directions:
    """The directions of largest variance among all rows seen so far (incremental PCA).

    >>> found = Directions(4)
    >>> found.add(torch.randn(100, 32))
    >>> found.components.shape
    torch.Size([4, 32])

    The K components, times their singular values, stand for everything before; a new batch is centred on its own mean,
    and one more row makes up for the difference of the means. Ross, Lim, Lin and Yang, IJCV 2008, sec. 3.1.

    Args:
        count: K, how many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows = 0
        """How many rows were added."""
        self.components = torch.empty(0)
        """(K, D), orthonormal rows, the direction of most variance first; each one's largest entry is positive."""
        self.singular_values = torch.empty(0)
        """(K,): of the centred rows."""
        self.share = torch.empty(0)
        """(K,): of all variance, what lies along each component."""
        self._mean = torch.empty(0)
        self._scatter = 0.0

    def add(self, rows_ND: Tensor) -> None:
        """Take in a batch of rows, at least as many as there are components to find.

        Args:
            rows_ND: of any floating-point dtype; computed with in float32 or wider.
        """
        x_ND = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
        N = x_ND.shape[0]
        mean = x_ND.mean(0, dtype=torch.float64)
        centred = x_ND - mean.to(x_ND.dtype)
        scatter = float(centred.double().square().sum())
        stack = centred
        if self.rows:
            weight = self.rows * N / (self.rows + N)
            step = self._mean - mean
            scatter += self._scatter + weight * float(step.square().sum())
            earlier = self.singular_values[:, None] * self.components
            stack = torch.cat([earlier, centred, (weight**0.5 * step)[None].to(x_ND.dtype)])
            mean = (self.rows * self._mean + N * mean) / (self.rows + N)
        self.rows, self._mean, self._scatter = self.rows + N, mean, scatter
        _, self.singular_values, Vh, _ = leading_svd(stack, self.count)
        largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
        self.components = Vh * largest.sign()
        self.share = self.singular_values.square() / scatter if scatter else torch.zeros_like(self.singular_values)

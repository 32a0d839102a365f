"""Which examples go together: similar lengths share a batch, in an order that stays random."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import final

from torch.utils.data import Sampler

WINDOW = 16
"""Batches that are sorted together: enough to save most padding, few enough to keep batches mixed."""


@final
class LengthBatches(Sampler[list[int]]):
    """Batches of indices, another order on every pass, the same for the same seed.

    The indices are shuffled, sorted by length within windows of ``WINDOW`` batches, cut into batches, and the
    batches are shuffled. Every index comes once a pass; the last batch of a pass may be smaller.
    """

    drop_last = False

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.random = random.Random(seed)

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        self.random.shuffle(order)
        # The odd batch is taken first, off a shuffled order, so that it is not always the longest examples.
        odd = len(order) % self.batch_size
        batches = [order[:odd]] if odd else []
        for start in range(odd, len(order), WINDOW * self.batch_size):
            window = sorted(order[start : start + WINDOW * self.batch_size], key=self.lengths.__getitem__)
            batches += [window[at : at + self.batch_size] for at in range(0, len(window), self.batch_size)]
        self.random.shuffle(batches)
        yield from batches

"""Which examples of a pass go together: a pure function of the lengths, the seed and the number of the pass.

So a run's place in its data is the number of its next step, and every process knows what the others do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

WINDOW = 16
"""Padded batches that are sorted together: enough to save most padding, few enough to keep batches mixed."""


@final
@dataclass(frozen=True)
class Micro:
    """The examples that go through the model at once."""

    indices: tuple[int, ...]
    counts: bool = True
    """False where a process has nothing left to do in a step: it goes along with an example that is not trained."""


Share = tuple[Micro, ...]
"""What one process does in one optimiser step."""


@final
@dataclass(frozen=True)
class Batching:
    """The optimiser steps of every pass over a data set.

    >>> Batching(lengths=[5, 3, 9], batch_size=2, seed=0).steps(0)
    [((Micro(indices=(1, 0), counts=True),),), ((Micro(indices=(2,), counts=True),),)]

    A step is ``batch_size * accumulation`` examples for each process, in another order on every pass; the last
    one of a pass may be smaller. Packed, a step's examples are spread over the processes by their lengths and cut
    into as few micro-batches of at most ``max_tokens`` as all processes can keep to. Padded, examples of similar
    length share a batch.
    """

    lengths: Sequence[int]
    """Tokens of each example."""
    batch_size: int
    """Examples of one batch on one process."""
    accumulation: int = 1
    """Batches of one step on one process."""
    processes: int = 1
    packed: bool = False
    """Whether examples are laid end to end."""
    max_tokens: int | None = None
    """The most tokens that go through the model at once when packed; a single example may be longer."""
    seed: int = 0

    @property
    def per_step(self) -> int:
        """Examples of a whole step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_pass(self) -> int:
        """Optimiser steps of one pass."""
        return -(-len(self.lengths) // self.per_step)

    def steps(self, number: int) -> list[tuple[Share, ...]]:
        """The steps of a pass (counted from 0), each with the share of every process."""
        # A text as the seed, because Random adds nothing to two numbers that have the same sum.
        drawn = random.Random(f"{self.seed}/{number}")
        order = list(range(len(self.lengths)))
        drawn.shuffle(order)
        return self._packed(order) if self.packed else self._padded(order, drawn)

    def _packed(self, order: list[int]) -> list[tuple[Share, ...]]:
        found = []
        for start in range(0, len(order), self.per_step):
            shares = self._spread(order[start : start + self.per_step], self.processes)
            cuts = max(self._cuts(share) for share in shares)
            found.append(self._even([self._spread(share, min(cuts, len(share) or 1)) for share in shares], order[0]))
        return found

    def _cuts(self, share: Sequence[int]) -> int:
        """How many micro-batches these examples need: cut by tokens, each filled as far as it goes."""
        if self.max_tokens is None:
            return 1
        cuts = 1
        while cuts < len(share):
            fullest = max(sum(self.lengths[i] for i in part) for part in self._spread(share, cuts))
            if fullest <= self.max_tokens:
                break
            cuts += 1
        return cuts

    def _spread(self, indices: Sequence[int], parts: int) -> list[list[int]]:
        """Examples in ``parts`` groups of about equally many tokens, the longest first; each stays in order."""
        groups: list[list[int]] = [[] for _ in range(parts)]
        filled = [0] * parts
        place = {index: at for at, index in enumerate(indices)}
        for index in sorted(indices, key=lambda i: (-self.lengths[i], place[i])):
            least = filled.index(min(filled))
            groups[least].append(index)
            filled[least] += self.lengths[index]
        return [sorted(group, key=place.__getitem__) for group in groups]

    def _padded(self, order: list[int], drawn: random.Random) -> list[tuple[Share, ...]]:
        # The odd batch is taken first, off a shuffled order, so that it is not always the longest examples.
        odd = len(order) % self.batch_size
        batches = [order[:odd]] if odd else []
        for start in range(odd, len(order), WINDOW * self.batch_size):
            window = sorted(order[start : start + WINDOW * self.batch_size], key=self.lengths.__getitem__)
            batches += [window[at : at + self.batch_size] for at in range(0, len(window), self.batch_size)]
        drawn.shuffle(batches)
        whole = self.accumulation * self.processes
        return [
            self._even([batches[start + p : start + whole : self.processes] for p in range(self.processes)], order[0])
            for start in range(0, len(batches), whole)
        ]

    def _even(self, shares: Sequence[Sequence[Sequence[int]]], spare: int) -> tuple[Share, ...]:
        """Shares of equally many micro-batches: processes wait for each other at every one of them."""
        most = max(len(share) for share in shares)
        idle = Micro((spare,), counts=False)
        return tuple(
            tuple(Micro(tuple(share[at])) if at < len(share) and share[at] else idle for at in range(most))
            for share in shares
        )


def padding(lengths: Sequence[int], batch_size: int) -> float:
    """The share of a pass that would be padding, were batches drawn at random and padded to their longest.

    >>> padding([4, 4, 4, 4], 2)
    0.0
    """
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    batches = [[lengths[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    computed = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / computed if computed else 0.0

"""Which examples of a pass go together: a pure function of the lengths, the seed and the number of the pass.

So a run's place in its data is the number of its next step, and every process knows what the others do.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from veneer.data.mixture import Mixture

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

    >>> list(Batching(lengths=[5, 3, 9], batch_size=2, seed=0).steps(0))
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
    mixture: Mixture | None = None
    """How often each part's examples come in a pass; without it, each comes once."""

    @property
    def per_step(self) -> int:
        """Examples of a whole step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_pass(self) -> int:
        """Optimiser steps of one pass."""
        count = len(self.lengths) if self.mixture is None else sum(self.mixture.taken)
        return -(-count // self.per_step)

    def steps(self, number: int) -> Iterator[tuple[Share, ...]]:
        """The steps of a pass (counted from 0), each with the share of every process.

        Of a pass, memory holds eight bytes for each example.
        """
        # A text as the seed, because Random adds nothing to two numbers that have the same sum.
        drawn = random.Random(f"{self.seed}/{number}")
        plain = self.mixture is None
        order = array("q", range(len(self.lengths))) if plain else self.mixture.order(self.seed, number)
        drawn.shuffle(order)
        return self._packed(order) if self.packed else self._padded(order, drawn)

    def _packed(self, order: Sequence[int]) -> Iterator[tuple[Share, ...]]:
        for start in range(0, len(order), self.per_step):
            shares = self._spread(order[start : start + self.per_step], self.processes)
            cuts = max(self._cuts(share) for share in shares)
            yield self._even([self._spread(share, min(cuts, len(share) or 1)) for share in shares], order[0])

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
        # By their places, since of a mixture an example may come twice.
        for at in sorted(range(len(indices)), key=lambda at: (-self.lengths[indices[at]], at)):
            least = filled.index(min(filled))
            groups[least].append(at)
            filled[least] += self.lengths[indices[at]]
        return [[indices[at] for at in sorted(group)] for group in groups]

    def _padded(self, order: array[int], drawn: random.Random) -> Iterator[tuple[Share, ...]]:
        # The odd batch is taken first, off a shuffled order, so that it is not always the longest examples.
        spare = order[0]
        odd = len(order) % self.batch_size
        for start in range(odd, len(order), WINDOW * self.batch_size):
            window = slice(start, start + WINDOW * self.batch_size)
            order[window] = array("q", sorted(order[window], key=self.lengths.__getitem__))
        starts = array("q", [*([0] if odd else []), *range(odd, len(order), self.batch_size)])
        drawn.shuffle(starts)

        def batch(start: int) -> Sequence[int]:
            return order[start : odd if start < odd else start + self.batch_size]

        whole = self.accumulation * self.processes
        for at in range(0, len(starts), whole):
            step = [batch(start) for start in starts[at : at + whole]]
            yield self._even([step[process :: self.processes] for process in range(self.processes)], spare)

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
    order = array("q", range(len(lengths)))
    random.Random(0).shuffle(order)
    batches = (order[at : at + batch_size] for at in range(0, len(order), batch_size))
    computed = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / computed if computed else 0.0

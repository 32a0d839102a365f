"""The two ways to say which rank is wanted: a number, or the share of the energy to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.core.errors import UsageError

if TYPE_CHECKING:
    from veneer.adapters.lowrank import Rank
    from veneer.core.records import ApproximatedLayer

R_HELP = "The rank of every layer."
ENERGY_HELP = "The share of each layer's energy (its squared singular values) to keep, above 0 to 1, at the least rank."


def rank_from(r: int | None, energy: float | None) -> Rank | None:
    """The rank that the two flags ask for; None when neither is given.

    Raises:
        UsageError: both, or a value that is no rank and no share.
    """
    from veneer.adapters.lowrank import check_rank

    if r is not None and energy is not None:
        raise UsageError("--r and --energy are both given; a layer's rank is either fixed or found from its energy.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy is {energy}; expected a share from above 0 to 1, such as 0.95.")
    if r is not None and r < 1:
        raise UsageError(f"--r is {r}; expected a whole number of at least 1.")
    rank = energy if r is None else r
    if rank is not None:
        check_rank(rank)
    return rank


def padding_note(layers: Sequence[ApproximatedLayer]) -> str | None:
    """A sentence on layers that were filled up with zeros, if there are any."""
    padded = [layer for layer in layers if layer.r_before is not None and layer.r > layer.r_before]
    if not padded:
        return None
    return (
        f"{len(padded)} of {len(layers)} layers had a lower rank and were filled up with zeros, which changes no "
        "output; the new directions do not learn."
    )

"""How the tokens of an answer are chosen. Light to import, so that the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 128
    """The most tokens to write."""
    temperature: float = 0.0
    """0 always takes the likeliest token; above, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """The seed of the draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected above 0 and at most 1.")

"""Every exception of veneer: each message says what was given, what was expected, and what to do.

``exit_code`` is what the command line returns: 2 for usage and configuration, 1 for a failure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """The root of all errors that veneer raises on purpose."""

    exit_code = 1


class UsageError(VeneerError, ValueError):
    """A call or a command that cannot mean anything: a missing file, an unknown adapter name."""

    exit_code = 2


class ConfigError(VeneerError, ValueError):
    """A configuration with an unknown field, a bad value, or a combination without meaning."""

    exit_code = 2


class TargetError(ConfigError):
    """A pattern that matches nothing, or a module that cannot be adapted."""


class NotStreamableError(UsageError):
    """A merge that needs the whole model in memory, for the given reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"This merge cannot go tensor by tensor: {reason}.")


class AdapterFileError(VeneerError, ValueError):
    """An adapter folder that is broken, incomplete, unsafe, or made for another model."""


class DataError(VeneerError, ValueError):
    """Training or evaluation data that cannot be used as it is."""


class MergeError(VeneerError, ValueError):
    """A merge that would not give the same outputs as the unmerged adapter."""


class TrainingError(VeneerError):
    """A run that cannot go on: a loss that is not finite, nothing to train."""


class CodeError(TrainingError):
    """A user's own code for a task that fails, or does not give what it has to."""


class DiskError(VeneerError, OSError):
    """A file that could not be written whole; what stood there before still stands."""


class BaseMismatchWarning(UserWarning):
    """An adapter is being loaded onto weights other than those it was trained on."""


def nearest(name: str, candidates: Iterable[str], *, most: int = 3) -> str:
    """A clause naming the candidates closest to ``name``, or an empty string.

    >>> nearest("q_porj", ["q_proj", "v_proj"], most=1)
    " Did you mean 'q_proj'?"
    """
    found = difflib.get_close_matches(name, sorted(set(candidates)), n=most, cutoff=0.6)
    if not found:
        return ""
    return f" Did you mean {' or '.join(repr(close) for close in found)}?"


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Names joined for a sentence, cut after ``most`` with the number left out."""
    all_names = list(names)
    text = ", ".join(all_names[:most])
    return f"{text} and {len(all_names) - most} more" if len(all_names) > most else text

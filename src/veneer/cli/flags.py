"""Give a command flags that are not written in its own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


def show_flags(
    function: Callable[..., Any],
    command: Callable[..., Any],
    added: Sequence[inspect.Parameter],
    *,
    instead_of: str | None = None,
) -> None:
    """Let a function show typer the parameters of the command that it wraps, and these after them.

    Args:
        function: the wrapper that typer calls, with keywords only.
        command: what it wraps.
        added: further parameters.
        instead_of: a parameter of the command that the wrapper fills in itself.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != instead_of]
    shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *added)]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}

"""From the names in ``target_parameters`` to the parameters that they mean."""

from __future__ import annotations

from collections.abc import Iterable

from veneer.adapters.index import ModuleIndex, Slot, lies_in
from veneer.core.config import TunerConfig
from veneer.core.errors import TargetError, listed, nearest

_DIMENSIONS = (2, 3)


def parameters_named(index: ModuleIndex, pattern: str) -> tuple[str, ...]:
    """The paths of the parameters that a name of ``target_parameters`` means: PEFT's rule, exact or an ending.

    Raises:
        TargetError: one of them is no matrix and no stack of matrices.
    """
    found = tuple(path for path in index.parameters if path == pattern or path.endswith(f".{pattern}"))
    for path in found:
        slot = index.parameters[path]
        dimensions = getattr(slot.module, slot.leaf).ndim
        if dimensions not in _DIMENSIONS:
            raise TargetError(
                f"target_parameters has {pattern!r}, which matches {path!r} of {dimensions} dimensions; expected 2 "
                "(out, in), or 3 with one matrix for each expert."
            )
    return found


def unmatched(index: ModuleIndex, pattern: str) -> str:
    """Why a name that matches nothing is refused."""
    stacks = {
        path.split(".")[-1] for path, slot in index.parameters.items() if getattr(slot.module, slot.leaf).ndim == 3
    }
    hint = f" Parameters that hold a matrix for each expert: {listed(sorted(stacks), most=20)}." if stacks else ""
    endings = {".".join(path.split(".")[-parts:]) for path in index.parameters for parts in (1, 2)}
    return (
        f"target_parameters has {pattern!r}, which matches no floating-point parameter below the model's root."
        f"{nearest(pattern, endings)}{hint}"
    )


def check_parameters(config: TunerConfig, slots: Iterable[Slot], modules: Iterable[str], other: Iterable[str]) -> None:
    """Refuse parameters that another field of the config changes or means to leave out.

    Args:
        config: the config.
        slots: the parameters.
        modules: paths that target_modules selects.
        other: paths that exclude_modules or modules_to_save select.

    Raises:
        TargetError: one of them is such a parameter.
    """
    targeted, elsewhere = set(modules), list(other)
    for slot in slots:
        if slot.owner in targeted:
            raise TargetError(
                f"{slot.path!r} is in target_parameters and its module in target_modules; leave one of them out "
                "(target_modules=[] adapts no module)."
            )
        if lies_in(slot.owner, elsewhere):
            raise TargetError(
                f"{slot.path!r} is in target_parameters, and its module in exclude_modules or modules_to_save; leave "
                "it out of one of them."
            )
        if config.layers_to_transform not in (None, []):
            raise TargetError(
                "layers_to_transform counts for target_modules and not for target_parameters, in PEFT's format; name "
                f"the layers of the parameters instead, such as {slot.path!r}."
            )

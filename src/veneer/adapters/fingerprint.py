"""A cheap mark of the base model's weights, so that loading an adapter onto another base is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel

_PARAMETERS = 64
_VALUES = 8


def fingerprint(adapted: AdaptedModel, leave_out: Collection[str] = ()) -> str:
    """A text of two hashes: all parameter names and shapes, and a few sampled values.

    Values are compared as bfloat16, so that the same checkpoint loaded in another precision has the same mark.
    Biases are left out of the values, since adapters may train them.

    Args:
        adapted: the model; merged layers count with their original weight.
        leave_out: module paths that are not part of the base, such as a new head that the adapter brings.
    """
    names = [name for name in sorted(adapted.index.parameter_sizes) if not _inside(name, leave_out)]
    shapes, values = hashlib.sha256(), hashlib.sha256()
    sampled = [name for name in names if "bias" not in name]
    sampled = sampled[:: max(1, len(sampled) // _PARAMETERS)]
    for name in names:
        shapes.update(f"{name}{tuple(adapted.original(name).shape)}".encode())
    known = True
    for name in sampled:
        parameter = adapted.original(name)
        if parameter.is_meta or not parameter.is_floating_point():
            known = False
            continue
        values.update(_sample(parameter))
    return f"{shapes.hexdigest()[:16]}-{values.hexdigest()[:16] if known else 'unknown'}"


def differs(saved: str, here: str) -> str | None:
    """In what two fingerprints differ, as a clause for a warning, or None."""
    saved_shapes, _, saved_values = saved.partition("-")
    here_shapes, _, here_values = here.partition("-")
    if saved_shapes != here_shapes:
        return "its modules or their shapes differ"
    if "unknown" not in (saved_values, here_values) and saved_values != here_values:
        return "its weights differ"
    return None


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    if not flat.numel():
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
    picked = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
    return picked.view(torch.int16).numpy().tobytes()


def _inside(name: str, owners: Collection[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)

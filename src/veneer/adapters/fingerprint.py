"""A cheap mark of the base model's weights, so that loading an adapter onto another base is noticed."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import lies_in, shape_of

_PARAMETERS = 64
_VALUES = 8


def fingerprint(
    adapted: AdaptedModel, leave_out: Collection[str] = (), *, read: Callable[[str], Tensor] | None = None
) -> str:
    """A text of three parts: a hash of all parameter names and shapes, the dtypes, and a few sampled values.

    Values are kept as bfloat16, so that the same checkpoint loaded in another precision has the same mark.
    Biases are left out of the values, since adapters may train them.

    Args:
        adapted: the model; merged layers count with their original weight.
        leave_out: module paths that are not part of the base, such as a new head that the adapter brings.
        read: gives the value of a parameter by its name, for a model that has none itself.
    """
    if read is not None:
        return _mark(adapted, leave_out, read)
    # Every adapter that is loaded asks for it, and hardly ever has a weight changed since.
    parameters = [adapted.original(name) for name in adapted.index.parameter_sizes]
    state = (
        None if any(p.is_inference() for p in parameters) else [(id(p), p.data_ptr(), p._version) for p in parameters]
    )
    key = tuple(sorted(leave_out))
    before = adapted.index.marks.get(key)
    if before is not None and _are_parts(parameters):
        # Frozen and split over processes: it is what it was when it was whole.
        return before[1]
    if before is None or state is None or before[0] != state:
        before = adapted.index.marks[key] = (state, _mark(adapted, leave_out, adapted.original))
    return before[1]


def _mark(adapted: AdaptedModel, leave_out: Collection[str], read: Callable[[str], Tensor]) -> str:
    names = [name for name in sorted(adapted.index.parameter_sizes) if not lies_in(name, leave_out)]
    shapes, values, dtypes = hashlib.sha256(), [], set()
    sampled = [name for name in names if "bias" not in name]
    sampled = sampled[:: max(1, len(sampled) // _PARAMETERS)]
    for name in names:
        shapes.update(f"{name}{shape_of(adapted.original(name))}".encode())
    known = True
    for name in sampled:
        parameter = read(name)
        if parameter.is_meta or not parameter.is_floating_point() or _are_parts([parameter]):
            known = False
            continue
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
        values.append(_sample(parameter))
    samples = base64.b64encode(b"".join(values)).decode() if known else "unknown"
    return f"{shapes.hexdigest()[:16]}-{'+'.join(sorted(dtypes))}-{samples}"


def _are_parts(parameters: Collection[Tensor]) -> bool:
    """Whether any parameter is split over several processes, so that reading it would wait for all of them."""
    # Loaded already when there is one. By their kinds: there are thousands of parameters and a few kinds.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, parameters))):
        return True
    # DeepSpeed splits all or none, and leaves empty tensors with notes of its own.
    return "ds_id" in vars(next(iter(parameters), torch.empty(0)))


def differs(saved: str, here: str) -> str | None:
    """In what two fingerprints differ, as a clause for a warning, or None."""
    saved_shapes, _, saved_rest = saved.partition("-")
    here_shapes, _, here_rest = here.partition("-")
    if saved_shapes != here_shapes:
        return "its modules or their shapes differ"
    saved_dtypes, _, saved_values = saved_rest.partition("-")
    here_dtypes, _, here_values = here_rest.partition("-")
    if "unknown" in (saved_values, here_values) or saved_values == here_values:
        return None
    if saved_dtypes != here_dtypes and "float16" in f"{saved_dtypes}+{here_dtypes}".split("+"):
        # Rounded to float16 first, a value may land one step of bfloat16 aside, or on zero.
        a, b = _values(saved_values), _values(here_values)
        step = torch.finfo(torch.bfloat16).eps
        if a.shape == b.shape and ((a - b).abs() <= step * a.abs() + torch.finfo(torch.float16).tiny).all():
            return None
    return "its weights differ"


def _values(samples: str) -> Tensor:
    try:
        raw = base64.b64decode(samples, validate=True)
    except ValueError:
        raw = b""
    even = bytearray(raw[: len(raw) // 2 * 2]) or bytearray(2)
    return torch.frombuffer(even, dtype=torch.bfloat16).float()


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    if not flat.numel():
        return b""
    places = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).long()
    picked = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
    return picked.view(torch.int16).numpy().tobytes()

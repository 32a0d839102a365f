"""What starts need to know of real data: gathered on the untouched model, and left on its modules for the start.

A start finds what is left here through ``Slot.evidence``; ``inject`` takes it away once an adapter has started from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import EVIDENCE, ModuleIndex
from veneer.adapters.lifecycle import disabled
from veneer.adapters.targets import Selection, Target, select
from veneer.core.config import LowRankConfig, PeftConfig
from veneer.core.disk import write_whole
from veneer.core.errors import ConfigError, UsageError


def adapted_of(model: nn.Module) -> AdaptedModel | None:
    """The registry of an adapted model; None for a bare one."""
    inner = model if isinstance(model, AdaptedModel) else model.__dict__.get("_modules", {}).get("base_model")
    return inner if isinstance(inner, AdaptedModel) else None


def selected(model: nn.Module, config: PeftConfig, start: str) -> Selection:
    """What a config means on a model, adapted or not.

    Raises:
        ConfigError: the config asks for another start.
        TargetError: see ``get_peft_model``.
    """
    if not isinstance(config, LowRankConfig) or config.init != start:
        now = config.init_lora_weights if isinstance(config, LowRankConfig) else type(config).__name__
        raise ConfigError(f"This prepares init_lora_weights={start!r}, but the config has {now!r}.")
    adapted = adapted_of(model)
    return select(ModuleIndex(model) if adapted is None else adapted.index, config)


def leave(target: Target, **found: Tensor) -> None:
    """Put evidence where the start of an adapter on this module looks for it."""
    target.slot.module.__dict__[EVIDENCE] = found


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, for the length of a with block."""
    adapted = adapted_of(model)
    with contextlib.nullcontext() if adapted is None else disabled(adapted):
        yield


@contextlib.contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show ``see`` the name and the first input of each of these modules whenever it is called."""

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                see(name, args[0] if args else next(iter(kwargs.values())))

        return seen

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@final
class Latest:
    """Tells whether an input is the one seen last: neighbours such as q, k and v are given one and the same tensor."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._version: int | None = None

    def again(self, x: Tensor) -> bool:
        """Whether ``x`` is the tensor of the last call of this method, unchanged since."""
        version = None if x.is_inference() else x._version
        same = self._x is x and self._version == version
        self._x, self._version = x, version
        return same


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes of a distributed run; the tensor itself in a single one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def read_cache(path: str, names: list[str]) -> dict[str, Tensor] | None:
    """Tensors that were kept in a file; None when it is not there yet.

    Raises:
        UsageError: it is no safetensors file, or does not hold all that is wanted.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        return None
    try:
        found = safetensors.torch.load_file(place)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{path!r} is not a complete safetensors file ({error}); PEFT's caches are pickles, which are not read: "
            "name another file."
        ) from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{path!r} holds no {missing[0]!r}: it was made for another model or config.")
    return found


def write_cache(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors in a file for another run.

    Raises:
        DiskError: the disk is full or not writable.
    """
    place = Path(path).expanduser()
    ready = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
    write_whole(place.parent, {place.name: lambda beside: safetensors.torch.save_file(ready, beside)})

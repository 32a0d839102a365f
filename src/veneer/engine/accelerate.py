"""All that makes a model train faster and smaller, in one call: for ``veneer train`` and for anybody's own trainer."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from veneer.engine import matmul as matmul_
from veneer.engine.allocator import keep_freed_memory
from veneer.engine.head import form_of, language_loss, underlying
from veneer.engine.kernels import Kernels, use_kernels
from veneer.engine.packing import Packing, use_packing


@final
@dataclass(frozen=True)
class Acceleration:
    """What was done to a model."""

    kernels: Kernels | None
    """Kernels in the place of its modules; None when they were not asked for."""
    packing: Packing | None
    """Whether it takes packed rows; None when that was not asked for."""
    matmul: matmul_.Library = "torch"
    """What multiplies float32 matrices from ``start`` on: in the whole process, which has one setting for it."""
    _started: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def start(self) -> Self:
        """Let the library multiply."""
        self._started.enter_context(matmul_.multiplying(self.matmul))
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def undo(self) -> None:
        """Make the model again what it was, apart from what it learned; done by itself at the end of a with block."""
        self._started.close()
        if self.packing is not None:
            self.packing.undo()
        if self.kernels is not None:
            self.kernels.undo()

    def notes(self) -> list[str]:
        """What was done, in sentences."""
        return [] if self.kernels is None else [f"Kernels are in place of {self.kernels}."]


_accelerated: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()
"""From a model that ``accelerated`` changed to what takes the change back."""


def accelerate(
    model: nn.Module, *, kernels: bool = True, packing: bool = True, matmul: matmul_.Library = "torch"
) -> Acceleration:
    """Put kernels in place and make the model ready for packed rows; its forward and its loss stay its own.

    Raises:
        ConfigError: oneDNN where it is not exact.
    """
    matmul_.check(matmul)
    put = use_kernels(model) if kernels else None
    # The form of the head is looked at here, before the model is spread over processes.
    form_of(model)
    return Acceleration(put, use_packing(model) if packing else None, matmul)


def accelerated(
    model: nn.Module,
    *,
    kernels: bool = True,
    packing: bool = True,
    matmul: matmul_.Choice = "auto",
) -> nn.Module:
    """Make a model train faster and in less memory in ``transformers.Trainer``, TRL's ``SFTTrainer`` or a loop.

    >>> model = veneer.accelerated(get_peft_model(model, config))
    >>> Trainer(model=model, data_collator=DataCollatorWithFlattening(), ...)

    Kernels take the place of its modules, rows of several sequences end to end (transformers'
    ``DataCollatorWithFlattening``, TRL's ``padding_free``) keep each to itself on every device, and a causal language
    model that is trained with labels computes its loss without the whole logits. Evaluation, generation, parameters
    and files are as before. ``restored`` takes it back.

    Args:
        model: an adapted model, or a transformers model; changed in place.
        kernels: whether to put kernels in place.
        packing: whether packed rows are to be kept apart.
        matmul: the library that multiplies float32 matrices on a CPU: torch's own, or oneDNN; "auto" measures which is
            faster, and takes oneDNN only where its products are as exact.

    Returns:
        The model.

    Raises:
        ConfigError: oneDNN where it is not exact.
    """
    restored(model)
    library = matmul_.settled(matmul, underlying(model))
    done = accelerate(model, kernels=kernels, packing=packing and form_of(model) is not None, matmul=library).start()
    keep_freed_memory()
    bare = underlying(model)
    if form_of(model) is not None:
        bare.__dict__["forward"] = _WithLoss(bare)

    def undo() -> None:
        bare.__dict__.pop("forward", None)
        done.undo()

    _accelerated[model] = undo
    return model


def restored(model: nn.Module) -> nn.Module:
    """Take back what ``accelerated`` did to a model; any other is left as it is.

    Returns:
        The model.
    """
    undo = _accelerated.pop(model, None)
    if undo is not None:
        undo()
    return model


@final
class _WithLoss:
    """A model's forward that computes the loss of labels without the whole logits, while it trains.

    An object and not a closure, so that a copy of the model gets one of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.own = model, model.forward
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        labels, training = kwargs.get("labels"), self.model.training and torch.is_grad_enabled()
        # TRL's trainer has a fused head of its own and asks for it.
        if args or labels is None or not training or "fused_lm_head" in kwargs:
            return self.own(*args, **kwargs)
        inputs = {key: value for key, value in kwargs.items() if key not in ("labels", "num_items_in_batch")}
        found = language_loss(self.model, inputs, labels)
        count: int | Tensor | None = kwargs.get("num_items_in_batch")
        return CausalLMOutputWithPast(loss=found.total / (max(found.units, 1) if count is None else count))

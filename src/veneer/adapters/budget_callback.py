"""AdaLoRA's budget in transformers' Trainer, which calls this after each optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch.nn.parallel import DistributedDataParallel

from veneer.adapters.budget import check_total_step, update_and_allocate
from veneer.adapters.model import PeftModel
from veneer.core.errors import UsageError


@final
class AdaLoraCallback:
    """Moves the budget of AdaLoRA adapters while a Trainer trains them.

    >>> trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[AdaLoraCallback()])

    transformers is not imported for it: a callback is whatever answers to the names of its events.

    Raises:
        UsageError: the model is not veneer's, or none of its active adapters is an AdaLoRA adapter that learns.
        ConfigError: the adapter's ``total_step`` is not the number of steps that the Trainer will take.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Check that the schedule is that of this training."""
        check_total_step(_own(model).base_model, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Move the budget on: the gradients are still there, and the step is not counted yet."""
        update_and_allocate(_own(model).base_model, state.global_step + 1)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(f"AdaLoraCallback has no attribute {name!r}")
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The answer to every other event."""


def _own(model: Any) -> PeftModel:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if type(inner) is not PeftModel:
        raise UsageError(f"AdaLoraCallback is for a model adapted by veneer, not for a {type(inner).__name__}.")
    return inner

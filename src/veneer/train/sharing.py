"""A model and its optimiser among the processes of a run: what a step, a checkpoint and a file need of them."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.engine.head import is_split
from veneer.train.shards import gathered, placed, saved_state, settle, state_placed, whole

if TYPE_CHECKING:
    from accelerate import Accelerator


class AbstractSharing(ABC):
    """How a model is shared. Whatever reads or writes tensors is a conversation: every process calls it, in order."""

    bare: nn.Module
    """The model itself."""
    model: nn.Module
    """What is called with batches."""
    shapes: Mapping[str, torch.Size]
    """Of every parameter, before it was shared."""

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch; gradients are exchanged at the ``last`` of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """The gradients of a micro-batch's loss; processes average them."""

    @abstractmethod
    def step(self, clip: float | None) -> float:
        """Clip the gradient and take the step; one that is not finite takes none.

        Returns:
            Its norm before it was clipped.
        """

    @abstractmethod
    def forget(self) -> None:
        """Let go of the gradients."""

    @abstractmethod
    def learned(self, *, keep: bool) -> dict[str, Tensor]:
        """What learns, whole, by name, on the CPU; nothing for a process that does not ``keep`` it."""

    @abstractmethod
    def optimiser_state(self, *, keep: bool) -> dict[str, Any]:
        """The optimiser's state dict as one process would have it; tensors of others need not be whole."""

    @abstractmethod
    def restore(self, learned: Mapping[str, Tensor], optimiser_state: dict[str, Any]) -> None:
        """Put in what ``learned`` and ``optimiser_state`` once gave."""

    @abstractmethod
    def saved_state(self, *, keep: bool) -> dict[str, Tensor] | None:
        """What ``save_pretrained`` needs as its ``state_dict``; None where it reads the model itself."""


@final
class TorchSharing(AbstractSharing):
    """One process, DDP and FSDP2.

    Args:
        accelerator: of the run.
        bare: the model.
        shared: what accelerate made of it: itself, the same split in place, or a wrapper.
        optimiser: what accelerate made of it.
        shapes: those before.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        bare: nn.Module,
        shared: nn.Module,
        optimiser: Optimizer,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        self.accelerator, self.bare, self.shared, self.optimiser = accelerator, bare, shared, optimiser
        self.model = bare if is_split(bare) else shared
        self.shapes = shapes

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        waiting: AbstractContextManager[None] = self.accelerator.no_sync(self.shared)
        return contextlib.nullcontext() if last else waiting

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, clip: float | None) -> float:
        parameters = [p for p in self.bare.parameters() if p.requires_grad]
        norm = float(whole(self.accelerator.clip_grad_norm_(parameters, clip or math.inf)))
        if math.isfinite(norm):
            self.optimiser.step()
        return norm

    def forget(self) -> None:
        self.optimiser.zero_grad()

    def learned(self, *, keep: bool) -> dict[str, Tensor]:
        settle(self.bare)
        learning = [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]
        return gathered(learning, self.shapes, keep=keep)

    def optimiser_state(self, *, keep: bool) -> dict[str, Any]:
        return self.optimiser.state_dict()

    def restore(self, learned: Mapping[str, Tensor], optimiser_state: dict[str, Any]) -> None:
        settle(self.bare)
        have = dict(self.bare.named_parameters())
        with torch.no_grad():
            for name, tensor in learned.items():
                have[name].copy_(placed(tensor, have[name]))
        self.optimiser.load_state_dict(state_placed(optimiser_state, self.optimiser))

    def saved_state(self, *, keep: bool) -> dict[str, Tensor] | None:
        return saved_state(self.bare, self.shapes, keep=keep)

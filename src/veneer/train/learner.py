"""What learns in a run, and one optimiser step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, final

import torch
from torch import Tensor, nn

from veneer.adapters.budget import penalty
from veneer.adapters.model import PeftModel
from veneer.core.errors import ConfigError, TrainingError, listed
from veneer.data.collate import tokens
from veneer.optimizers import second_factors
from veneer.tasks.heads import head_paths
from veneer.tasks.task import BatchLoss, Tally
from veneer.train.config import RunConfig
from veneer.train.optimisers import optimiser, scheduled
from veneer.train.prepare import Plan
from veneer.train.strategy import spread

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Taken:
    """A step that was taken."""

    tally: Tally
    """Of the step, over all processes."""
    norm: float
    """The gradient's norm before it was clipped."""
    tokens: int
    """How many tokens were read, padding left out."""


@final
class Learner:
    """Model, optimiser and schedule of a run, prepared for the processes that it runs on."""

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        self.plan, self.config, self.accelerator = plan, plan.config, accelerator
        self.bare: nn.Module = plan.trained.model
        made = optimiser(
            self.config.optimizer,
            self.bare.parameters(),
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            rates=_rates(self.config, self.bare),
            device=accelerator.device.type,
        )
        self.schedule = scheduled(made, self.config.schedule, steps=plan.steps, warmup=self.config.warmup)
        self.sharing = spread(accelerator, self.bare, made)
        self.model = self.sharing.model

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def take(
        self, group: Sequence[dict[str, Any]], step: int, explodes: Callable[[float], bool] = lambda loss: False
    ) -> Taken:
        """One optimiser step over a group of micro-batches.

        Args:
            group: micro-batches with ``origins``, the names of their rows, and ``counts``: false for one that a
                process only goes along with.
            step: its number, counted from 1.
            explodes: whether a step of this mean loss must not be taken.

        Raises:
            TrainingError: a loss or the gradient is not finite, or the loss explodes; the weights are as before.
        """
        task = self.plan.task
        origins = [batch["origins"] for batch in group]
        counts = [batch["counts"] for batch in group]
        batches = [{key: value for key, value in batch.items() if key not in ("origins", "counts")} for batch in group]
        units = self._summed(sum(task.units(batch) for batch, it in zip(batches, counts, strict=True) if it))
        total = Tally()
        broken: tuple[float, list[str]] | None = None
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self.sharing.accumulating(last=last):
                result = task.loss(self.model, batch)
                if not counts[number]:
                    result = BatchLoss(result.total * 0, Tally())
                if broken is None and not math.isfinite(result.tally.loss):
                    broken = result.tally.loss, origins[number]
                # Processes average their gradients; the sum over all of them is wanted.
                loss = result.total * (self.accelerator.num_processes / units)
                more = penalty(self.bare.base_model) if last and isinstance(self.bare, PeftModel) else None
                self.sharing.backward(loss if more is None else loss + more)
            total += result.tally
        rows = [origin for names in origins for origin in names]
        loss_of_all = self._summed(total.loss)
        if not math.isfinite(loss_of_all):
            # Not before: the other processes would wait for ever for the gradients of one that has left.
            loss, names = next(found for found in self._of_all([broken]) if found is not None)
            self._refuse(f"The loss is {loss}", step, names)
        if units and explodes(loss_of_all / units):
            self._refuse(f"The loss has exploded to {loss_of_all / units:.4g}", step, self._of_all(rows))
        norm = self.sharing.step(self.config.clip)
        if not math.isfinite(norm):
            self._refuse(f"The gradient's norm is {norm}", step, self._of_all(rows))
        self.schedule.step()
        if self.config.method == "lora" and self.config.family == "adalora":
            self.bare.base_model.update_and_allocate(step)  # type: ignore[union-attr,operator]
        self.sharing.forget()
        read = self._summed(sum(tokens(batch) for batch in batches))
        return Taken(Tally(loss_of_all, int(units)), norm, int(read))

    def _refuse(self, what: str, step: int, origins: Sequence[str]) -> NoReturn:
        self.sharing.forget()
        kept = f" What was learned until step {step - 1} is kept." if step > 1 else ""
        raise TrainingError(
            f"{what} at step {step}, in the batch of {listed(origins)}; "
            f"look at these rows, or lower learning_rate ({self.config.learning_rate:g}).{kept}"
        )

    def _of_all(self, mine: list[Any]) -> list[Any]:
        """The items of all processes, in their order."""
        from accelerate.utils import gather_object

        return list(gather_object(mine))

    def _summed(self, count: float) -> float:
        """A number over all processes."""
        if self.accelerator.num_processes == 1:
            return count
        mine = torch.tensor(count, device=self.accelerator.device, dtype=torch.float64)
        total: Tensor = self.accelerator.reduce(mine, "sum")
        return float(total)


def _rates(config: RunConfig, model: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """The parameters with a learning rate of their own.

    Raises:
        ConfigError: one is asked for and there are none.
    """
    found = []
    if config.loraplus_lr_ratio is not None:
        factors = second_factors(model) if isinstance(model, PeftModel) else []
        if not factors:
            raise ConfigError(f"loraplus_lr_ratio has no meaning with family={config.family}: no B learns there.")
        found.append((factors, config.learning_rate * config.loraplus_lr_ratio))
    if config.head_learning_rate is not None:
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        heads = [p for path in head_paths(bare) for p in bare.get_submodule(path).parameters() if p.requires_grad]
        if not heads:
            raise ConfigError(
                f"head_learning_rate has no meaning on a {type(bare).__name__}: no head beside its body learns; leave "
                "it out."
            )
        found.append((heads, config.head_learning_rate))
    return found

"""AdaLoRA's budget: which singular values of which layers stay, decided from gradients while training.

An entry's importance is how much the loss is said to change without it, averaged over steps, times how uncertain
that is. The budget shrinks from every rank there is to ``target_r`` a layer on a cubic curve; what does not fit
in is set to zero, and may come back as long as the budget moves.

Zhang et al., arXiv 2303.10512, algorithm 1; the numbers are PEFT's. One thing is not: entries of equal importance
are told apart by their place, so that exactly as many stay as the budget says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from veneer.adapters.layer import AdaptedLayer
from veneer.core.adalora_config import AdaLoraConfig, E
from veneer.core.errors import ConfigError, UsageError
from veneer.variants.adalora import A, B

if TYPE_CHECKING:
    from veneer.adapters.adapted import AdaptedModel

_NOTHING = "There is no budget to move: no active adapter is an AdaLoRA adapter that learns."


@final
class RankBudget:
    """What is known about the importance of every entry of one adapter."""

    def __init__(self, name: str, config: AdaLoraConfig, layers: dict[str, AdaptedLayer]) -> None:
        self.name = name
        self.config = config
        # In the order of PEFT's names, which is what breaks ties there is none of in PEFT.
        self.layers = dict(sorted(layers.items()))
        self.start = sum(layer.tensors(name)[E].shape[0] for layer in layers.values())
        """The ranks there are."""
        self.target = config.target_r * len(layers)
        """The ranks that stay."""
        self.sensitivity: dict[tuple[str, str], Tensor] = {}
        self.uncertainty: dict[tuple[str, str], Tensor] = {}

    def averages(self) -> dict[str, dict[tuple[str, str], Tensor]]:
        """What is averaged over the steps, by kind: all that a checkpoint needs besides ``config.rank_pattern``."""
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    @property
    def device(self) -> torch.device:
        """Where the adapter's tensors are."""
        return next(iter(self.layers.values())).tensors(self.name)[E].device

    def at(self, step: int) -> tuple[int, bool]:
        """The ranks that the budget has after a step, and whether they are allocated anew then."""
        config = self.config
        assert config.total_step is not None
        last = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.start, False
        if step >= last:
            return self.target, step == last
        left = 1 - (step - config.tinit) / (last - config.tinit)
        return int((self.start - self.target) * left**3 + self.target), step % config.deltaT == 0

    def update(self, step: int) -> None:
        """Take in the gradients of one step, and allocate the budget when it is time to."""
        assert self.config.total_step is not None
        last = self.config.total_step - self.config.tfinal
        if step < last:
            self.observe()
        budget, now = self.at(step)
        if now:
            self.allocate(budget)
        if step == last:
            self.sensitivity.clear()
            self.uncertainty.clear()
        elif step > last:
            self.mask()

    @torch.no_grad()
    def observe(self) -> None:
        """Average in what the gradients say of every number: ``|p * dp|`` and how much that varies."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for path, layer in self.layers.items():
            for key, p in layer.tensors(self.name).items():
                now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
                place = path, key
                mean = self.sensitivity.get(place, 0) * beta1 + (1 - beta1) * now
                self.sensitivity[place] = mean
                self.uncertainty[place] = self.uncertainty.get(place, 0) * beta2 + (1 - beta2) * (now - mean).abs()

    def scores(self) -> dict[str, Tensor]:
        """The importance of every entry by layer: its own, and the mean of its two vectors."""
        found = {}
        for path in self.layers:
            own, right, left = (self.sensitivity[path, key] * self.uncertainty[path, key] for key in (E, A, B))
            found[path] = own.flatten() + (right.mean(1) + left.mean(0))
        return found

    @torch.no_grad()
    def allocate(self, budget: int) -> None:
        """Keep the most important entries, as many as the budget has, and set the others to zero."""
        scores = self.scores()
        out = self.start - budget
        least = torch.cat([score.float().cpu() for score in scores.values()]).sort(stable=True).indices[:out]
        kept = torch.ones(self.start, dtype=torch.bool)
        kept[least] = False
        each = torch.split(kept, [len(score) for score in scores.values()])
        self.config.rank_pattern = {f"{path}.{E}": mask.tolist() for path, mask in zip(scores, each, strict=True)}
        self.mask()

    @torch.no_grad()
    def mask(self) -> None:
        """Set to zero what the last allocation left out: the optimiser has moved it since."""
        for path, layer in self.layers.items():
            entries = layer.tensors(self.name)[E]
            kept = torch.tensor((self.config.rank_pattern or {})[f"{path}.{E}"], device=entries.device)
            # An adapter that was loaded holds only what had stayed.
            if len(kept) == len(entries):
                entries.masked_fill_(~kept.unsqueeze(1), 0.0)


def orthogonality(layers: dict[str, AdaptedLayer], name: str) -> Tensor:
    """How far P and Q are from orthogonal: the mean over all of them of ``|Q Q^T - 1|`` and ``|P^T P - 1|``."""
    terms = []
    for layer in layers.values():
        tensors = layer.tensors(name)
        for product in (tensors[A] @ tensors[A].t(), tensors[B].t() @ tensors[B]):
            terms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), out=torch.empty_like(product))))
    return torch.stack(terms).mean()


def penalty(adapted: AdaptedModel) -> Tensor | None:
    """What is added to the loss of a training step for AdaLoRA adapters that learn; None when there are none."""
    terms = [
        adapted.peft_config[name].orth_reg_weight * orthogonality(adapted.layers_of(name), name)  # type: ignore[attr-defined]
        for name in _learning(adapted)
    ]
    return sum(terms[1:], terms[0]) if terms else None


def update_and_allocate(adapted: AdaptedModel, step: int) -> None:
    """Move the budget of every AdaLoRA adapter that learns on by one step.

    Args:
        adapted: the model, with the gradients of the step still there.
        step: optimiser steps taken, this one included.

    Raises:
        UsageError: no active adapter is an AdaLoRA adapter that learns.
    """
    names = _learning(adapted)
    if not names:
        raise UsageError(_NOTHING)
    for name in names:
        config = adapted.peft_config[name]
        budget = adapted.budgets.get(name)
        if budget is None or budget.config is not config:
            budget = adapted.budgets[name] = RankBudget(name, config, adapted.layers_of(name))  # type: ignore[arg-type]
        budget.update(step)


def set_total_step(adapted: AdaptedModel, steps: int) -> None:
    """Tell AdaLoRA adapters that learn how many optimiser steps there will be.

    Raises:
        ConfigError: the schedule does not fit into so many.
    """
    for name in _learning(adapted):
        config = adapted.peft_config[name]
        config.total_step = steps  # type: ignore[attr-defined]
        config.__post_init__()


def check_total_step(adapted: AdaptedModel, steps: int) -> None:
    """Check that every AdaLoRA adapter that learns has a schedule of so many steps.

    Raises:
        UsageError: there is no such adapter.
        ConfigError: one has another schedule.
    """
    names = _learning(adapted)
    if not names:
        raise UsageError(_NOTHING)
    for name in names:
        planned = adapted.peft_config[name].total_step  # type: ignore[attr-defined]
        if planned != steps:
            raise ConfigError(
                f"total_step of {name!r} is {planned}, but this training takes {steps} optimiser steps; give "
                f"AdaLoraConfig total_step={steps}, so that the budget ends where it should."
            )


def _learning(adapted: AdaptedModel) -> list[str]:
    """The active AdaLoRA adapters that learn."""
    found = []
    for name in adapted.active_adapters:
        if isinstance(adapted.peft_config[name], AdaLoraConfig):
            layer = next(iter(adapted.layers_of(name).values()))
            found += [name] if layer.tensors(name)[E].requires_grad else []
    return found

"""What an adapter's start needs to know of the data, read from the training examples before the adapter is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.adapters.corda import preprocess_corda
from veneer.adapters.eva import get_eva_state_dict, with_directions
from veneer.adapters.lora_ga import preprocess_loraga
from veneer.core import registry
from veneer.core.config import LoraConfig, TunerConfig
from veneer.core.start_config import EvaConfig
from veneer.data.encode import Encoded
from veneer.tasks.task import AbstractTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 256
"""How many examples a start reads at most: the first ones of the training data."""

Gather = Callable[[nn.Module, TunerConfig], tuple[TunerConfig, tuple[str, ...]]]
"""Leaves evidence on a model, and gives the config to adapt it with and what was done, in sentences."""


def gathering(
    task: AbstractTask, examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Gather:
    """A function that gathers what the start of a config needs; one that needs nothing costs nothing.

    Args:
        task: how examples become batches, and batches a loss.
        examples: the training set.
        tokenizer: what it was encoded with.
        batch_size: examples that go through the model at once.
    """

    def gather(model: nn.Module, config: TunerConfig) -> tuple[TunerConfig, tuple[str, ...]]:
        if registry.load("inits", config.init).Init.evidence is None:
            return config, ()
        assert isinstance(config, LoraConfig)
        some = examples[:MOST]
        # Covariances are per call, so that there an example is a call of its own, without padding.
        size = 1 if config.init == "corda" else batch_size
        device = next(model.parameters()).device
        batches = [
            {key: value.to(device) for key, value in task.collate(some[at : at + size], tokenizer).items()}
            for at in range(0, len(some), size)
        ]
        read = f"init_lora_weights={config.init_lora_weights!r} read the first {len(some)} training examples"
        if config.init == "eva":
            config = _eva(model, config, task, batches)
            ranks = sorted(config.rank_pattern.values()) or [config.r]
            return config, (f"{read}; ranks go from {min(ranks[0], config.r)} to {max(ranks[-1], config.r)}.",)
        if config.init == "corda":
            preprocess_corda(model, config, run_model=lambda: [task.loss(model, batch) for batch in batches])
        else:
            preprocess_loraga(model, config, lambda: [_backward(model, task, batch) for batch in batches])
        return config, (f"{read}.",)

    return gather


def _backward(model: nn.Module, task: AbstractTask, batch: dict[str, Tensor]) -> None:
    (task.loss(model, batch).total / max(1, task.units(batch))).backward()  # type: ignore[no-untyped-call]


def _eva(model: nn.Module, config: LoraConfig, task: AbstractTask, batches: list[dict[str, Tensor]]) -> LoraConfig:
    options = config.eva_config
    assert isinstance(options, EvaConfig)

    def counted(batch: Mapping[str, Tensor], _: Any) -> Tensor | None:
        """(B, T): which tokens count; None where the batch has no tokens."""
        if "input_ids" not in batch:
            return None
        # Of choices, (B, C, T): a model goes through them as through so many rows.
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten(0, -2).bool()
        labels = batch.get("labels")
        if options.use_label_mask and labels is not None and labels.shape == mask.shape:
            mask = mask & (labels != options.label_mask_value)
        return mask

    def rows(x: Any, mask: Tensor | None, _: str) -> Tensor:
        # A decoder's or a pooled input has other places than the tokens.
        fits = mask is not None and x.shape[:-1] == mask.shape
        return x[mask] if fits else x.reshape(-1, x.shape[-1])

    directions = get_eva_state_dict(
        model,
        batches,
        config,
        forward_fn=lambda model, batch: task.loss(model, batch),
        prepare_model_inputs_fn=counted,
        prepare_layer_inputs_fn=rows,
        gather_distributed_inputs=False,
    )
    found = with_directions(model, config, directions)
    assert isinstance(found, LoraConfig)
    return found

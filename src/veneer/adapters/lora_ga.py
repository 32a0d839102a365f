"""What LoRA-GA starts from: the gradient of the loss with respect to each weight that is to be adapted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.evidence import bare, leave, read_cache, selected, total, write_cache
from veneer.adapters.index import view
from veneer.adapters.rebase import with_weight
from veneer.adapters.targets import Target
from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError, UsageError


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | None = None,
) -> None:
    """Estimate the gradients that ``init_lora_weights="lora_ga"`` needs; then call ``get_peft_model``.

    >>> config = LoraConfig(init_lora_weights="lora_ga", target_modules="all-linear")
    >>> preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
    >>> model = get_peft_model(model, config)

    Gradients are summed in float32 as each is made, and averaged over the backward passes: one more copy of the
    targeted weights is in memory. The model is in training mode meanwhile, as in PEFT.

    Args:
        model: the model to adapt, or one that has adapters, which are switched off meanwhile.
        lora_config: the adapter's config.
        train_step: runs forward and backward passes; it takes no optimiser step.
        cache_file: a safetensors file with the gradients: read when it exists, written otherwise.

    Raises:
        ConfigError: another start, or a target without a gradient of its own (a quantised one).
        UsageError: ``train_step`` does not reach a target, or the file is not what it should be.
    """
    targets = selected(model, lora_config, "lora_ga").targets
    for target in targets:
        if not view(target.slot).exact:
            raise ConfigError(
                f"init_lora_weights='lora_ga' needs the gradient of the weight, and {target.slot.path!r}, a "
                f"{type(target.slot.module).__name__}, is quantised; load the model in full precision for it."
            )
    paths = [target.slot.path for target in targets]
    found = read_cache(cache_file, paths) if cache_file else None
    if found is None:
        found = _gradients(model, targets, train_step)
        if cache_file:
            write_cache(cache_file, found)
    for target in targets:
        device, _ = view(target.slot).placement()
        leave(target, gradient=found[target.slot.path].to(device))


def _gradients(model: nn.Module, targets: tuple[Target, ...], train_step: Callable[[], object]) -> dict[str, Tensor]:
    """From the path of each target to its mean gradient as an (O, I) matrix in float32."""
    sums: dict[str, Tensor] = {}
    passes = {target.slot.path: 0 for target in targets}

    def collect(path: str) -> Any:
        def collected(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.detach().to(torch.float32)
            sums[path] = sums[path] + gradient if path in sums else gradient.clone()
            passes[path] += 1
            weight.grad = None

        return collected

    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    was_training = model.training
    handles = []
    try:
        with bare(model):
            model.requires_grad_(False)
            for target in targets:
                weight = target.slot.module._parameters[target.slot.leaf]
                assert weight is not None
                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(collect(target.slot.path)))  # type: ignore[no-untyped-call]
            model.train()
            with torch.enable_grad():
                train_step()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learned[name])
        model.train(was_training)
    unseen = [path for path, count in passes.items() if not count]
    if unseen:
        raise UsageError(
            f"train_step left no gradient on {unseen[0]!r}; it must run the model that is prepared and call backward()."
        )
    found = {}
    for target in targets:
        path = target.slot.path
        count = total(torch.tensor(float(passes[path]), device=sums[path].device))
        mean = total(sums[path]) / count
        # In the layout of the weight, read as a matrix by the base that knows it.
        shaped = with_weight(view(target.slot), view(target.slot).weight())
        shaped.module._parameters[target.slot.leaf] = nn.Parameter(mean, requires_grad=False)
        found[path] = shaped.weight().detach().clone()
    return found

"""What EVA starts from: the directions in which each layer's inputs vary most, and the ranks that follow from them.

Paischer et al., arXiv 2410.07170. Function names and arguments are PEFT's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.eva_search import LayerInputs, Search
from veneer.adapters.evidence import adapted_of, bare, leave, selected
from veneer.adapters.index import ModuleIndex, view
from veneer.adapters.inject import inject
from veneer.adapters.lifecycle import activate, remove
from veneer.adapters.plain import names_for, pattern
from veneer.adapters.targets import select
from veneer.core.config import LowRankConfig, PeftConfig
from veneer.core.errors import ConfigError, UsageError
from veneer.core.start_config import EvaConfig

PREFIX = "base_model.model."


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch that is a mapping of keyword arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: LowRankConfig) -> Tensor:
    """The (row, position) of every token of a batch that counts: no padding, and with use_label_mask only trained ones.

    Raises:
        UsageError: the batch is no mapping with ``input_ids``.
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise UsageError(
            "EVA's batches must be mappings with input_ids; for other models pass prepare_model_inputs_fn=None and "
            "prepare_layer_inputs_fn=None."
        )
    options = peft_config.eva_config
    assert isinstance(options, EvaConfig)
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    labels = model_input.get("labels")
    if options.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The inputs of a layer (B, T, D) at the tokens that count, as rows."""
    x: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x[model_input.T.unbind()]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: PeftConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The directions for each layer, as many as the rank that it gets; batches are repeated until they are found.

    Args:
        model: the model, adapted (its adapters are switched off meanwhile) or not.
        dataloader: batches, which can be gone through again and again.
        peft_config: the adapter's config; needed for a model without adapters.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: from a batch and the config to what ``prepare_layer_inputs_fn`` is given; None gives
            it the batch.
        prepare_layer_inputs_fn: from a layer's input, that, and the layer's name to the rows that count, for all layers
            or by name; None takes all rows.
        adapter_name: the adapter whose config counts.
        gather_distributed_inputs: in a distributed run, look at the rows of all processes.
        show_progress_bar: say on a terminal how many layers are done.

    Returns:
        (rank, inputs) by layer, under PEFT's names: with "base_model.model." before those of an adapted model.

    Raises:
        ConfigError: another start, or a target without rows of inputs.
        UsageError: no batches, or directions that do not settle.
    """
    adapted = adapted_of(model)
    if peft_config is None:
        if adapted is None:
            raise UsageError("get_eva_state_dict needs peft_config for a model without adapters.")
        adapted.require(adapter_name)
        peft_config = adapted.peft_config[adapter_name]
    selection = selected(model, peft_config, "eva")
    prefix = "" if adapted is None else PREFIX
    search = Search(selection, prefix, prepare_layer_inputs_fn, gather_distributed_inputs)
    was_training = model.training
    model.eval()
    try:
        with bare(model):
            search.run(
                dataloader,
                lambda batch: forward_fn(model, batch),
                lambda batch: prepare_model_inputs_fn(batch, selection.config) if prepare_model_inputs_fn else batch,
                progress=show_progress_bar and sys.stderr.isatty(),
            )
    finally:
        model.train(was_training)
    return search.result()


def with_directions(model: nn.Module, config: PeftConfig, eva_state_dict: Mapping[str, Tensor]) -> LowRankConfig:
    """Leave directions on a model's modules for the start, and say which config goes with them.

    Args:
        model: the model, adapted or not.
        config: the adapter's config.
        eva_state_dict: from ``get_eva_state_dict``.

    Returns:
        The config with the ranks that the layers got, without the layers that got none.

    Raises:
        ConfigError: directions are missing for a layer, or there are some for no layer.
    """
    selection = selected(model, config, "eva")
    assert isinstance(selection.config, LowRankConfig)
    assert isinstance(selection.config.eva_config, EvaConfig)
    given = {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()}
    targets = {target.slot.path: target for target in selection.targets}
    wrong = [path for path in [*given, *targets] if (path in given) != (path in targets)]
    if wrong:
        raise ConfigError(
            f"EVA's directions and the config do not go together: {wrong[0]!r} is in only one of them; gather the "
            "directions with the same config."
        )
    kept = {path: target for path, target in targets.items() if len(given[path])}
    ranks = {path: len(given[path]) for path in kept}
    alphas = {path: target.lora_alpha for path, target in kept.items()}
    if selection.config.eva_config.adjust_scaling_factors:
        variant = selection.variant
        for path, target in kept.items():
            # So that the scaling is what it was, for rsLoRA's root too.
            alphas[path] *= target.scaling / variant.scaling(ranks[path], target.lora_alpha, selection.config)
    names: dict[str, Any] = {}
    if len(kept) < len(targets):
        adapted = adapted_of(model)
        index = ModuleIndex(model) if adapted is None else adapted.index
        names["target_modules"], names["exclude_modules"] = names_for(index, kept)
    resolved = replace(
        selection.config,
        rank_pattern=pattern({path: r for path, r in ranks.items() if r != selection.config.r}, kept),
        alpha_pattern=pattern({path: a for path, a in alphas.items() if a != selection.config.alpha}, kept),
        **names,
    )
    for path, target in kept.items():
        device, _ = view(target.slot).placement()
        leave(target, directions=given[path].to(device))
    return resolved


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter that was made with ``init_lora_weights="eva"`` from the model's inputs on real data.

    >>> model = get_peft_model(model, LoraConfig(init_lora_weights="eva"), low_cpu_mem_usage=True)
    >>> initialize_lora_eva_weights(model, dataloader)

    The adapter is made anew, because layers get other ranks: make the optimiser afterwards. The config of the adapter
    then has the ranks, and leaves out layers that got none.

    Args:
        model: a PeftModel with one active adapter.
        dataloader: batches; not needed with ``eva_state_dict``.
        eva_state_dict: what ``get_eva_state_dict`` gave.
        forward_fn: see ``get_eva_state_dict``, as all that follow.
        prepare_model_inputs_fn: see there.
        prepare_layer_inputs_fn: see there.
        adapter_name: the adapter.
        gather_distributed_inputs: see there.
        show_progress_bar: see there.

    Raises:
        UsageError: no PeftModel, no such adapter, a merged one, several active ones, or neither data nor directions.
        ConfigError: see ``get_eva_state_dict``. The model is what it was.
    """
    adapted = adapted_of(model)
    if adapted is None:
        raise UsageError("initialize_lora_eva_weights needs a PeftModel; call get_peft_model(model, config) first.")
    adapted.require(adapter_name)
    if len(adapted.active_adapters) > 1:
        raise UsageError("initialize_lora_eva_weights works with one active adapter; call set_adapter with one name.")
    if any(layer.merged_adapters for layer in adapted.layers.values()):
        raise UsageError("An adapter is merged into the weights; call unmerge_adapter() first.")
    if eva_state_dict is None:
        if dataloader is None:
            raise UsageError("initialize_lora_eva_weights needs a dataloader, or the eva_state_dict made from one.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    config = with_directions(model, adapted.peft_config[adapter_name], eva_state_dict)
    _restart(model, adapter_name, config)


def _restart(model: nn.Module, name: str, config: LowRankConfig) -> None:
    """Make an adapter again with another config, as active and as trainable as it was, its dtype kept."""
    adapted = adapted_of(model)
    assert adapted is not None
    selection = select(adapted.index, config)
    dtypes = {tensor.dtype for layer in adapted.layers_of(name).values() for tensor in layer.tensors(name).values()}
    learns = any(p.requires_grad for layer in adapted.layers_of(name).values() for p in layer.tensors(name).values())
    active = list(adapted.active_adapters)
    remove(adapted, name)
    inject(adapted, name, config, selection=selection, autocast_adapter_dtype=torch.float32 in dtypes)
    if active:
        activate(adapted, active, trainable=learns)

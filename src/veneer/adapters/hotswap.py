"""Put another adapter's values into the place of one that is loaded, so that a compiled model is not compiled again.

A compiled model depends on the shapes of the tensors that it reads and on every plain number. So the place is made
ready before compiling: its factors get room for the largest rank to come, filled with zeros, its scaling becomes a
tensor, and layers that only a later adapter is on get factors that are zero. Swapping then only writes values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.files import AdapterFiles, Fitted, fit, read, warn_of_other_base
from veneer.adapters.injected import adapted_of
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.plain import pattern
from veneer.adapters.rebase import STANDING
from veneer.adapters.targets import select
from veneer.core import registry
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import UsageError, listed
from veneer.core.lora_variant import BIAS


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
    target_modules: Sequence[str] | None = None,
) -> None:
    """Make the adapters of a model ready to be swapped without compiling it again. Call it before ``torch.compile``.

    >>> prepare_model_for_compiled_hotswap(model, target_rank=64)
    >>> model = torch.compile(model)
    >>> hotswap_adapter(model, "path/to/another", "default")

    What an adapter computes does not change, nor does what is saved of it but for zeros: its configs say the new rank,
    with the alpha that keeps the scaling.

    Args:
        model: an adapted model that is not compiled.
        target_rank: the largest rank that will be swapped in; without it, ranks stay and only smaller ones fit.
        config: configs of yours that are to say the new rank too, as in PEFT. Those of the model always do.
        check_compiled: what to do about a model that is compiled already.
        target_modules: modules beside those of the adapters that later adapters are on (PEFT has no such option).

    Raises:
        UsageError: no adapter, one that is merged or whose update is no plain product of factors, a rank above
            ``target_rank``, or a compiled model.
    """
    adapted = adapted_of(model)
    _check_not_compiled(model, check_compiled)
    _check_ranks(adapted, target_rank)
    if target_modules:
        for name in adapted.peft_config:
            _widen(adapted, name, target_modules)
    for layer in adapted.layers.values():
        for name in layer.specs:
            if target_rank is not None:
                _pad(layer, name, target_rank)
            if name not in layer.live_scaling:
                layer.live_scaling[name] = torch.tensor(layer.scaling[name], device=layer.base.placement()[0])
    for name in adapted.peft_config:
        _describe(adapted, name)
    given = [] if config is None else [config] if isinstance(config, PeftConfig) else list(config.values())
    for each in given:
        if isinstance(each, LoraConfig) and target_rank is not None:
            factor = target_rank / each.r
            each.lora_alpha = each.lora_alpha * (factor**0.5 if each.use_rslora else factor)
            each.r, each.rank_pattern = target_rank, {}


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **where: Any,
) -> None:
    """Load an adapter's values into the place of one that is there; the parameters stay the same objects.

    Its rank may be smaller than the place has room for, and it may be on fewer layers: what is left over is zero.

    Args:
        model: an adapted model, compiled or not.
        model_name_or_path: an adapter folder, or a hub name when online.
        adapter_name: the adapter whose place it takes.
        torch_device: accepted as PEFT's option; tensors go where the layer they belong to is.
        where: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

    Raises:
        UsageError: no adapter of that name, one that is merged, or a place in which the new one has no room.
        AdapterFileError: broken files, or files that do not fit the model. The model is what it was.
    """
    adapted = adapted_of(model)
    adapted.require(adapter_name)
    _check_slot(adapted, adapter_name)
    files = read(model_name_or_path, **where)
    fitted = fit(adapted, files)
    warn_of_other_base(adapted, files, fitted)
    plan = list(_plan(adapted, adapter_name, files, fitted))
    with torch.no_grad():
        for now, new in plan:
            if now.shape != new.shape:
                now.zero_()
            now[tuple(slice(size) for size in new.shape)].copy_(new)
        _zero_rest(adapted, adapter_name, fitted)
    for target in fitted.selection.targets:
        adapted.layers[target.slot.path].set_scaling(adapter_name, target.scaling)
    for layer in adapted.layers_of(adapter_name).values():
        layer.lora_dropout[adapter_name] = fitted.selection.config.dropout
    _describe(adapted, adapter_name)


def _plan(adapted: AdaptedModel, name: str, files: AdapterFiles, fitted: Fitted) -> Iterator[tuple[Tensor, Tensor]]:
    """(tensor in the model, new tensor) for everything that is in the file, all checked."""
    if fitted.embeddings:
        raise UsageError(
            f"{files.source} brings its own {listed(fitted.embeddings)}, which all adapters share; load it with "
            "load_adapter instead."
        )
    here, init = adapted.layers_of(name), registry.load("inits", fitted.selection.config.init).Init
    missing = [target.slot.path for target in fitted.selection.targets if target.slot.path not in here]
    if missing:
        raise UsageError(
            f"{files.source} is on {listed(missing, most=3)}, where {name!r} is not; prepare the model with such "
            "modules in target_modules, or load it under a name of its own."
        )
    for target in fitted.selection.targets:
        path, layer = target.slot.path, here[target.slot.path]
        more = set(fitted.factors[path]) - set(layer.specs[name])
        if more or fitted.selection.variant.options or init.moves:
            raise UsageError(
                f"{files.source} is of another kind than {name!r} on {path!r}, whose tensors are "
                f"{listed(sorted(layer.specs[name]))}; load it under a name of its own."
            )
        tensors = layer.tensors(name)
        for key, new in fitted.factors[path].items():
            if len(new.shape) != tensors[key].ndim or any(
                a > b for a, b in zip(new.shape, tensors[key].shape, strict=True)
            ):
                raise UsageError(
                    f"{files.source} has rank {target.r} on {path!r}, where {name!r} has room for {layer.r[name]}; "
                    f"call prepare_model_for_compiled_hotswap(model, target_rank={target.r}) before, or load it under "
                    "a name of its own."
                )
            yield tensors[key], new
    whole = {path: wrapper.modules_to_save[name].state_dict() for path, wrapper in adapted.saved_of(name).items()}
    biases = adapted.biases.values(name) if name in adapted.biases.trained else {}
    same = set(whole) == set(fitted.whole) and set(biases) == set(fitted.biases)
    if not same or fitted.selection.tokens or adapted.tokens.of(name):
        raise UsageError(
            f"{files.source} trains other whole modules, biases or embedding rows than {name!r}; load it under a name "
            "of its own."
        )
    for path, keyed in fitted.whole.items():
        yield from ((whole[path][key], new) for key, new in keyed.items())
    yield from ((biases[key], new) for key, new in fitted.biases.items())


def _zero_rest(adapted: AdaptedModel, name: str, fitted: Fitted) -> None:
    """Whatever the new adapter does not have does nothing."""
    for path, layer in adapted.layers_of(name).items():
        given = fitted.factors.get(path, {})
        for key, tensor in layer.tensors(name).items():
            if key not in given:
                tensor.zero_()


def _check_slot(adapted: AdaptedModel, name: str) -> None:
    """Refuse an adapter whose values cannot simply be exchanged."""
    layers = adapted.layers_of(name).values()
    if any(name in layer.merged_adapters for layer in layers):
        raise UsageError(f"{name!r} is merged into the weights; call unmerge_adapter() before swapping it.")
    config = adapted.peft_config[name]
    plain = isinstance(config, LoraConfig) and all(set(layer.specs[name]) <= _PLAIN for layer in layers)
    if not plain:
        raise UsageError(
            f"{name!r} cannot be swapped: only plain LoRA can, and it keeps more than two factors on a layer; load the "
            "other adapter under a name of its own."
        )


_PLAIN = frozenset(
    {
        *(f"lora_{factor}.weight" for factor in "AB"),
        *(f"lora_embedding_{factor}" for factor in "AB"),
        *(f"initial_{factor}.weight" for factor in "AB"),
        *(f"initial_embedding_{factor}" for factor in "AB"),
        BIAS,
    }
)


def _check_ranks(adapted: AdaptedModel, target_rank: int | None) -> None:
    """Refuse adapters that cannot be given this rank."""
    if not adapted.peft_config:
        raise UsageError("This model has no adapter to prepare; load the first one before preparing its place.")
    for name in adapted.peft_config:
        _check_slot(adapted, name)
    for path, layer in adapted.layers.items():
        for name in layer.specs:
            if target_rank is not None and layer.r[name] > target_rank:
                raise UsageError(
                    f"{name!r} has rank {layer.r[name]} on {path!r}, above target_rank={target_rank}; choose the "
                    "largest rank of all adapters to come."
                )
            if target_rank is not None:
                _check_paddable(path, layer, name)


def _check_paddable(path: str, layer: AdaptedLayer, name: str) -> None:
    base, tensors, r = layer.base, layer.tensors(name), layer.r[name]
    O, I = base.shape()  # noqa: E741 - outputs and inputs
    A, B = (tensors[key] for key in base.factor_names)
    if STANDING in tensors or A.numel() != r * I or B.numel() != O * r:
        raise UsageError(f"{name!r} on {path!r} is no single pair of factors, so it cannot be given another rank.")


def _pad(layer: AdaptedLayer, name: str, rank: int) -> None:
    """Factors of a larger rank with the same product."""
    shapes = dict(zip(layer.base.factor_names, layer.base.factor_shapes(rank), strict=True))
    for key, tensor in layer.tensors(name).items():
        shape = shapes.get(key.replace("initial_", "lora_", 1))
        if shape is not None and shape != tuple(tensor.shape):
            padded = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            padded[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
            layer.put(name, key, nn.Parameter(padded, requires_grad=tensor.requires_grad))
    layer.r[name] = rank


def _widen(adapted: AdaptedModel, name: str, target_modules: Sequence[str]) -> None:
    """Put an adapter on more layers, where its factors are zero."""
    own = adapted.peft_config[name]
    assert isinstance(own, LoraConfig)
    here = adapted.layers_of(name)
    nowhere_else: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    config = replace(own, target_modules=sorted({*here, *target_modules}), rank_pattern={}, **nowhere_else)
    selection = select(adapted.index, replace(config, alpha_pattern={}))
    adapted.refuse_overlap([target.slot.path for target in selection.targets], [])
    for target in selection.targets:
        path = target.slot.path
        if path in here:
            continue
        layer = adapted.layers.get(path) or AdaptedLayer(target.slot.module, target.kind, target.slot.leaf)
        device, _ = layer.base.placement()
        some = next(iter(here.values())).tensors(name)
        dtype = next(iter(some.values())).dtype
        zeros = {key: torch.zeros(spec.shape, dtype=dtype, device=device) for key, spec in target.specs.items()}
        numbers = {"r": target.r, "lora_alpha": target.lora_alpha, "scaling": target.scaling}
        layer.attach(name, selection.variant, target.specs, zeros, dropout=config.dropout, **numbers)  # type: ignore[arg-type]
        layer.router = adapted.router
        if path not in adapted.layers:
            adapted.layers[path] = layer
            adapted.hang(path, layer)
        if name in adapted.active_adapters:
            layer.active_adapters = [active for active in adapted.active_adapters if active in layer.specs]
            learns = any(parameter.requires_grad for parameter in some.values())
            for key, parameter in layer.tensors(name).items():
                parameter.requires_grad_(learns and target.specs[key].trainable)
            layer.refresh()
    adapted.peft_config[name] = selection.config
    adapted.reports[name] = selection.report


def _describe(adapted: AdaptedModel, name: str) -> None:
    """Let an adapter's config and report say the ranks and alphas that its layers have."""
    config, layers = adapted.peft_config[name], adapted.layers_of(name)
    assert isinstance(config, LoraConfig)
    ranks = {path: layer.r[name] for path, layer in layers.items()}
    alphas = {
        path: layer.scaling[name] * (r**0.5 if config.use_rslora else r)
        for (path, layer), r in zip(layers.items(), ranks.values(), strict=True)
    }
    r, alpha = max(ranks.values()), max(alphas.values())
    for path, layer in layers.items():
        layer.lora_alpha[name] = alphas[path]
    adapted.peft_config[name] = replace(
        config,
        r=r,
        lora_alpha=alpha,
        lora_dropout=next(iter(layers.values())).lora_dropout[name],
        rank_pattern=pattern({path: value for path, value in ranks.items() if value != r}, ranks),
        alpha_pattern=pattern({path: value for path, value in alphas.items() if value != alpha}, alphas),
    )
    report = adapted.reports[name]
    adapted.reports[name] = replace(
        report,
        targets=tuple(
            replace(
                target,
                r=ranks[target.path],
                lora_alpha=alphas[target.path],
                scaling=layers[target.path].scaling[name],
                parameters=sum(
                    tensor.numel()
                    for key, tensor in layers[target.path].tensors(name).items()
                    if layers[target.path].specs[name][key].trainable
                ),
            )
            for target in report.targets
        ),
    )


def _check_not_compiled(model: nn.Module, check: str) -> None:
    if check not in ("error", "warn", "ignore"):
        raise UsageError(f"check_compiled must be 'error', 'warn' or 'ignore', not {check!r}.")
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)) or check == "ignore":
        return
    message = (
        "This model is compiled already, and preparing it makes it compile again; prepare it before torch.compile."
    )
    if check == "error":
        raise UsageError(message)
    warnings.warn(message, stacklevel=3)

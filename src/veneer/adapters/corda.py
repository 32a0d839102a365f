"""What CorDA starts from: the covariance of each layer's inputs, and W split by it.

Shape legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.adapters.evidence import Latest, bare, leave, read_cache, selected, total, watching, write_cache
from veneer.adapters.index import view
from veneer.adapters.targets import Target
from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError, UsageError
from veneer.core.start_config import CordaConfig
from veneer.inits.corda import split


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Read what ``init_lora_weights="corda"`` needs from the model at work; then call ``get_peft_model``.

    >>> config = LoraConfig(init_lora_weights="corda", target_modules="all-linear")
    >>> preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches])
    >>> model = get_peft_model(model, config)

    One (I, I) covariance per layer is in memory until its layer is done. Inputs of one call are divided by their
    largest value, and covariances are averaged over calls, as in PEFT; a call may hold several sequences.

    Args:
        model: the model to adapt, or one that has adapters, which are switched off meanwhile.
        lora_config: the adapter's config; its ``corda_config`` says how.
        run_model: runs the model on sample data; not needed when a cache or covariance file is there.
        hooked_model: the model that ``run_model`` runs, when it is not ``model``; with the same module names.

    Raises:
        ConfigError: another start, or a target that is no linear layer.
        UsageError: ``run_model`` is missing or does not reach a target, or a file is not what it should be.
    """
    targets = selected(model, lora_config, "corda").targets
    options = lora_config.corda_config
    assert isinstance(options, CordaConfig)
    for target in targets:
        if not view(target.slot).linear_layer:
            raise ConfigError(
                f"init_lora_weights='corda' needs linear layers, and {target.slot.path!r} is a "
                f"{type(target.slot.module).__name__}; take it out of target_modules."
            )
    keys = {t.slot.path: [f"{t.slot.path}.eigens.{part}" for part in ("U_WC", "S_WC", "V_WC")] for t in targets}
    kept = (
        read_cache(options.cache_file, [key for each in keys.values() for key in each]) if options.cache_file else None
    )
    if kept is None:
        kept = {}
        covariances = _covariances(model, targets, options, run_model, hooked_model)
        for number, target in enumerate(targets, 1):
            path, W = target.slot.path, view(target.slot).weight()
            C = covariances.pop(path).to(W.device, torch.float32)
            kept |= zip(keys[path], split(W.to(torch.float32), C, target.r, method=options.corda_method), strict=True)
            if options.verbose:
                print(f"CorDA: {number} of {len(targets)} layers split", flush=True)
        if options.cache_file:
            write_cache(options.cache_file, kept)
    for target in targets:
        device, _ = view(target.slot).placement()
        U, S, V = (kept[key].to(device) for key in keys[target.slot.path])
        leave(target, U=U, S=S, V=V)


def _covariances(
    model: nn.Module,
    targets: tuple[Target, ...],
    options: CordaConfig,
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """From the path of each target to the mean (I, I) covariance of its inputs."""
    paths = [target.slot.path for target in targets]
    kept = read_cache(options.covariance_file, paths) if options.covariance_file else None
    if kept is not None:
        return kept
    if run_model is None:
        raise UsageError("preprocess_corda needs run_model, a function that runs the model on sample data.")
    run_on = model if hooked_model is None else hooked_model
    modules = {t.slot.path: t.slot.module if run_on is model else run_on.get_submodule(t.slot.path) for t in targets}
    sums: dict[str, Tensor] = {}
    calls = dict.fromkeys(paths, 0)
    latest, covariance_II = Latest(), torch.empty(0)

    def see(path: str, x: Tensor) -> None:
        nonlocal covariance_II
        if not latest.again(x):
            x_NI = x.detach().reshape(-1, x.shape[-1])
            x_NI = x_NI if options.use_float16_for_covariance else x_NI.float()
            x_NI = x_NI / x_NI.max().abs()
            covariance_II = x_NI.t() @ x_NI
        if not covariance_II.isfinite().all():
            raise UsageError(f"The inputs of {path!r} are not finite, or all zero; check the data and the model.")
        sums[path] = sums[path] + covariance_II if path in sums else covariance_II.clone()
        calls[path] += 1

    was_training = run_on.training
    run_on.eval()
    try:
        with bare(run_on), watching(modules, see):
            run_model()
    finally:
        run_on.train(was_training)
    unseen = [path for path in paths if not calls[path]]
    if unseen:
        raise UsageError(f"run_model did not call {unseen[0]!r}; it must run the model that is prepared.")
    counts = {path: float(total(torch.tensor(float(calls[path]), device=sums[path].device))) for path in paths}
    found = {path: total(sums[path]) / counts[path] for path in paths}
    if options.covariance_file:
        write_cache(options.covariance_file, found)
    return found

"""Optimisers made for low-rank adapters, under PEFT's names: LoRA+ and LoRA-FA.

>>> from veneer.optimizers import create_loraplus_optimizer
>>> optimiser = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16)

Shape legend: O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.model import PeftModel
from veneer.core.config import LowRankConfig, positive
from veneer.core.errors import ConfigError, UsageError

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]

O = TypeVar("O", bound=Optimizer)  # noqa: E741 - only a type here


def second_factors(model: PeftModel) -> list[nn.Parameter]:
    """The B that learn, of layers where B is the factor that starts at zero: all but embeddings."""
    return [
        parameter
        for layer in _layers(model, embeddings=False)
        for name in layer.specs
        for key, parameter in layer.tensors(name).items()
        if key.startswith("lora_B") and parameter.ndim > 1 and parameter.requires_grad
    ]


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[O], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> O:
    """LoRA+: B learns faster than A (Hayou et al., arXiv 2402.12354).

    Args:
        model: the adapted model; what does not learn is left out.
        optimizer_cls: e.g. ``torch.optim.AdamW``.
        lr: the learning rate of A and of everything that is not named here.
        loraplus_lr_ratio: how many times as fast B and all vectors learn; the paper suggests 16.
        kwargs: ``loraplus_weight_decay`` (0.0; biases and norms do not decay) and ``loraplus_lr_embedding`` (1e-6, the
            learning rate of both factors of adapted embeddings); anything else goes to ``optimizer_cls``.

    Raises:
        ConfigError: a ratio or rate that is no number above 0.
        UsageError: the model has no B that learns.
    """
    decay, of_embeddings = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio), ("loraplus_lr_embedding", of_embeddings)):
        positive(name, value)
    fast, plain = {id(parameter) for parameter in second_factors(model)}, _without_decay(model)
    if not fast:
        raise UsageError("LoRA+ has nothing to do: this model has no lora_B that learns.")
    embedded = {id(p) for layer in _layers(model, embeddings=True) for name in layer.specs for p in _own(layer, name)}
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "no decay": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embedded:
            kind = "embedding"
        elif id(parameter) in fast or parameter.ndim == 1:
            kind = "no decay" if id(parameter) in plain else "B"
        else:
            kind = "A"
        groups[kind].append(parameter)
    rates = {"A": lr, "embedding": of_embeddings, "B": lr * loraplus_lr_ratio, "no decay": lr * loraplus_lr_ratio}
    # PEFT's four groups in PEFT's order, also the empty ones: a saved optimiser state goes by their numbers.
    listed = [
        {"params": parameters, "weight_decay": 0.0 if kind == "no decay" else decay, "lr": rates[kind]}
        for kind, parameters in groups.items()
    ]
    return optimizer_cls(listed, lr=lr, **kwargs)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA: A is frozen here, and B's gradient is projected to stand for that of the whole update.

    Zhang et al., arXiv 2308.03303, with AdamW's moments of the projected gradient.

    Args:
        model: the adapted model; its A stop learning, so that training keeps their few outputs and not their input.
        r: the rank, as in the config.
        lora_alpha: the alpha, as in the config.
        lr: the learning rate.
        weight_decay: decoupled weight decay.
        use_rslora: as in the config, or None.

    Raises:
        ConfigError: a number that is not that of the active adapters' config.
        UsageError: an adapted embedding, whose A starts at zero, or no adapter to train.
    """
    given = {"r": r, "lora_alpha": lora_alpha} | ({} if use_rslora is None else {"use_rslora": use_rslora})
    for name in model.active_adapters:
        config = model.peft_config[name]
        if not isinstance(config, LowRankConfig):
            raise UsageError(f"LoRA-FA is for LoRA adapters; {name!r} is of type {config.peft_type}.")
        for field, value in given.items():
            if getattr(config, field) != value:
                raise ConfigError(f"{field}={value!r} is not what {name!r} has, which is {getattr(config, field)!r}.")
    if any(name in layer.specs for layer in _layers(model, embeddings=True) for name in model.active_adapters):
        raise UsageError(
            "LoRA-FA freezes A, which starts at zero on an embedding; leave embeddings out of the adapter."
        )
    partners = {}
    for layer in _layers(model, embeddings=False):
        for name in model.active_adapters:
            if name in layer.specs:
                tensors = layer.tensors(name)
                A, B = (tensors[key] for key in layer.base.factor_names)
                A.requires_grad_(False)
                partners[B] = (A, layer.scaling[name])
    if not partners:
        raise UsageError("LoRA-FA has nothing to train: no active adapter.")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _LoraFA(learning, partners, lr=lr, weight_decay=weight_decay)


@final
class _LoraFA(Optimizer):
    """AdamW on gradients of which those of B are projected: ``dB (A A^T)^-1 / s^2``."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        partners: dict[nn.Parameter, tuple[Tensor, float]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.partners = partners

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, self._gradient(parameter), group)
        return loss

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        if parameter not in self.partners:
            return parameter.grad
        A, scaling = self.partners[parameter]
        A_RI, g_OR = A.flatten(1), parameter.grad.flatten(1)
        AA_RR = A_RI @ A_RI.t()
        inverse = torch.linalg.pinv(AA_RR + 1e-8 * torch.eye(len(AA_RR), device=A.device, dtype=A.dtype))
        return (g_OR @ inverse / scaling**2).view_as(parameter)

    def _move(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] * correction)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def _layers(model: PeftModel, *, embeddings: bool) -> Iterator[AdaptedLayer]:
    """The adapted layers: embeddings alone, or all others."""
    for layer in model.base_model.layers.values():
        if (layer.base.zero_factor == "A") == embeddings:
            yield layer


def _own(layer: AdaptedLayer, name: str) -> list[nn.Parameter]:
    return list(layer.tensors(name).values())


def _without_decay(model: nn.Module) -> set[int]:
    """The parameters that do not decay: biases, and everything of a LayerNorm."""
    found = {id(p) for name, p in model.named_parameters() if "bias" in name}
    return found | {
        id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()
    }

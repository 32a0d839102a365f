"""The wrapper around one adapted module: it holds every adapter's tensors, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.base import AbstractBase
from veneer.core.variant import AbstractVariant, ParameterSpec


@final
class AdaptedLayer(nn.Module):
    """A frozen module and the adapters on it.

    As in PEFT, ``base_layer`` is the module, ``lora_A[name].weight`` and ``lora_B[name].weight`` are an
    adapter's factors, and ``r[name]``, ``lora_alpha[name]``, ``scaling[name]`` its numbers. Every attribute
    of the module (``weight``, ``in_features``, ...) is reachable through the wrapper.
    """

    base_layer: nn.Module
    kind: str
    base_class: type[AbstractBase]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_dropout: dict[str, float]
    variants: dict[str, AbstractVariant]
    specs: dict[str, dict[str, ParameterSpec]]
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    live: tuple[str, ...]
    unmerged: tuple[nn.Parameter, nn.Parameter | None] | None

    def __init__(self, base_layer: nn.Module, kind: str) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        # As in ``attach``, not by assignment: there are hundreds of these layers in a model.
        self.__dict__.update(
            kind=kind,
            # Looked up once: a compiler that traces the forward cannot follow the registry.
            base_class=registry.load("bases", kind).Base,
            r={},
            lora_alpha={},
            scaling={},
            lora_dropout={},
            variants={},
            specs={},
            active_adapters=[],
            merged_adapters=[],
            disable_adapters=False,
            live=(),
            unmerged=None,
            training=base_layer.training,
        )

    @property
    def base(self) -> AbstractBase:
        """The view on where W lives."""
        module = self._modules["base_layer"]
        assert module is not None
        return self.base_class(module)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the weight."""
        return bool(self.merged_adapters)

    def get_base_layer(self) -> nn.Module:
        """The frozen module (PEFT's name for ``base_layer``)."""
        return self.base_layer

    def attach(
        self,
        name: str,
        variant: AbstractVariant,
        specs: dict[str, ParameterSpec],
        tensors: Mapping[str, Tensor],
        *,
        r: int,
        lora_alpha: float,
        scaling: float,
        dropout: float,
    ) -> None:
        """Take in an adapter's tensors, keyed as on disk. It is not active yet."""
        # Straight into torch's dictionaries: its assignment first looks for a clash in every place that an
        # attribute may be, which would be most of the time that adapting a model takes.
        for key, tensor in tensors.items():
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            container, _, leaf = key.partition(".")
            held: Any = self._modules.get(container)
            if held is None:
                held = self._modules[container] = nn.ModuleDict() if leaf else nn.ParameterDict()
            if not leaf:
                held[name] = parameter
                continue
            if name not in held._modules:
                held._modules[name] = _holder(specs[f"{container}.weight"].shape)
            held._modules[name]._parameters[leaf] = parameter
        self.variants[name], self.specs[name] = variant, specs
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling
        self.lora_dropout[name] = dropout

    def materialise(self, name: str) -> None:
        """Give an adapter that was made on the meta device memory beside the base's weight, not yet filled."""
        device = self.base.weight().device
        for key, parameter in self.tensors(name).items():
            if parameter.is_meta:
                container, _, leaf = key.partition(".")
                here = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
                held: Any = self._modules[container]
                if leaf:
                    setattr(held[name], leaf, here)
                else:
                    held[name] = here

    def detach(self, name: str) -> None:
        """Forget an adapter. Absent names are fine, so that a half-done attach can be undone."""
        for container, held in list(self._modules.items()):
            if isinstance(held, nn.ModuleDict | nn.ParameterDict) and name in held:
                del held[name]
                if not len(held):
                    del self._modules[container]
        per_adapter: tuple[dict[str, Any], ...] = (
            self.variants,
            self.specs,
            self.r,
            self.lora_alpha,
            self.scaling,
            self.lora_dropout,
        )
        for numbers in per_adapter:
            numbers.pop(name, None)
        self.active_adapters = [active for active in self.active_adapters if active != name]
        self.refresh()

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors, keyed as on disk."""
        found: dict[str, nn.Parameter] = {}
        for key in self.specs[name]:
            container, _, leaf = key.partition(".")
            held = self._modules[container]
            found[key] = held._modules[name]._parameters[leaf] if leaf else held[name]  # type: ignore[union-attr,index,assignment]
        return found

    def refresh(self) -> None:
        """Settle which adapters the forward adds: active, enabled, on this layer, and not merged."""
        if self.disable_adapters:
            self.live = ()
        else:
            self.live = tuple(
                name for name in self.active_adapters if name in self.specs and name not in self.merged_adapters
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor | None = None
        for name in self.live:
            y = self.variants[name].forward(
                self.base,
                self.tensors(name),
                x,
                y,
                scaling=self.scaling[name],
                dropout=self.lora_dropout[name] if self.training else 0.0,
            )
        if y is None:
            y = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name.startswith("__"):
                raise
            return getattr(base_layer, name)

    def extra_repr(self) -> str:
        return f"{self.kind}, " + ", ".join(
            f"{name}: r={self.r[name]} alpha={self.lora_alpha[name]:g}"
            + (" merged" if name in self.merged_adapters else "" if name in self.active_adapters else " inactive")
            for name in self.specs
        )


def _holder(shape: tuple[int, ...]) -> nn.Module:
    """The Linear that carries ``weight`` (and ``bias``), made without a start of its own: its tensors follow."""
    holder = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(holder)
    holder.out_features, holder.in_features = shape
    holder._parameters.update(weight=None, bias=None)
    return holder

"""The wrapper around one adapted module: it holds every adapter's tensors, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.adapters.holder import holder_for
from veneer.adapters.rebase import standing, standing_weight
from veneer.adapters.routing import Router
from veneer.core import registry
from veneer.core.base import AbstractBase, InputBase, WeightBase, call_with, merge_dtype
from veneer.core.lora_variant import BIAS
from veneer.core.parametrised import Holder, shell
from veneer.core.variant import AbstractVariant, ParameterSpec

_ALONE = Router()
"""The router of a layer that stands in no model yet; never used."""


@final
class AdaptedLayer(nn.Module):
    """A frozen module and the adapters on it.

    As in PEFT, ``base_layer`` is the module, ``lora_A[name].weight`` and ``lora_B[name].weight`` are an
    adapter's factors, and ``r[name]``, ``lora_alpha[name]``, ``scaling[name]`` its numbers. Every attribute
    of the module (``weight``, ``in_features``, ...) is reachable through the wrapper.
    """

    base_layer: nn.Module
    kind: str
    leaf: str
    read: bool
    base_class: type[AbstractBase]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    live_scaling: dict[str, Tensor]
    lora_dropout: dict[str, float]
    variants: dict[str, AbstractVariant]
    specs: dict[str, dict[str, ParameterSpec]]
    shared: dict[str, SharedTensors]
    active_adapters: list[str]
    merged_adapters: list[str]
    disable_adapters: bool
    live: tuple[str, ...]
    unmerged: dict[str, Holder | None] | None
    aside: nn.Module | None
    router: Router

    def __init__(self, base_layer: nn.Module, kind: str, leaf: str = "weight", *, read: bool = False) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        # As in ``attach``, not by assignment: there are hundreds of these layers in a model.
        self.__dict__.update(
            kind=kind,
            leaf=leaf,
            read=read,
            # Looked up once: a compiler that traces the forward cannot follow the registry.
            base_class=registry.load("bases", kind).Base,
            r={},
            lora_alpha={},
            scaling={},
            live_scaling={},
            lora_dropout={},
            variants={},
            specs={},
            shared={},
            active_adapters=[],
            merged_adapters=[],
            disable_adapters=False,
            live=(),
            unmerged=None,
            aside=None,
            router=_ALONE,
            training=base_layer.training,
        )

    @property
    def base(self) -> AbstractBase:
        """The view on where W lives."""
        return self.base_class(self.get_base_layer(), self.leaf)

    @property
    def original(self) -> AbstractBase:
        """The view on the weight as it is without any merged adapter."""
        if self.aside is not None:
            first: AbstractBase = registry.load("bases", self.kind).Base(self.aside, self.leaf)
            return first
        if self.unmerged is None:
            return self.base
        return self.base_class(shell(self.get_base_layer(), self.unmerged), self.leaf)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the weight."""
        return bool(self.merged_adapters)

    def stand_in(self, module: nn.Module, base_class: type[AbstractBase]) -> None:
        """Put a module in the place of the frozen one, which is a quantised layer and is kept as it is."""
        # Not as a submodule: it is not part of the model for now.
        self.__dict__["aside"] = self.aside or self.base_layer
        module.train(self.base_layer.training)
        self._modules["base_layer"] = module
        self.base_class = base_class

    def keep_stand_in(self) -> None:
        """Let go of the quantised layer: what stands in for it stays."""
        self.__dict__["aside"] = None

    def give_back(self) -> None:
        """Put the quantised layer back that others stood in for."""
        if self.aside is not None:
            # The model may have been moved in the meantime, which did not reach the layer that was put aside.
            device, _ = self.base.placement()
            self._modules["base_layer"] = self.aside.to(device).train(self.base_layer.training)
            self.base_class = registry.load("bases", self.kind).Base
            self.__dict__["aside"] = None

    def get_base_layer(self) -> nn.Module:
        """The frozen module (PEFT's name): ``base_layer``, or what stands behind further wrappers there."""
        module: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        while isinstance(module, AdaptedLayer):
            module = module._modules["base_layer"]  # type: ignore[assignment]
        return module

    def attach(
        self,
        name: str,
        variant: AbstractVariant,
        specs: dict[str, ParameterSpec],
        tensors: Mapping[str, Tensor],
        *,
        shared: SharedTensors | None = None,
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
            if name not in held._modules and not container.endswith(("_A", "_B")):
                # A magnitude, not a factor: around one tensor, as in PEFT.
                held._modules[name] = nn.Module()
            if name not in held._modules:
                held._modules[name] = holder_for(container, specs[f"{container}.weight"].shape, self.base_layer)
            held._modules[name]._parameters[leaf] = parameter
        self.variants[name], self.specs[name] = variant, specs
        if shared is not None:
            self.shared[name] = shared
        self.r[name], self.lora_alpha[name], self.scaling[name] = r, lora_alpha, scaling
        self.lora_dropout[name] = dropout

    def materialise(self, name: str) -> None:
        """Give an adapter that was made on the meta device memory beside the base's weight, not yet filled."""
        device, _ = self.base.placement()
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
        for kept in self._kept():
            kept.pop(name, None)
        self.active_adapters = [active for active in self.active_adapters if active != name]
        self.refresh()

    def rename(self, old: str, new: str) -> None:
        """Keep an adapter under another name, at its place among the others."""
        containers = [held for key, held in self._modules.items() if key != "base_layer"]
        for held in (*containers, *self._kept()):
            if isinstance(held, nn.ModuleDict | nn.ParameterDict | dict) and old in held:
                relabel(held, old, new)
        self.active_adapters = [new if name == old else name for name in self.active_adapters]
        self.merged_adapters = [new if name == old else name for name in self.merged_adapters]
        self.refresh()

    def _kept(self) -> tuple[dict[str, Any], ...]:
        """Everything about adapters beside their tensors, by name."""
        numbers = (self.r, self.lora_alpha, self.scaling, self.live_scaling, self.lora_dropout)
        return (self.variants, self.specs, self.shared, *numbers)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors, keyed as on disk."""
        found: dict[str, nn.Parameter] = {}
        for key in self.specs[name]:
            container, _, leaf = key.partition(".")
            held = self._modules[container]
            found[key] = held._modules[name]._parameters[leaf] if leaf else held[name]  # type: ignore[union-attr,index,assignment]
        return found

    def put(self, name: str, key: str, tensor: nn.Parameter) -> None:
        """Take in a tensor of another shape in the place of one that an adapter has."""
        container, _, leaf = key.partition(".")
        held: Any = self._modules[container]
        self.specs[name][key] = replace(self.specs[name][key], shape=tuple(tensor.shape))
        if not leaf:
            held[name] = tensor
            return
        holder = holder_for(container, tuple(tensor.shape), self.base_layer)
        holder._parameters.update(held[name]._parameters)
        holder._parameters[leaf] = tensor
        held[name] = holder

    def set_scaling(self, name: str, scaling: float) -> None:
        """Give an adapter another scaling, also where a compiled model reads it."""
        self.scaling[name] = scaling
        if name in self.live_scaling:
            self.live_scaling[name].fill_(scaling)

    def given(self, name: str) -> dict[str, Tensor]:
        """All that an adapter computes with here: its own tensors and those that its layers share."""
        tensors: dict[str, Tensor] = dict(self.tensors(name))
        if name in self.shared:
            tensors.update(self.shared[name].now(name))
        return tensors

    def change(self, name: str) -> Tensor:
        """The change of the original weight that an adapter stands for, as an (O, I) matrix in float32 or wider."""
        base, p, variant, scaling = self.original, self.given(name), self.variants[name], self.scaling[name]
        W_OI, moved = base.weight(), standing_weight(base, p)
        if moved is None:
            return variant.update(base, p, W_OI, scaling=scaling)
        return variant.update(standing(base, p), p, moved, scaling=scaling) + (moved - W_OI)

    def refresh(self) -> None:
        """Settle which adapters the forward adds: active, enabled, on this layer, and not merged."""
        if self.disable_adapters:
            self.live = ()
        else:
            self.live = tuple(
                name for name in self.active_adapters if name in self.specs and name not in self.merged_adapters
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.router.idle:
            routing = self.router.current
            if routing is not None:
                return routing.through(self, args, kwargs)
            self.router.check_told()
        if not self.live:
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        if issubclass(self.base_class, WeightBase):
            return self.run(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        # What is merged already is in the module's own output.
        y = self.base.frozen(x) if self.merged_adapters else None  # type: ignore[attr-defined]
        for name in self.live:
            y = self.add(name, x, y)
        return y

    def add(self, name: str, x: Tensor, y: Tensor | None) -> Tensor:
        """An adapter's update added to the output so far, or to the module's own when there is none."""
        original, p = self.original, self.given(name)
        base = standing(original, p)
        assert isinstance(base, InputBase)
        assert isinstance(original, InputBase)
        dropout = self.lora_dropout[name] if self.training else 0.0
        live = self.live_scaling.get(name)
        if live is None:
            scaling = self.scaling[name]
        else:
            # A number would be part of what a compiler makes of this; so the scaling goes into the factors.
            p, scaling = {key: t * live if key in (base.factor_names[1], BIAS) else t for key, t in p.items()}, 1.0
        added = self.variants[name].forward(base, p, x, y, scaling=scaling, dropout=dropout)
        if y is not None and base is not original:
            added = added + (base.frozen(x) - original.frozen(x))
        return added

    def effective_weight(self) -> Tensor:
        """The weight with all live adapters added, differentiable in their tensors, in W's dtype."""
        W_OI = self.base.weight()
        if not self.live:
            return W_OI
        return self.changed(W_OI, self.live)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The output of a module that uses its weight in a larger computation, with the effective one in its place."""
        return call_with(self.get_base_layer(), self.seated(), *args, **kwargs)

    def seated(self) -> dict[str, Tensor]:
        """The effective weights of this wrapper and those inside it, as stored, by their names in the module."""
        inner = self._modules["base_layer"]
        weights = inner.seated() if isinstance(inner, AdaptedLayer) else {}
        shown = self.shown()
        return weights if shown is None else {**weights, self.leaf: shown}

    def shown(self) -> Tensor | None:
        """The weight as whoever reads it should see it now, as stored; None when that is the module's own."""
        routing = None if self.router.idle else self.router.current
        names = self.live if routing is None else routing.shown(self)
        if not names:
            return None
        base = self.base
        W_OI = self.changed(base.weight(), names)
        return base.stored(W_OI) if isinstance(base, WeightBase) else W_OI

    def changed(self, W_OI: Tensor, names: Sequence[str]) -> Tensor:
        """A weight with the changes of some adapters added, rounded once to its own dtype."""
        total = self.change(names[0])
        for name in names[1:]:
            total = total + self.change(name)
        return (W_OI.to(merge_dtype(W_OI, total)) + total).to(W_OI.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name.startswith("__"):
                raise
            shown = self.shown() if self.read and name == self.leaf else None
            return getattr(base_layer, name) if shown is None else shown

    def extra_repr(self) -> str:
        return f"{self.kind}, " + ", ".join(
            f"{name}: r={self.r[name]} alpha={self.lora_alpha[name]:g}"
            + (" merged" if name in self.merged_adapters else "" if name in self.active_adapters else " inactive")
            for name in self.specs
        )


@final
class SharedTensors:
    """Frozen tensors that all layers of an adapter share: buffers ``<key>.<adapter>`` at the root, as in PEFT."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.keys: dict[str, tuple[str, ...]] = {}
        self.lent: dict[str, Mapping[str, Tensor]] = {}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take in an adapter's tensors, keyed as on disk."""
        for key, tensor in tensors.items():
            if key not in self.owner._modules:
                self.owner.add_module(key, nn.Module())
            self.owner._modules[key].register_buffer(name, tensor)  # type: ignore[union-attr]
        if tensors:
            self.keys[name] = tuple(tensors)

    def of(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors, keyed as on disk."""
        return {key: self.owner._modules[key]._buffers[name] for key in self.keys.get(name, ())}  # type: ignore[union-attr,misc]

    def lend(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give an adapter's layers tensors that belong to one call of the model, in the place of those lent before."""
        self.lent[name] = tensors

    def now(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors and those that are lent to it."""
        return {**self.of(name), **self.lent.get(name, {})}

    def rename(self, old: str, new: str) -> None:
        """Keep an adapter's tensors under another name."""
        if old in self.keys:
            for key in self.keys[old]:
                relabel(self.owner._modules[key]._buffers, old, new)  # type: ignore[union-attr]
            relabel(self.keys, old, new)

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        for key in self.keys.pop(name, ()):
            held = self.owner._modules[key]
            assert held is not None
            held._buffers.pop(name, None)
            if not held._buffers:
                del self.owner._modules[key]


def relabel(held: Any, old: str, new: str) -> None:
    """Change one key of a dictionary, a ModuleDict or a ParameterDict in place, and nothing else about it."""
    items = [(new if key == old else key, value) for key, value in held.items()]
    held.clear()
    held.update(items)

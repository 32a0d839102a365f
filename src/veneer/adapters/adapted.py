"""The adapted model: the base model with the registry of everything that was put into it.

PEFT calls this ``LoraModel``; it is what ``PeftModel.base_model`` is. Nothing here walks the module tree
after the first adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from veneer.adapters.biases import BiasBank
from veneer.adapters.budget import RankBudget, penalty, update_and_allocate
from veneer.adapters.index import ModuleIndex
from veneer.adapters.invocation import Invocations
from veneer.adapters.layer import AdaptedLayer, SharedTensors
from veneer.adapters.names import Names
from veneer.adapters.routing import Router, forward, with_names
from veneer.adapters.saved import ModulesToSaveWrapper
from veneer.adapters.tokens import TokenBank
from veneer.core.base import Into
from veneer.core.config import PeftConfig
from veneer.core.errors import UsageError, listed, nearest
from veneer.core.records import MatchReport

if TYPE_CHECKING:
    from veneer.adapters.replication import Replication


@final
class AdaptedModel(nn.Module):
    """A model, its adapted layers by path, its adapters by name, and which of them are active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.shared = SharedTensors(self)
        self.index = ModuleIndex(model)
        self.layers: dict[str, AdaptedLayer] = {}
        self.saved: dict[str, ModulesToSaveWrapper] = {}
        self.biases = BiasBank()
        self.router = Router()
        self.tokens = TokenBank(self.router)
        self.invocations = Invocations(model, self.shared, self.router)
        self.peft_config: dict[str, PeftConfig] = {}
        self.reports: dict[str, MatchReport] = {}
        self.active_adapters: list[str] = []
        self.enabled = True
        self.replication: Replication | None = None
        self.budgets: dict[str, RankBudget] = {}
        self.merged_into: Into | None = None
        if any(isinstance(slot.module, AdaptedLayer) for slot in self.index.slots.values()):
            raise UsageError(
                "This model is adapted already; use add_adapter or load_adapter on it, or unload() to start again."
            )
        self.training = model.training

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's output; with ``adapter_names``, each row of the batch through the adapter of its name."""
        if adapter_names is None and self.router.idle:
            outputs = self._modules["model"](*args, **kwargs)  # type: ignore[misc]
        else:
            outputs = forward(self, adapter_names, args, kwargs)
        if self.training and isinstance(getattr(outputs, "loss", None), Tensor):
            more = penalty(self)
            if more is not None:
                outputs.loss = outputs.loss + more
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """Move AdaLoRA's budget on: after each optimiser step, before the gradients are cleared.

        Args:
            global_step: optimiser steps taken, this one included; the final budget is in force from step
                ``total_step - tfinal`` on.

        Raises:
            UsageError: no active adapter is an AdaLoRA adapter that learns.
        """
        update_and_allocate(self, global_step)

    def layers_of(self, name: str) -> dict[str, AdaptedLayer]:
        """The layers that an adapter is on."""
        return {path: layer for path, layer in self.layers.items() if name in layer.specs}

    def saved_of(self, name: str) -> dict[str, ModulesToSaveWrapper]:
        """The modules that an adapter keeps a trained copy of."""
        return {path: wrapper for path, wrapper in self.saved.items() if name in wrapper.modules_to_save}

    def require(self, name: str) -> None:
        """Check that an adapter is there.

        Raises:
            UsageError: it is not; the message names those that are.
        """
        if name not in self.peft_config:
            have = f"there are: {listed(self.peft_config)}" if self.peft_config else "there is none"
            raise UsageError(f"There is no adapter {name!r}; {have}.{nearest(name, self.peft_config)}")

    def refuse_overlap(self, targets: Iterable[str], saved: Iterable[str]) -> None:
        """Check that no module saved whole by one adapter holds, or lies in, a module that another one changes.

        Raises:
            UsageError: one does.
        """
        whole, targets = list(saved), list(targets)
        pairs = [(path, other) for path in whole for other in self.layers]
        pairs += [(other, path) for path in targets for other in self.saved]
        pairs += [
            pair for path in whole for other in self.saved if path != other for pair in ((path, other), (other, path))
        ]
        self._refuse_twice(targets)
        for outer, inner in pairs:
            if inner == outer or inner.startswith(f"{outer}."):
                raise UsageError(
                    f"{outer!r} would be saved whole by one adapter while another one changes {inner!r} inside it; "
                    "leave it out of one of them, with exclude_modules or modules_to_save."
                )

    def _refuse_twice(self, targets: Iterable[str]) -> None:
        owners = {self.index.slot(path).owner: path for path in self.layers if path not in self.index.slots}
        for path in targets:
            owner = self.index.slot(path).owner
            clash = owner if owner != path and owner in self.layers else owners.get(path)
            if clash is not None:
                raise UsageError(
                    f"{path!r} cannot be adapted while another adapter is on {clash!r}: one of them takes the module "
                    "whole and the other a parameter of it. Name the same in both configs, or merge the other first."
                )

    def original(self, parameter: str) -> nn.Parameter:
        """A parameter of the base by its name in the untouched model; a merged layer's is the one before."""
        path, _, leaf = parameter.rpartition(".")
        if path in self.tokens.unmerged and leaf == "weight":
            return self.tokens.unmerged[path]
        layer = self.layers.get(parameter) or self.layers.get(path)
        if layer is not None and layer.unmerged is not None and leaf in layer.unmerged:
            kept = layer.unmerged[leaf]
            assert isinstance(kept, nn.Parameter)
            return kept
        module = self.index.slots[path].module if path else self.model
        found = module._parameters[leaf]
        assert found is not None
        return found

    def names(self, name: str | None = None) -> Names:
        """PEFT's names of what one adapter is on, as on disk, or of what any is on, as in memory."""
        layers = self.layers if name is None else self.layers_of(name)
        return Names(self.index.slot(path) for path in layers)

    def hang(self, path: str, module: nn.Module) -> None:
        """Put a module where the untouched model had one, at every place that holds it."""
        for parent, attribute in self.index.slot(path).places:
            parent._modules[attribute] = module

    def wrap(self, paths: Iterable[str]) -> None:
        """Bring the wrappers around the modules of these slots in line with ``layers``, in PEFT's order."""
        around = self.names().around
        for slot in {self.index.slot(path).owner: self.index.slot(path) for path in paths}.values():
            module = slot.module
            for wrapper in around.get(slot.owner, ()):
                layer = self.layers[wrapper]
                if layer.aside is None:
                    layer._modules["base_layer"] = module
                module = layer
            self.hang(slot.path, module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name.startswith("__"):
                raise
            found = getattr(model, name)
            if name != "generate":
                return found
            return with_names(self, self.invocations.generating(found) if self.invocations.tokens else found)

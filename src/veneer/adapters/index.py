"""A snapshot of a model's modules as they were before any adapter, so that later adapters need no tree walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from torch import Tensor, nn

from veneer.core import registry
from veneer.core.base import AbstractBase

EVIDENCE = "_start_evidence"
"""The attribute of a module that holds what was gathered about it, by the leaf of the statistic."""

_HEAD_NAMES = ("classifier", "score", "pre_classifier", "classification_head", "qa_outputs")


@dataclass(frozen=True)
class Slot:
    """One module of the untouched model."""

    path: str
    """Its first path in the model."""
    module: nn.Module
    """The module."""
    places: tuple[tuple[nn.Module, str], ...]
    """Every (parent, attribute) that holds it: a shared module hangs at several."""
    kind: str | None
    """The base that can adapt it, or None."""
    leaf: str = "weight"
    """The name of the weight among the module's parameters."""

    def evidence(self) -> Mapping[str, Tensor] | None:
        """What was gathered about this module on data, see ``AbstractInit.evidence``."""
        found: Mapping[str, Tensor] | None = self.module.__dict__.get(EVIDENCE)
        return found


class ModuleIndex:
    """Every module of a model by path, with the few that have a role."""

    def __init__(self, model: nn.Module) -> None:
        found: dict[int, tuple[str, nn.Module, list[tuple[nn.Module, str]]]] = {}
        owners: dict[int, list[str]] = {}
        self.parameter_sizes: dict[str, int] = {}
        trainable: set[str] = set()
        self.checkpointing = False
        self.marks: dict[tuple[str, ...], tuple[object, str]] = {}
        """Fingerprints of the weights, each with the state that it was taken in; see ``fingerprint``."""

        def visit(parent: nn.Module, prefix: str) -> None:
            self.checkpointing = self.checkpointing or parent.__dict__.get("gradient_checkpointing", False)
            for name, parameter in parent._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in owners:
                    self.parameter_sizes[f"{prefix}{name}"] = math.prod(shape_of(parameter))
                if parameter.requires_grad:
                    trainable.add(f"{prefix}{name}")
                owners.setdefault(id(parameter), []).append(prefix[:-1])
            for name, child in parent._modules.items():
                if child is None:
                    continue
                if id(child) in found:
                    found[id(child)][2].append((parent, name))
                    continue
                found[id(child)] = (f"{prefix}{name}", child, [(parent, name)])
                visit(child, f"{prefix}{name}.")

        visit(model, "")
        self.slots: dict[str, Slot] = {
            path: Slot(path, module, tuple(places), _kind(module, places)) for path, module, places in found.values()
        }
        self.trainable = frozenset(trainable)
        self.tied: dict[str, tuple[str, ...]] = {
            path: tuple(other for other in dict.fromkeys(paths) if other != path)
            for paths in owners.values()
            if len(set(paths)) > 1
            for path in paths
        }
        self.model_type: str | None = getattr(getattr(model, "config", None), "model_type", None)
        self.input_path = self._embedding_path(model, "get_input_embeddings")
        self.output_path = self._embedding_path(model, "get_output_embeddings")
        self.head_paths = _head_paths(model)

    def _embedding_path(self, model: nn.Module, method: str) -> str | None:
        ask = getattr(model, method, None)
        try:
            found = ask() if ask is not None else None
        except (NotImplementedError, AttributeError):
            # transformers' own answer for models that have none.
            return None
        return next((slot.path for slot in self.slots.values() if slot.module is found), None)

    def untied(self, saved: list[str]) -> int:
        """How many parameters a model has more of in which these modules, saved whole, are copies of their own."""
        inside = [slot for slot in self.slots.values() if lies_in(slot.path, saved)]
        copied, replaced = 0, {}
        for slot in inside:
            shared_outside = any(not lies_in(other, saved) for other in self.tied.get(slot.path, ()))
            for parameter in slot.module._parameters.values():
                if parameter is None:
                    continue
                copied += parameter.numel()
                if not shared_outside:
                    replaced[id(parameter)] = parameter.numel()
        return copied - sum(replaced.values())

    @cached_property
    def order(self) -> dict[str, int]:
        """From path to its place in the model."""
        return {path: number for number, path in enumerate(self.slots)}

    @cached_property
    def by_suffix(self) -> dict[str, tuple[str, ...]]:
        """From every dotted ending of a path ("q_proj", "self_attn.q_proj", ...) to the paths that have it."""
        suffixes: dict[str, list[str]] = {}
        for path in self.slots:
            parts = path.split(".")
            for start in range(len(parts)):
                suffixes.setdefault(".".join(parts[start:]), []).append(path)
        return {suffix: tuple(paths) for suffix, paths in suffixes.items()}


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of what a parameter stands for: bitsandbytes packs two values of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def view(slot: Slot) -> AbstractBase:
    """The base over a module that can be adapted."""
    assert slot.kind is not None
    base: AbstractBase = registry.load("bases", slot.kind).Base(slot.module, slot.leaf)
    return base


def lies_in(path: str, owners: Iterable[str]) -> bool:
    """Whether a path is that of one of these modules, or of something inside one."""
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


@cache
def _bases() -> tuple[tuple[str, Callable[[nn.Module], bool]], ...]:
    return tuple((name, registry.load("bases", name).Base.accepts) for name in registry.names("bases"))


def _kind(module: nn.Module, places: list[tuple[nn.Module, str]]) -> str | None:
    # Some quantised linear layers keep everything in buffers or packed away.
    if not module._parameters and not module._buffers and "in_features" not in module.__dict__:
        return None
    if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in places):
        # That module reads its children's weights and never calls them: a wrapper there would do nothing.
        return None
    return next((name for name, accepts in _bases() if accepts(module)), None)


def _head_paths(model: nn.Module) -> tuple[str, ...]:
    """The parts of a task model beside its pretrained body: what a classification run must train."""
    body = getattr(model, "base_model_prefix", None)
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if body in children:
        return tuple(name for name in children if name != body)
    return tuple(name for name in children if name in _HEAD_NAMES)

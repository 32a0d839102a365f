"""A snapshot of a model's modules as they were before any adapter, so that later adapters need no tree walk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from torch import Tensor, nn
from torch.nn.utils import parametrize

from veneer.core import registry
from veneer.core.base import AbstractBase, WeightBase

EVIDENCE = "_start_evidence"
"""The attribute of a module that holds what was gathered about it, by the leaf of the statistic."""

PARAMETER = "parameter"
"""The kind of a parameter that is adapted by itself."""

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
    read: bool = False
    """Whether the weight is read instead of the module being called: then the wrapper shows it adapted."""

    @property
    def owner(self) -> str:
        """The module's path, which for a parameter that is adapted by itself is a part of its own."""
        return self.path.removesuffix(f".{self.leaf}") if self.kind == PARAMETER else self.path

    @property
    def order(self) -> tuple[int, str]:
        """The place among several wrappers around one module, from the inside: PEFT's, that of registration."""
        names = [] if parametrize.is_parametrized(self.module) else list(self.module._parameters)
        return (names.index(self.leaf) if self.leaf in names else len(names)), self.leaf

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
            path: _slot(path, module, tuple(places)) for path, module, places in found.values()
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

    def untied(self, saved: list[str], together: Sequence[str] = ()) -> int:
        """How many parameters a model has more of in which these modules, saved whole, are copies of their own.

        Those in ``together`` are one copy.
        """
        inside = [slot for slot in self.slots.values() if lies_in(slot.path, saved)]
        copied, replaced = 0, {}
        for slot in inside:
            shared_outside = any(not lies_in(other, saved) for other in self.tied.get(slot.path, ()))
            for parameter in slot.module._parameters.values():
                if parameter is None:
                    continue
                copied += parameter.numel() if slot.path not in together[1:] else 0
                if not shared_outside:
                    replaced[id(parameter)] = parameter.numel()
        return copied - sum(replaced.values())

    @cached_property
    def order(self) -> dict[str, int]:
        """From path to its place in the model."""
        return {path: number for number, path in enumerate(self.slots)}

    @cached_property
    def parameters(self) -> dict[str, Slot]:
        """Every floating-point parameter below the root by its path, as something that can be adapted by itself."""
        return {
            f"{slot.path}.{leaf}": Slot(f"{slot.path}.{leaf}", slot.module, slot.places, PARAMETER, leaf, read=True)
            for slot in self.slots.values()
            for leaf in _own_parameters(slot.module)
        }

    def slot(self, path: str) -> Slot:
        """The slot of a module, or that of a parameter."""
        return self.slots.get(path) or self.parameters[path]

    @cached_property
    def by_suffix(self) -> dict[str, tuple[str, ...]]:
        """From every dotted ending of a path ("q_proj", "self_attn.q_proj", ...) to the paths that have it."""
        suffixes: dict[str, list[str]] = {}
        for path in self.slots:
            parts = path.split(".")
            for start in range(len(parts)):
                suffixes.setdefault(".".join(parts[start:]), []).append(path)
        return {suffix: tuple(paths) for suffix, paths in suffixes.items()}

    def shortest_names(self, paths: Iterable[str]) -> list[str]:
        """The shortest names that match these modules; others too only where the whole of a path ends theirs."""
        wanted = set(paths)
        shortest = set()
        for path in wanted:
            parts = path.split(".")
            endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
            shortest.add(next((end for end in endings if wanted.issuperset(self.by_suffix[end])), path))
        return sorted(shortest)


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


def _own_parameters(module: nn.Module) -> list[str]:
    names = [name for name, held in module._parameters.items() if held is not None and held.is_floating_point()]
    return names + (list(module.parametrizations) if parametrize.is_parametrized(module) else [])  # type: ignore[arg-type]


@cache
def _bases() -> tuple[tuple[str, Callable[[nn.Module], bool]], ...]:
    return tuple((name, registry.load("bases", name).Base.accepts) for name in registry.names("bases"))


def _slot(path: str, module: nn.Module, places: tuple[tuple[nn.Module, str], ...]) -> Slot:
    kind = None
    # Some quantised linear layers keep everything in buffers or packed away.
    holds = module._parameters or module._buffers or "in_features" in module.__dict__
    # An attention reads its children's weights and never calls them: they are adapted with it, or not at all.
    if holds and not any(isinstance(parent, nn.MultiheadAttention) for parent, _ in places):
        kind = next((name for name, accepts in _bases() if accepts(module)), None)
    if kind is None:
        return Slot(path, module, places, None)
    base = registry.load("bases", kind).Base
    return Slot(path, module, places, kind, base.own_leaf, read=issubclass(base, WeightBase))


def _head_paths(model: nn.Module) -> tuple[str, ...]:
    """The parts of a task model beside its pretrained body: what a classification run must train."""
    body = getattr(model, "base_model_prefix", None)
    children = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    if body in children:
        return tuple(name for name in children if name != body)
    return tuple(name for name in children if name in _HEAD_NAMES)

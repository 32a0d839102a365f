"""From a config's patterns to the list of modules to adapt, with a report of what each pattern matched.

A pattern that matches nothing fails and names the nearest module names: nothing is left out silently.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from veneer.adapters.defaults import DEFAULT_TARGETS
from veneer.adapters.experts import check_parameters, parameters_named, unmatched
from veneer.adapters.index import PARAMETER, ModuleIndex, Slot, lies_in, view
from veneer.adapters.rows import TokenRows, select_rows
from veneer.adapters.target import Target as Target
from veneer.adapters.target import make_targets
from veneer.adapters.ties import tie_targets, tie_whole, tied_group, tied_heads, warn_untied
from veneer.core import registry
from veneer.core.config import LoraConfig, PeftConfig, TunerConfig
from veneer.core.errors import ConfigError, TargetError, listed, nearest
from veneer.core.records import MatchReport, PatternMatch, Role, TargetRecord
from veneer.core.task_type import TaskType
from veneer.core.variant import AbstractVariant, variant_of

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Selection:
    """What a config means on a model."""

    config: TunerConfig
    """A copy of the config with names resolved, as it is saved."""
    variant: AbstractVariant
    targets: tuple[Target, ...]
    saved: tuple[Slot, ...]
    """Modules that are trained whole."""
    biases: tuple[str, ...]
    """Names of the base's bias parameters that are trained."""
    report: MatchReport
    tokens: tuple[TokenRows, ...] = ()
    """Rows of tables that are trained."""
    shared: Mapping[str, Tensor] | None = None
    """Tensors that all its layers share, from a file; without them the variant makes them."""
    together: tuple[str, ...] = ()
    """Modules among those trained whole whose copies share one weight."""


def select(index: ModuleIndex, config: PeftConfig, *, from_file: bool = False) -> Selection:
    """Resolve a config on a model.

    Args:
        index: the model's modules.
        config: what to adapt; it is not changed.
        from_file: the config comes from an adapter folder. Its names may then include some that this model
            does not have (PEFT writes both "classifier" and "score"): the tensors beside it are checked
            one by one, so nothing can go missing.

    Raises:
        TargetError: a pattern matched nothing, or only modules that cannot be adapted.
        ConfigError: the variant has no meaning on a matched module.
    """
    assert isinstance(config, TunerConfig)
    return _Selector(index, config, from_file).run()


class _Selector:
    """One resolution: collects the pattern matches on its way."""

    def __init__(self, index: ModuleIndex, config: TunerConfig, from_file: bool) -> None:
        self.index = index
        self.config = config
        self.from_file = from_file
        self.matches: list[PatternMatch] = []

    def run(self) -> Selection:
        config = self.config
        saved, together = tie_whole(self.index, config, self.saved_modules())
        excluded = set(self.match("exclude_modules", config.exclude_modules)) if config.exclude_modules else set()
        inside_saved = {path for path in self.index.slots if lies_in(path, [slot.path for slot in saved])}
        slots = tie_targets(self.index, config, self.target_slots(excluded, inside_saved))
        parameters = self.parameter_slots()
        check_parameters(config, parameters, (slot.path for slot in slots), excluded | inside_saved)
        slots += parameters
        ranks = self.values("rank_pattern", config.ranks, slots)
        alphas = self.values("alpha_pattern", config.alphas, slots)

        variant = variant_of(config)
        targets: list[Target] = []
        for slot in slots:
            r, alpha = int(ranks.get(slot.path, config.rank)), alphas.get(slot.path, config.alpha)
            targets += make_targets(self.index, slot, r, alpha, variant, config)
        targets += tied_heads(self.index, config, variant, targets)
        if not self.from_file:
            warn_untied(self.index, config, [target.slot.path for target in targets] + list(together))
        resolved = replace(
            config,
            target_modules=self.resolved_names(slots),
            modules_to_save=self.resolved_saved([slot for slot in saved if slot.path not in together[1:]]),
            fan_in_fan_out=any(view(t.slot).fan_in_fan_out for t in targets),
        )
        if config.fan_in_fan_out and not resolved.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out=True, but every target stores its weight as (out, in); it is taken as False.",
                stacklevel=5,
            )
        biases = self.biases(targets, saved)
        tokens = config.trainable_token_indices if isinstance(config, LoraConfig) else None
        rows = () if tokens is None else select_rows(self.index, tokens)
        report = self.report(targets, saved, biases, rows, together)
        return Selection(resolved, variant, tuple(targets), tuple(saved), biases, report, rows, together=together)

    # Patterns

    def match(self, role: Role, patterns: list[str] | str) -> list[str]:
        """The paths that names or a regular expression match, each pattern recorded and checked."""
        found: dict[str, None] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if isinstance(patterns, str):
                expression = re.compile(pattern)
                paths = tuple(path for path in self.index.slots if expression.fullmatch(path))
            else:
                paths = self.index.by_suffix.get(pattern, ())
            self.record(role, pattern, paths)
            found.update(dict.fromkeys(paths))
        return list(found)

    def record(self, role: Role, pattern: str, paths: Iterable[str]) -> None:
        match = PatternMatch(role, pattern, tuple(paths))
        if not match.paths and not self.from_file:
            raise TargetError(
                f"{role} has {pattern!r}, which matches no module of this model."
                f"{nearest(pattern, self.index.by_suffix)} Modules that can be adapted end in: "
                f"{listed(self.adaptable_names(), most=20)}."
            )
        self.matches.append(match)

    def values(self, role: Role, patterns: Mapping[str, float], slots: list[Slot]) -> dict[str, float]:
        """The value of the first pattern that each target's path ends in."""
        taken: dict[str, float] = {}
        for pattern, value in patterns.items():
            expression = re.compile(rf"(.*\.)?({pattern})$")
            paths = [slot.path for slot in slots if slot.path not in taken and expression.match(slot.path)]
            if not paths and not self.from_file:
                raise TargetError(
                    f"{role} has {pattern!r}, which matches no adapted module (the first key that matches wins)."
                    f"{nearest(pattern, {part for slot in slots for part in slot.path.split('.')})}"
                )
            self.matches.append(PatternMatch(role, pattern, tuple(paths)))
            taken.update(dict.fromkeys(paths, value))
        return taken

    # Targets

    def parameter_slots(self) -> list[Slot]:
        """The parameters that are adapted by themselves."""
        found: dict[str, None] = {}
        for pattern in self.parameter_names():
            paths = parameters_named(self.index, pattern)
            if not paths and not self.from_file:
                raise TargetError(unmatched(self.index, pattern))
            self.matches.append(PatternMatch("target_parameters", pattern, paths))
            found.update(dict.fromkeys(paths))
        slots = [self.index.parameters[path] for path in found]
        self.warn_of_ties(slots)
        return sorted(slots, key=lambda slot: (self.index.order[slot.owner], slot.order))

    def parameter_names(self) -> list[str]:
        return (self.config.target_parameters or []) if isinstance(self.config, LoraConfig) else []

    def target_slots(self, excluded: set[str], inside_saved: set[str]) -> list[Slot]:
        names = self.config.target_modules
        if names is None:
            names = self.default_names()
        if not names:
            return []
        if isinstance(names, str) and names.lower() == ALL_LINEAR:
            paths = [
                path
                for path, slot in self.index.slots.items()
                if slot.kind and type(view(slot)).linear_layer and path != self.index.output_path
            ]
            self.record("target_modules", ALL_LINEAR, paths)
        elif ALL_LINEAR in names and not isinstance(names, str):
            raise TargetError(
                f"target_modules has {ALL_LINEAR!r} in a list of names; it stands alone: target_modules={ALL_LINEAR!r}."
            )
        else:
            paths = self.match("target_modules", names)
        open_paths = self.in_layers([path for path in paths if path not in excluded and path not in inside_saved])
        slots = [self.index.slots[path] for path in open_paths]
        for slot in slots:
            if slot.kind is None:
                raise TargetError(self.not_adaptable(slot))
        if not slots:
            reason = (
                f"leaves no module to adapt: {len(paths)} matched, and exclude_modules, modules_to_save or "
                "layers_to_transform take them all."
                if paths
                else "matches no module of this model."
            )
            raise TargetError(f"target_modules={self.config.target_modules!r} {reason}")
        self.warn_of_ties(slots)
        order = self.index.order
        return sorted(slots, key=lambda slot: order[slot.path])

    def warn_of_ties(self, slots: list[Slot]) -> None:
        """An update on one of several modules that share a weight does not reach the others."""
        tied = isinstance(self.config, LoraConfig) and self.config.ensure_weight_tying
        adapted = {slot.path for slot in slots} | set(tied_group(self.index) if tied else ())
        for slot in slots:
            others = [path for path in self.index.tied.get(slot.owner, ()) if path not in adapted]
            if others:
                warnings.warn(
                    f"The adapter on {slot.path!r} does not reach {listed(others)}, which share its weight; set "
                    "ensure_weight_tying=True to share the update too, or name them in target_modules for their own.",
                    stacklevel=7,
                )

    def default_names(self) -> list[str]:
        model_type = self.index.model_type
        if model_type in DEFAULT_TARGETS:
            return list(DEFAULT_TARGETS[model_type])
        if self.parameter_names():
            return []
        raise TargetError(
            f"target_modules is not given, and there is no default for model type {model_type!r}; "
            f"use target_modules='all-linear' or name some of: {listed(self.adaptable_names(), most=20)}."
        )

    def not_adaptable(self, slot: Slot) -> str:
        kind = type(slot.module).__name__
        below = sorted({path.split(".")[-1] for path, s in self.index.slots.items() if s.kind and _below(path, slot)})
        if any(isinstance(parent, nn.MultiheadAttention) for parent, _ in slot.places):
            reason = "its parent nn.MultiheadAttention reads its weight without calling it; name that module instead"
        elif isinstance(slot.module, nn.MultiheadAttention) and slot.module.in_proj_weight is None:
            reason = "its kdim or vdim is not its embed_dim, and only a packed weight for all three can be adapted"
        elif below:
            reason = f"name the modules inside it instead: {listed(below)}"
        else:
            reason = f"kinds that can be adapted: {', '.join(registry.names('bases'))}"
        return f"target_modules matches {slot.path!r}, a {kind}, which cannot be adapted; {reason}."

    def in_layers(self, paths: list[str]) -> list[str]:
        """The paths whose layer number is among ``layers_to_transform``."""
        wanted = self.config.layers_to_transform
        if wanted is None or wanted == []:
            return paths
        numbers = [wanted] if isinstance(wanted, int) else wanted
        patterns = self.config.layers_pattern or []
        number_of = {path: _layer_number(path, [patterns] if isinstance(patterns, str) else patterns) for path in paths}
        there = {number for number in number_of.values() if number is not None}
        for number in numbers:
            if number not in there:
                raise TargetError(
                    f"layers_to_transform has {number}, but the matched modules are in layers "
                    f"{listed(map(str, sorted(there)), most=40) or 'without a number'}"
                    f"{f' under layers_pattern={patterns!r}' if patterns else ''}."
                )
        return [path for path in paths if number_of[path] in numbers]

    def adaptable_names(self) -> list[str]:
        return sorted({path.split(".")[-1] for path, slot in self.index.slots.items() if slot.kind})

    def resolved_names(self, slots: list[Slot]) -> list[str] | str:
        """Names as they are saved: the user's, or for "all-linear" the shortest that match the same modules."""
        names = self.config.target_modules
        if names is None:
            return self.default_names()
        if not isinstance(names, str) or names.lower() != ALL_LINEAR:
            return names
        return self.index.shortest_names(slot.path for slot in slots if slot.kind != PARAMETER)

    # Whole modules and biases

    def saved_modules(self) -> list[Slot]:
        """The modules trained whole: PEFT's rule (a path that ends in the name), heads of task models included."""
        paths: dict[str, None] = {}
        for name in self.config.modules_to_save or []:
            ending = [path for path in self.index.slots if path.endswith(name)]
            if not ending and name in _PEFT_HEADS and self.with_head():
                continue
            self.record("modules_to_save", name, ending)
            paths.update(dict.fromkeys(ending))
        if self.with_head() and not self.from_file:
            for path in self.index.head_paths:
                if path not in paths:
                    self.record("modules_to_save", path, [path])
                    paths[path] = None
            if not paths:
                warnings.warn(
                    f"task_type is {self.config.task_type}, but this model has no head that could be "
                    "recognised; name it in modules_to_save, or it stays frozen and is not saved.",
                    stacklevel=6,
                )
        outermost = [path for path in paths if not any(_strictly_inside(path, other) for other in paths)]
        slots = [self.index.slots[path] for path in outermost]
        for slot in slots:
            if isinstance(slot.module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
                raise TargetError(
                    f"modules_to_save matches {slot.path!r}, a {type(slot.module).__name__}, which is never called "
                    "itself; name the modules inside it."
                )
        return slots

    def with_head(self) -> bool:
        return self.config.task_type is not None and TaskType(self.config.task_type).has_head

    def resolved_saved(self, saved: list[Slot]) -> list[str] | None:
        names = list(self.config.modules_to_save or [])
        names += [slot.path for slot in saved if not any(slot.path.endswith(name) for name in names)]
        return names or None

    def biases(self, targets: list[Target], saved: list[Slot]) -> tuple[str, ...]:
        if self.config.bias == "none":
            return ()
        if self.config.bias == self.config.own_biases:
            names = list(dict.fromkeys(f"{target.slot.owner}.bias" for target in targets))
            found = [name for name in names if name in self.index.parameter_sizes]
        else:
            inside = [slot.path for slot in saved]
            # PEFT's rule, which leaves out nn.MultiheadAttention's in_proj_bias.
            found = [
                name
                for name in self.index.parameter_sizes
                if name.split(".")[-1] == "bias" and not lies_in(name, inside)
            ]
        if not found and not self.from_file:
            raise ConfigError(
                f"bias={self.config.bias!r}, but {'no adapted module has' if targets else 'the model has no'} a bias; "
                "use bias='none'."
            )
        return tuple(found)

    def report(
        self,
        targets: list[Target],
        saved: list[Slot],
        biases: tuple[str, ...],
        rows: tuple[TokenRows, ...],
        together: tuple[str, ...],
    ) -> MatchReport:
        named = [PatternMatch("trainable_token_indices", each.slot.path, each.paths) for each in rows]
        return MatchReport(
            patterns=(*self.matches, *named),
            targets=tuple(
                TargetRecord(
                    path=target.slot.path,
                    kind=target.kind,
                    shape=view(target.slot).shape(),
                    r=target.r,
                    lora_alpha=target.lora_alpha,
                    scaling=target.scaling,
                    parameters=sum(math.prod(spec.shape) for spec in target.specs.values() if spec.trainable),
                )
                for target in targets
            ),
            saved=tuple(
                (slot.path, 0 if slot.path in together[1:] else sum(p.numel() for p in slot.module.parameters()))
                for slot in saved
            ),
            biases=sum(self.index.parameter_sizes[name] for name in biases),
            base_parameters=sum(self.index.parameter_sizes.values()),
            untied=self.index.untied([slot.path for slot in saved], together),
            rows=tuple((each.slot.path, math.prod(each.shape)) for each in rows),
        )


_PEFT_HEADS = ("classifier", "score")


def _strictly_inside(path: str, owner: str) -> bool:
    return path.startswith(f"{owner}.")


def _below(path: str, slot: Slot) -> bool:
    return path.startswith(f"{slot.path}.")


def _layer_number(path: str, patterns: list[str]) -> int | None:
    """The first number of a path, or the one right after a layers_pattern: an expert's number comes later."""
    for pattern in patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        if found:
            return int(found.group(1))
    if patterns:
        return None
    return next((int(part) for part in path.split(".")[1:] if part.isdigit()), None)

"""Plain results that travel upward: what matched, what a merge changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal[
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
]


@dataclass(frozen=True)
class PatternMatch:
    """What one pattern of a config matched."""

    role: Role
    """The config field that the pattern stands in."""
    pattern: str
    """The pattern itself."""
    paths: tuple[str, ...]
    """The module paths that it matched, in the model's order."""


@dataclass(frozen=True)
class TargetRecord:
    """One layer that a config adapts."""

    path: str
    """The module's path in the base model."""
    kind: str
    """The kind of base: the file name in ``bases/``."""
    shape: tuple[int, int]
    """(out, in) of its weight."""
    r: int
    """The rank on this layer."""
    lora_alpha: float
    """The alpha on this layer."""
    scaling: float
    """The factor of the update on this layer."""
    parameters: int
    """How many parameters the adapter adds here."""


@dataclass(frozen=True)
class MatchReport:
    """What a config does to a model, known before anything is changed."""

    patterns: tuple[PatternMatch, ...]
    """Every pattern with what it matched."""
    targets: tuple[TargetRecord, ...]
    """Every adapted layer."""
    saved: tuple[tuple[str, int], ...]
    """Modules that are trained whole, each with its number of parameters."""
    biases: int
    """How many bias parameters of the base are trained."""
    base_parameters: int
    """Parameters of the base model, each counted once."""
    untied: int = 0
    """Parameters that the model in use has more of, because modules saved whole no longer share theirs."""
    rows: tuple[tuple[str, int], ...] = ()
    """Tables of which single rows are trained, each with the number of parameters in these rows."""

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return self._added + sum(n for _, n in self.saved) + self.biases

    @property
    def total(self) -> int:
        """Parameters of the adapted model in use."""
        return self.base_parameters + self.untied + self._added

    @property
    def scaling_note(self) -> str | None:
        """What ranks of their own do to the scaling when alpha is the same for all, as a sentence; or None.

        PEFT's files mean it so: an update is scaled by alpha over the rank of its own layer.
        """
        by_rank = {t.r: t.scaling for t in self.targets}
        plain = all(abs(t.scaling * t.r - t.lora_alpha) <= 1e-9 * t.lora_alpha for t in self.targets)
        if len(by_rank) < 2 or len({t.lora_alpha for t in self.targets}) > 1 or not plain:
            return None
        each = ", ".join(f"by {scaling:.4g} at r={r}" for r, scaling in sorted(by_rank.items()))
        return f"Ranks differ and alpha does not, so updates are scaled {each}; alpha_pattern=match scales them alike."

    @property
    def _added(self) -> int:
        return sum(t.parameters for t in self.targets) + sum(n for _, n in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, the two sums included."""
        return {**asdict(self), "trainable": self.trainable, "total": self.total}


@dataclass(frozen=True)
class MergeReport:
    """How a merged model compares with the adapted one on the same input."""

    adapters: tuple[str, ...]
    """The adapters that were merged."""
    layers: int
    """How many layers got a new weight."""
    dtype: str
    """The dtype of the merged weights."""
    max_logit_difference: float | None
    """The largest absolute difference of an output; None when the outputs were not compared."""
    logit_scale: float | None
    """The largest absolute output, to judge the difference by; None when the outputs were not compared."""
    streamed: bool
    """Whether the weights were merged tensor by tensor, instead of in one loaded model."""
    peak_memory: int
    """The most memory held, in bytes, loading the two models to compare included."""
    into: str = "full"
    """What was merged into: the base in full precision, or a quantised one, dequantised or quantised again."""


@dataclass(frozen=True)
class ModuleRecord:
    """One module of a model, as the tree of a report shows it."""

    path: str
    """Its path in the model; empty for the model itself."""
    type_name: str
    """The name of its class."""
    kind: str | None
    """The base that can adapt it, or None."""
    shape: tuple[int, int] | None
    """(out, in) of its weight when it can be adapted."""
    parameters: int
    """Parameters in it and below it, each counted once."""


@dataclass(frozen=True)
class LayerSpectrum:
    """The update of one layer of a saved adapter, in numbers that show what it learned."""

    path: str
    """The layer's path in the base model."""
    shape: tuple[int, int]
    """(out, in) of the update."""
    r: int
    """The rank that the adapter gives this layer."""
    scaling: float
    """The factor of the update."""
    a_norm: float | None
    """The Frobenius norm of A; None for a variant without such factors."""
    b_norm: float | None
    """The Frobenius norm of B, zero for an untrained adapter; None for a variant without such factors."""
    update_norm: float
    """The Frobenius norm of the update."""
    relative_norm: float | None
    """The same divided by that of the frozen weight; None when the weight is not known."""
    singular_values: tuple[float, ...]
    """The singular values of the update that are above rounding, descending."""
    effective_rank: float
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007)."""
    rank_90: int
    """How many singular values hold 90 % of the energy, the sum of their squares."""
    rank_95: int
    """The same for 95 %."""
    rank_99: int
    """The same for 99 %."""
    dead: bool
    """Whether the update is zero or under a thousandth of the adapter's median."""


@dataclass(frozen=True)
class AdapterSpectrum:
    """The updates of an adapter, layer by layer in the model's order."""

    layers: tuple[LayerSpectrum, ...]
    """Every adapted layer."""
    whole: bool
    """Whether these are the updates themselves; False when they are only what the file's factors add to them."""
    median_norm: float
    """The median norm of the updates that are not zero; 0 when all are."""

    @property
    def dead(self) -> tuple[str, ...]:
        """The paths of the dead layers."""
        return tuple(layer.path for layer in self.layers if layer.dead)


@dataclass(frozen=True)
class LayerOverlap:
    """How the updates of two adapters on one layer lie to each other. All from 0 to 1, but for the cosine."""

    path: str
    """The layer's path in the base model."""
    ranks: tuple[int, int]
    """How many directions each update has."""
    cosine: float
    """The cosine of the angle between the two updates as vectors: -1 opposed, 0 unrelated, 1 the same."""
    angles_in: tuple[float, ...]
    """The principal angles between what the two read from, in degrees, ascending."""
    angles_out: tuple[float, ...]
    """The principal angles between what the two write to, in degrees, ascending."""
    phi_in: float | None
    """The LoRA paper's subspace similarity of all input directions: the mean squared cosine of ``angles_in``;
    None when either update is zero."""
    phi_out: float | None
    """The same of the output directions."""
    chance_in: float
    """What ``phi_in`` is on average for random directions: the larger rank divided by the number of inputs."""
    chance_out: float
    """The same of the output directions."""


@dataclass(frozen=True)
class AdapterOverlap:
    """How two adapters of one model lie to each other."""

    layers: tuple[LayerOverlap, ...]
    """Every layer that both change."""
    only_first: tuple[str, ...]
    """Layers that only the first adapter changes."""
    only_second: tuple[str, ...]
    """Layers that only the second one changes."""
    cosine: float
    """The cosine of the two as one vector over all their layers."""
    phi_in: float | None
    """The mean of ``phi_in`` over the layers where neither update is zero; None when there is none."""
    phi_out: float | None
    """The same of the output directions."""
    chance_in: float | None
    """The mean of ``chance_in`` over the same layers."""
    chance_out: float | None
    """The mean of ``chance_out`` over the same layers."""


@dataclass(frozen=True)
class ApproximatedLayer:
    """One layer of an adapter that was written at another rank or in another form."""

    path: str
    """The layer's path in the base model."""
    r_before: int | None
    """The rank that it had; None when its update was no product of factors."""
    r: int
    """The rank that it has now."""
    norm: float | None = None
    """The Frobenius norm of the update that was to be kept; None where nothing had to be approximated."""
    kept: float = 1.0
    """The share of the update's energy that is kept."""
    error: float = 0.0
    """The relative Frobenius error of the update."""


@dataclass(frozen=True)
class PartRecord:
    """A part of a run's training data: what was named once."""

    name: str
    """As it was named."""
    weight: float | None
    """Its weight in the mixture, if there is one."""
    rows: int
    """Rows to train on."""
    examples: int
    """Sequences of these."""
    taken: int
    """Of these, how many each pass takes; more than there are means that some come several times."""
    fingerprint: str
    """A hash of its tokens and labels, in their order."""


@dataclass(frozen=True)
class RunRecord:
    """What a training run did: ``result.json`` in its folder."""

    model: str | None
    """The base model's name or folder."""
    task: str
    """The kind of task."""
    method: str
    """What was trained: lora, full or head."""
    steps: int
    """Optimiser steps taken."""
    planned_steps: int
    """Optimiser steps that there were to take."""
    interrupted: bool
    """Whether the run was stopped before its end."""
    seconds: float
    """Duration of the steps, without loading and without measuring on held-out data."""
    tokens_per_second: float
    """Tokens read per second of these, padding not counted."""
    peak_memory: int
    """The most memory held, in bytes."""
    trainable: int
    """Parameters that learned."""
    total: int
    """Parameters of the model in use."""
    train_loss: float | None
    """The mean loss a trained token over the last tenth of the steps."""
    held_out_before: dict[str, float] | None
    """Metrics on the held-out data before the first step."""
    held_out_after: dict[str, float] | None
    """Metrics on the held-out data after the last step."""
    best_loss: float | None
    """The lowest loss on the held-out data after any step."""
    best_step: int | None
    """The step that it was reached at."""
    data: dict[str, int]
    """Counts of the training data: rows, examples, truncated, left out, tokens."""
    held_out_data: dict[str, int] | None
    """The same of the held-out data."""
    best: str | None
    """The folder of the adapter or model at ``best_step``."""
    last: str | None
    """The folder of the adapter or model after the last step."""
    notes: tuple[str, ...]
    """Everything the run had to decide or leave out, in sentences."""
    quantize: str | None = None
    """How the base was quantised: nf4, fp4 or int8; None in full precision."""
    parts: tuple[PartRecord, ...] = ()
    """The parts of the training data."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the task has to say of the last measurement beside its metrics, as a confusion matrix."""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)

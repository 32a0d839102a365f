"""LoraConfig and the fields that it shares with every low-rank variant: PEFT's names, defaults and meaning."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal, final

from veneer.core import registry
from veneer.core.checks import layer_ranges, sequence_of_ids, token_ids
from veneer.core.errors import ConfigError, nearest
from veneer.core.not_built import NOT_BUILT, REASONS
from veneer.core.peft_config import PEFT_FORMAT, PeftConfig, field_docs, read_json, require_bool, strict
from veneer.core.start_config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, settings

__all__ = [
    "PEFT_FORMAT",
    "LoraConfig",
    "LowRankConfig",
    "PeftConfig",
    "TunerConfig",
    "field_docs",
    "read_json",
    "strict",
]


@strict
@dataclass(kw_only=True)
class TunerConfig(PeftConfig):
    """Where a variant goes, and what is trained beside it. Abstract.

    A variant's own config is a final dataclass below this one or ``LowRankConfig``, which gives the default
    of ``peft_type`` and the fields that the variant adds. The properties are what adapting a model asks for;
    a config answers them from its own fields.
    """

    # The value of ``bias`` that stands for the biases of the adapted layers, in PEFT's spelling.
    own_biases: ClassVar[str] = "lora_only"

    r: int = 8
    """The rank of the update."""
    target_modules: list[str] | str | None = None
    """Names (exact or suffix), one regular expression, "all-linear", or None for the model type's default."""
    exclude_modules: list[str] | str | None = None
    """Names or one regular expression to leave out of the targets."""
    fan_in_fan_out: bool = False
    """Whether targets store their weight as (in, out); found from the layer itself, kept for PEFT's file."""
    bias: str = "none"
    """Which biases of the base model are trained: none, all, or those of the adapted layers."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved whole, beside the adapter."""
    layers_to_transform: list[int] | int | None = None
    """Only these layer indices are adapted."""
    layers_pattern: list[str] | str | None = None
    """The name of the list of layers that the indices count in, when it is not obvious."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("r", self.r)
        biases = ("none", "all", self.own_biases)
        if self.bias not in biases:
            raise ConfigError(
                f"bias is {self.bias!r}; expected none, all or {self.own_biases}.{nearest(str(self.bias), biases)}"
            )
        require_bool("fan_in_fan_out", self.fan_in_fan_out)
        self._check_names()
        self._check_layers()

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank that layers start with, those apart that ``ranks`` names."""

    @property
    @abstractmethod
    def alpha(self) -> float:
        """The alpha of layers that ``alphas`` does not name."""

    @property
    @abstractmethod
    def dropout(self) -> float:
        """The probability of dropping an input of the update during training."""

    @property
    @abstractmethod
    def ranks(self) -> Mapping[str, int]:
        """Ranks by the ending of a module's name."""

    @property
    @abstractmethod
    def alphas(self) -> Mapping[str, float]:
        """Alphas by the ending of a module's name."""

    @property
    @abstractmethod
    def init(self) -> str:
        """The key of the start: the file in ``inits/``."""

    def _check_names(self) -> None:
        alone = isinstance(self, LoraConfig) and bool(self.target_parameters)
        self.target_modules = _names("target_modules", self.target_modules, empty=alone)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save is the text {self.modules_to_save!r}; expected a list of names: "
                f"[{self.modules_to_save!r}]."
            )
        saved = _names("modules_to_save", self.modules_to_save)
        self.modules_to_save = saved if isinstance(saved, list) else None

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            if self.layers_pattern:
                raise ConfigError("layers_pattern is set without layers_to_transform; say which layers are meant.")
            return
        _names("layers_pattern", self.layers_pattern)
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, list) else []:
            _regex("layers_pattern", pattern)
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            raise ConfigError(
                "layers_to_transform works with target_modules as a list; with a regular expression, "
                "put the layer numbers into the expression."
            )
        for index in layers if isinstance(layers, list) else [layers]:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise ConfigError(f"layers_to_transform has {index!r}; expected layer numbers from 0.")


@strict
@dataclass(kw_only=True)
class LowRankConfig(TunerConfig):
    """The fields of LoRA and of the variants that PEFT derives from it. Abstract."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained: none, all, or those of the adapted layers."""
    lora_alpha: int | float = 8
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """The probability of dropping an input of A during training."""
    init_lora_weights: bool | str = True
    """How A and B start: true (kaiming A, zero B), false (both random), or a start by name, such as "pissa"."""
    loftq_config: dict[str, Any] | LoftQConfig = field(default_factory=dict)
    """How "loftq" quantises: loftq_bits, loftq_iter."""
    eva_config: dict[str, Any] | EvaConfig | None = None
    """How "eva" reads activations: rho, tau, whiten and others."""
    corda_config: dict[str, Any] | CordaConfig | None = None
    """How "corda" splits the weights: corda_method and files to keep its work in."""
    lora_ga_config: dict[str, Any] | LoraGAConfig | None = None
    """How "lora_ga" uses gradients: direction, scale, stable_gamma."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """A rank for the modules whose name ends in the given name or regular expression."""
    alpha_pattern: dict[str, int | float] | Literal["match"] = field(default_factory=dict)
    """A lora_alpha for the modules whose name ends in the given name or regular expression; "match" gives those of
    rank_pattern one by which all updates are scaled alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        self._check_patterns()
        self.init_lora_weights = _start(self.init_lora_weights)
        self.loftq_config = settings("loftq_config", self.loftq_config, LoftQConfig) or {}
        self.eva_config = settings("eva_config", self.eva_config, EvaConfig)
        self.corda_config = settings("corda_config", self.corda_config, CordaConfig)
        self.lora_ga_config = settings("lora_ga_config", self.lora_ga_config, LoraGAConfig)
        self._check_settings()

    def _check_settings(self) -> None:
        """Each start has its own settings, at their defaults when none are given; those of another one say nothing."""
        for start, kind in _SETTINGS.items():
            name = f"{start}_config"
            given = getattr(self, name)
            if start == self.init and not given:
                setattr(self, name, kind())
            elif start != self.init and given:
                # As in PEFT, whose converted adapters have such files.
                warnings.warn(
                    f"{name} has no effect with init_lora_weights={self.init_lora_weights!r}; it is left out.",
                    stacklevel=6,
                )
                setattr(self, name, {} if start == "loftq" else None)

    @property
    def rank(self) -> int:
        return self.r

    @property
    def alpha(self) -> float:
        return self.lora_alpha

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def ranks(self) -> Mapping[str, int]:
        return self.rank_pattern

    @property
    def alphas(self) -> Mapping[str, float]:
        assert not isinstance(self.alpha_pattern, str)
        return self.alpha_pattern

    @property
    def init(self) -> str:
        named = next((key for key, value in _STARTS.items() if value is self.init_lora_weights), None)
        return named or re.sub(r"(?<=_niter)_\d+$", "", str(self.init_lora_weights))

    def _check_patterns(self) -> None:
        if self.alpha_pattern == "match":
            # Resolved to numbers at once: PEFT's file has no word for it. There each module's alpha is over its own r.
            if not isinstance(self.rank_pattern, dict) or not self.rank_pattern:
                raise ConfigError("alpha_pattern='match' goes with rank_pattern, which is not given.")
            whole = {key: Fraction(self.lora_alpha) * rank / self.r for key, rank in self.rank_pattern.items()}
            self.alpha_pattern = {key: int(a) if a.denominator == 1 else float(a) for key, a in whole.items()}
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if patterns is None:
                setattr(self, name, {})
                continue
            if not isinstance(patterns, dict):
                raise ConfigError(f"{name} is {patterns!r}; expected a mapping from module name to number.")
            for key, value in patterns.items():
                _regex(name, key)
                if name == "rank_pattern":
                    positive_int(f"rank_pattern[{key!r}]", value)
                else:
                    positive(f"alpha_pattern[{key!r}]", value)


@final
@strict
@dataclass(kw_only=True)
class LoraConfig(LowRankConfig):
    """Low-rank adaptation of frozen weights: ``W x + s B A x`` (Hu et al., arXiv 2106.09685).

    Fields, names, defaults and meaning are PEFT's.

    >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])

    Raises:
        ConfigError: an unknown field (the nearest is named), an unsupported one, or a bad value.
    """

    not_built: ClassVar[Mapping[str, Any]] = NOT_BUILT
    reasons: ClassVar[Mapping[str, str]] = REASONS

    peft_type: str | None = "LORA"
    """The variant family in PEFT's spelling."""
    target_parameters: list[str] | None = None
    """Parameters that are adapted by themselves, such as experts: names (exact or suffix), "experts.down_proj"."""
    ensure_weight_tying: bool = False
    """Give modules that share the input embeddings' weight one update, or one trained copy, for all of them."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    lora_bias: bool = False
    """Whether B has a bias that learns."""
    use_dora: bool = False
    """Train the magnitude of each output's weights apart from their direction (DoRA, arXiv 2402.09353)."""
    use_lorafa: bool = False
    """Freeze A, so that training keeps only its few outputs for backward (LoRA-FA, arXiv 2308.03303)."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows are trained and saved: of the input embedding, or of modules by name."""
    layer_replication: list[list[int]] | None = None
    """Ranges of layers, [[start, end], ...], that the model is made of anew; copies share the base's weights."""
    use_qalora: bool = False
    """Let A see the sums of groups of inputs, as quantised weights group them (QALoRA, arXiv 2309.14717)."""
    qalora_group_size: int = 16
    """How many inputs are a group with use_qalora; it must divide the number of inputs."""
    alora_invocation_tokens: list[int] | None = None
    """Activate the adapter from the last place on where these token ids stand in the input (arXiv 2504.12397)."""

    def __post_init__(self) -> None:
        if self.alpha_pattern == "match" and self.use_rslora:
            raise ConfigError("alpha_pattern='match' has no meaning with use_rslora=True, which allows for each rank.")
        if isinstance(self.target_parameters, str):
            raise ConfigError(
                f"target_parameters is the text {self.target_parameters!r}; expected a list of names: "
                f"[{self.target_parameters!r}]."
            )
        parameters = _names("target_parameters", self.target_parameters)
        self.target_parameters = parameters if isinstance(parameters, list) else None
        super().__post_init__()
        require_bool("ensure_weight_tying", self.ensure_weight_tying)
        require_bool("use_rslora", self.use_rslora)
        require_bool("lora_bias", self.lora_bias)
        require_bool("use_dora", self.use_dora)
        require_bool("use_lorafa", self.use_lorafa)
        if self.use_lorafa and self.init == "mica":
            raise ConfigError("use_lorafa=True freezes A and init_lora_weights='mica' freezes B; choose one of them.")
        if self.use_dora and self.lora_bias:
            raise ConfigError("lora_bias=True has no meaning with use_dora=True, which leaves biases as they are.")
        token_ids("trainable_token_indices", self.trainable_token_indices)
        self.layer_replication = layer_ranges("layer_replication", self.layer_replication)
        if self.layer_replication and self.bias != "none":
            raise ConfigError(
                f"bias={self.bias!r} has no meaning with layer_replication, whose copies share the base's biases; "
                "use bias='none'."
            )
        require_bool("use_qalora", self.use_qalora)
        positive_int("qalora_group_size", self.qalora_group_size)
        if not self.use_qalora and self.qalora_group_size != type(self).qalora_group_size:
            raise ConfigError(
                f"qalora_group_size={self.qalora_group_size} has no effect without use_qalora=True; set that too, or "
                "leave it out."
            )
        if self.alora_invocation_tokens is not None:
            sequence_of_ids("alora_invocation_tokens", self.alora_invocation_tokens)


# The starts that PEFT's file spells as true and false.
_STARTS = {"kaiming": True, "random": False}

_SETTINGS = {"loftq": LoftQConfig, "eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}


def _start(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    known = [f"{name}_N" if name.endswith("_niter") else name for name in registry.names("inits")]
    if not isinstance(value, str) or re.sub(r"(?<=_niter)_\d+$", "_N", value.lower()) not in known:
        raise ConfigError(
            f"init_lora_weights is {value!r}; expected true, false or one of {', '.join(known)}."
            f"{nearest(str(value), known)}"
        )
    return _STARTS.get(value.lower(), value.lower())


def _names(field_name: str, value: Any, *, empty: bool = False) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{field_name} is an empty text; expected names or a regular expression.")
        _regex(field_name, value)
        return value
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(f"{field_name} is {value!r}; expected a list of module names.")
    if not value and field_name == "target_modules" and not empty:
        raise ConfigError("target_modules is an empty list; name at least one module, or leave it out.")
    return sorted(value) if isinstance(value, set | frozenset) else list(dict.fromkeys(value))


def _regex(field_name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{field_name} has {pattern!r}, which is not a regular expression: {error}.") from None


def probability(name: str, value: Any) -> None:
    """Refuse anything but a number from 0 to below 1.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a number from 0 to below 1.")


def positive_int(name: str, value: Any) -> None:
    """Refuse anything but a whole number of at least 1.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")


def positive(name: str, value: Any) -> None:
    """Refuse anything but a finite number above 0.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value!r}; expected a number above 0.")

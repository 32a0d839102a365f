"""What the starts that have options take: PEFT's sub-configs, with its names, defaults and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, final, get_args

from veneer.core.errors import ConfigError, nearest
from veneer.core.peft_config import require_bool, strict

Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit"]
CordaMethod = Literal["ipm", "kpm"]

S = TypeVar("S")


@final
@strict
@dataclass(kw_only=True)
class LoftQConfig:
    """How ``init_lora_weights="loftq"`` quantises (Li et al., arXiv 2310.08659).

    >>> LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=5))
    """

    not_built: ClassVar[Mapping[str, Any]] = {}

    loftq_bits: int = 4
    """Bits of the quantised weight: 4 (NF4) or 8 (int8)."""
    loftq_iter: int = 1
    """How often quantising and fitting the factors take turns."""

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ConfigError(f"loftq_bits is {self.loftq_bits!r}; expected 4 (NF4) or 8 (int8).")
        _whole("loftq_iter", self.loftq_iter)


@final
@strict
@dataclass(kw_only=True)
class EvaConfig:
    """How ``init_lora_weights="eva"`` reads activations (Paischer et al., arXiv 2410.07170).

    >>> LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    """

    not_built: ClassVar[Mapping[str, Any]] = {}

    rho: float = 2.0
    """A layer may get up to rho times its rank when ranks are redistributed; 1 keeps them as they are."""
    tau: float = 0.99
    """The cosine similarity to its predecessor from which on a direction counts as found."""
    use_label_mask: bool = True
    """Whether tokens that are not trained, by their label, are left out."""
    label_mask_value: int = -100
    """The label of a token that is not trained."""
    whiten: bool = False
    """Whether directions are divided by the square root of their singular value."""
    adjust_scaling_factors: bool = True
    """Whether a layer keeps its scaling when it gets another rank."""

    def __post_init__(self) -> None:
        if isinstance(self.rho, bool) or not isinstance(self.rho, int | float) or not 1 <= self.rho < float("inf"):
            raise ConfigError(f"rho is {self.rho!r}; expected a number of at least 1.")
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau <= 1:
            raise ConfigError(f"tau is {self.tau!r}; expected a number from 0 to 1.")
        if isinstance(self.label_mask_value, bool) or not isinstance(self.label_mask_value, int):
            raise ConfigError(f"label_mask_value is {self.label_mask_value!r}; expected a whole number.")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            require_bool(name, getattr(self, name))


@final
@strict
@dataclass(kw_only=True)
class CordaConfig:
    """How ``init_lora_weights="corda"`` splits the weights (Yang et al., arXiv 2406.05223).

    >>> LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    """

    not_built: ClassVar[Mapping[str, Any]] = {}

    cache_file: str | None = None
    """A safetensors file with the decompositions: read when it exists, written otherwise."""
    covariance_file: str | None = None
    """A safetensors file with the covariances, for other ranks: read when it exists, written otherwise."""
    corda_method: CordaMethod = "ipm"
    """What learns: the components that matter most to the data (ipm), or least, which keeps what is known (kpm)."""
    verbose: bool = False
    """Whether progress is printed."""
    use_float16_for_covariance: bool = False
    """Keep covariances in half the memory, less exact."""
    prune_temporary_fields: bool = True
    """Must stay true: nothing temporary is left on the modules."""

    def __post_init__(self) -> None:
        one_of("corda_method", self.corda_method, get_args(CordaMethod))
        for name in ("cache_file", "covariance_file"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}; expected a path as a text.")
        for name in ("verbose", "use_float16_for_covariance"):
            require_bool(name, getattr(self, name))
        if self.prune_temporary_fields is not True:
            raise ConfigError(
                f"prune_temporary_fields is {self.prune_temporary_fields!r}; expected true: veneer keeps no temporary "
                "fields. To keep covariances, name a covariance_file."
            )


@final
@strict
@dataclass(kw_only=True)
class LoraGAConfig:
    """How ``init_lora_weights="lora_ga"`` uses gradients (Wang et al., arXiv 2407.05000).

    >>> LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArBr"))
    """

    not_built: ClassVar[Mapping[str, Any]] = {}

    direction: Direction = "ArB2r"
    """Which of the gradient's first 2r singular vectors go into A and which into B."""
    scale: Scale = "stable"
    """How large the factors are: stable, weight_svd, gd_scale or unit."""
    stable_gamma: int = 16
    """The divisor (under a root) of the stable scale."""

    def __post_init__(self) -> None:
        one_of("direction", self.direction, get_args(Direction))
        one_of("scale", self.scale, get_args(Scale))
        if (
            isinstance(self.stable_gamma, bool)
            or not isinstance(self.stable_gamma, int | float)
            or not 0 < self.stable_gamma < float("inf")
        ):
            raise ConfigError(f"stable_gamma is {self.stable_gamma!r}; expected a number above 0.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of these words.

    Raises:
        ConfigError: it is not; the nearest is named.
    """
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected {' or '.join(allowed)}.{nearest(str(value), allowed)}")


def settings(name: str, value: Any, kind: type[S]) -> S | None:
    """The sub-config that a field holds: one already, its fields as a mapping, or none (null or an empty mapping).

    Raises:
        ConfigError: something else, or a bad field; the message names the sub-config.
    """
    if value is None or value == {}:
        return None
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        try:
            return kind(**value)
        except ConfigError as error:
            raise ConfigError(f"In {name}: {error}") from None
    raise ConfigError(f"{name} is {value!r}; expected a {kind.__name__} or a mapping of its fields.")


def _whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")

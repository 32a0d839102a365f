"""VeRA's config: PEFT's names, defaults and meaning. Apart from its variant, so that flags need no torch.

Kopiczko et al., arXiv 2310.11454.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from veneer.core.config import TunerConfig, positive, probability, strict
from veneer.core.errors import ConfigError
from veneer.core.peft_config import require_bool


@final
@strict
@dataclass(kw_only=True)
class VeraConfig(TunerConfig):
    """Vectors that scale one frozen random pair of matrices, the same for all layers (arXiv 2310.11454).

    Fields, names, defaults and meaning are PEFT's.

    >>> config = VeraConfig(r=256, target_modules=["q_proj", "v_proj"])

    Raises:
        ConfigError: an unknown field (the nearest is named), or a bad value.
    """

    own_biases: ClassVar[str] = "vera_only"
    not_in_file: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})
    not_asked: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    peft_type: str | None = "VERA"
    """The variant family in PEFT's spelling."""
    r: int = 256
    """The rank of the random pair; larger than LoRA's, as it costs no trained matrices."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Which biases of the base model are trained: none, all, or those of the adapted layers."""
    projection_prng_key: int = 0
    """The seed that the random pair is drawn from."""
    save_projection: bool = True
    """Whether the random pair is in the file; without it, it is drawn again from its seed on loading."""
    vera_dropout: float = 0.0
    """The probability of dropping an input of the update during training."""
    d_initial: float = 0.1
    """What the vector between A and B starts as."""
    init_weights: bool = True
    """Start as the base model (true), or so that the outputs change at once (false)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        key = self.projection_prng_key
        if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < 2**63:
            raise ConfigError(f"projection_prng_key is {key!r}; expected a seed, a whole number from 0.")
        require_bool("save_projection", self.save_projection)
        require_bool("init_weights", self.init_weights)
        probability("vera_dropout", self.vera_dropout)
        if self.d_initial != 0:
            positive("d_initial", self.d_initial)
        if self.exclude_modules is not None:
            raise ConfigError(
                "exclude_modules has no place in PEFT's VeRA files; name the wanted modules in target_modules instead."
            )

    @property
    def rank(self) -> int:
        return self.r

    @property
    def alpha(self) -> float:
        # The vectors take the place of a scaling.
        return float(self.r)

    @property
    def dropout(self) -> float:
        return self.vera_dropout

    @property
    def ranks(self) -> Mapping[str, int]:
        return {}

    @property
    def alphas(self) -> Mapping[str, float]:
        return {}

    @property
    def init(self) -> str:
        return "kaiming" if self.init_weights else "random"

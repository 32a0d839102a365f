"""VeRA: ``W x + b * B (d * (A x))`` with one frozen random pair A, B for all layers, and two small vectors for each.

Kopiczko et al., arXiv 2310.11454.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.base import AbstractBase, InputBase, merge_dtype
from veneer.core.config import PeftConfig, TunerConfig, positive, probability, strict
from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit
from veneer.core.peft_config import require_bool
from veneer.core.variant import AbstractVariant, ParameterSpec

A, B = "vera_A", "vera_B"
LAMBDA_B, LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
_FACTORS = ("lora_A.weight", "lora_B.weight")


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


@final
class Variant(AbstractVariant):
    """Two trained vectors around a shared random pair, of which each layer uses as much as it is large."""

    config_class: ClassVar[type[PeftConfig]] = VeraConfig
    options: ClassVar[Mapping[str, Any]] = {}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        out, inputs = base.shape()
        if base.factor_names != _FACTORS or base.factor_shapes(r) != ((r, inputs), (out, r)):
            raise ConfigError(
                f"VeRA has no meaning on {type(base.module).__name__}, which is no linear layer: it cannot share a "
                "pair of matrices with others; take that module out of target_modules."
            )
        return {LAMBDA_B: ParameterSpec((out,)), LAMBDA_D: ParameterSpec((r,))}

    def shared(self, shapes: Sequence[tuple[int, int]], config: PeftConfig) -> dict[str, Tensor]:
        """The random pair, as large as the largest layer needs: A (R, I) and B (O, R), float32, on the CPU."""
        assert isinstance(config, VeraConfig)
        out, inputs = (max(shape[side] for shape in shapes) for side in (0, 1))
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        return {A: _drawn((config.r, inputs), generator), B: _drawn((out, config.r), generator)}

    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        return 1.0

    def start(
        self,
        base: AbstractBase,
        p: Mapping[str, Tensor],
        init: AbstractInit,
        *,
        scaling: float,
        config: PeftConfig,
        evidence: Mapping[str, Tensor] | None,
    ) -> Tensor | None:
        assert isinstance(config, VeraConfig)
        if config.init_weights:
            nn.init.zeros_(p[LAMBDA_B])
            nn.init.constant_(p[LAMBDA_D], config.d_initial)
        else:
            nn.init.ones_(p[LAMBDA_B])
            nn.init.normal_(p[LAMBDA_D])
        return None

    def forward(
        self,
        base: InputBase,
        p: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        y = base.frozen(x) if y is None else y
        A_RI, B_OR = _pair(base, p)
        # The pair is frozen: as two products with vectors between them nothing is kept for its gradient.
        z = F.linear(base.drop(x, dropout), A_RI.to(x.dtype))
        z = F.linear(z * p[LAMBDA_D].to(z.dtype), B_OR.to(z.dtype))
        return y + (z * p[LAMBDA_B].to(z.dtype)).to(y.dtype)

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        A_RI, B_OR = _pair(base, p)
        wide = merge_dtype(p[LAMBDA_B], p[LAMBDA_D], A_RI)
        d_R1, b_O1 = p[LAMBDA_D].to(wide).unsqueeze(1), p[LAMBDA_B].to(wide).unsqueeze(1)
        return base.delta(d_R1 * A_RI, b_O1 * B_OR)

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        return bias

    def in_file(self, key: str, tensor: Tensor, path: str, config: PeftConfig) -> Tensor | None:
        assert isinstance(config, VeraConfig)
        return tensor if path or config.save_projection else None


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform for a fan-in of the second dimension, with PEFT's gain."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _pair(base: AbstractBase, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The part of the shared pair that this layer uses, on its device."""
    out, inputs = base.shape()
    device = p[LAMBDA_D].device
    return p[A][:, :inputs].to(device), p[B][:out].to(device)

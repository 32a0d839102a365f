"""Do two models give the same outputs? The check after a merge and after a reload."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import UsageError
from veneer.engine.inputs import token_inputs

_TOKENS = 32
_ROWS = 2
_SAMPLES, _FRAMES = 16_000, 100
# Roundings between two orders of the same sums, in units of the dtype's epsilon, about four times what correct
# merges of models of 2 to 30 layers show. Sums are kept in float32, so the halves are rounded once a layer only.
_SLACK = {torch.bfloat16: 16.0, torch.float16: 16.0, torch.float32: 128.0, torch.float64: 128.0}


@dataclass(frozen=True)
class Difference:
    """How far two outputs on the same input are apart."""

    largest: float
    """The largest absolute difference of an output; NaN when either has values that are not finite."""
    scale: float
    """The largest absolute value of the first output."""
    dtype: torch.dtype
    """The precision that the models compute in."""

    @property
    def bound(self) -> float:
        """The largest difference that rounding in this dtype explains."""
        return _SLACK[self.dtype] * torch.finfo(self.dtype).eps * self.scale

    @property
    def equal(self) -> bool:
        """Whether the difference is no more than rounding."""
        return math.isfinite(self.largest) and self.largest <= self.bound


def fixed_input(model: nn.Module) -> dict[str, Tensor]:
    """The same input every time for a model: token ids, an image or a sound, that touch its whole range.

    Raises:
        UsageError: a model that takes none of these.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    name = model.main_input_name
    if name == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        ids = (torch.arange(_ROWS * _TOKENS, device=device) * 7919 % vocabulary).reshape(_ROWS, _TOKENS)
        given = token_inputs(model, ids)
        return {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    if name == "pixel_values":
        side = config.image_size
        shape = (1, config.num_channels, side, side) if isinstance(side, int) else (1, config.num_channels, *side)
        return {name: torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape).to(_dtype(model))}
    sound = _sound(name, config)
    if sound is not None:
        given = {name: torch.linspace(-1, 1, math.prod(sound), device=device).reshape(sound).to(_dtype(model))}
        if not config.is_encoder_decoder:
            return given
        most = min(_TOKENS, getattr(config, "max_target_positions", None) or _TOKENS)
        ids = torch.arange(most, device=device) * 7919 % config.get_text_config().vocab_size
        return {**given, "decoder_input_ids": ids[None]}
    raise UsageError(
        f"{type(model).__name__} takes {name}, for which there is no fixed input to compare two models on; "
        "merge it without the comparison (--no-verify)."
    )


def _sound(name: str, config: Any) -> tuple[int, ...] | None:
    """The shape of a sound for a model: samples, or features in the order of Whisper's or that of others."""
    if name == "input_values":
        return 1, _SAMPLES
    if name == "input_features" and config.model_type == "whisper":
        return 1, config.num_mel_bins, 2 * config.max_source_positions
    if name == "input_features" and hasattr(config, "input_feat_per_channel"):
        return 1, _FRAMES, config.input_feat_per_channel * config.input_channels
    return None


def outputs(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The model's first output on an input, of spans both, in float32, without dropout. The model's mode is kept."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            result = model(**given)
    finally:
        model.train(training)
    ends = getattr(result, "end_logits", None)
    return (result[0] if ends is None else torch.stack([result[0], ends])).float()


def difference(expected: Tensor, found: Tensor, dtype: torch.dtype) -> Difference:
    """Compare two outputs of models that compute in ``dtype``."""
    largest = (expected - found).abs().max().item() if expected.shape == found.shape else math.nan
    return Difference(largest, expected.abs().max().item(), dtype)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

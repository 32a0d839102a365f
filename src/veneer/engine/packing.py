"""Whether a model keeps sequences apart that lie end to end in one row: tried out, not looked up in a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.core.errors import ConfigError
from veneer.engine import attention
from veneer.engine.head import underlying

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOW_PRECISION = 5e-2


@final
@dataclass(frozen=True)
class Packing:
    """Whether a model takes packed rows, and how to make it what it was."""

    reason: str | None
    """None when packed rows are safe; else why they are not, as the end of a sentence."""
    undo: Callable[[], None] = lambda: None
    """Gives the model its own attention back."""

    def check(self) -> None:
        """Refuse packing that was asked for by name.

        Raises:
            ConfigError: there is a reason against it.
        """
        if self.reason is not None:
            raise ConfigError(
                f"packing=on is not possible: {self.reason}. Use packing=auto, which then pads, or packing=off."
            )


def use_packing(model: nn.Module) -> Packing:
    """Make a transformers model ready for packed rows.

    Its attention becomes ``veneer.engine.attention``, and a few tokens are run through it both ways. Where the
    logits differ, it stays as it was.
    """
    bare: Any = underlying(model)
    if not hasattr(bare, "set_attn_implementation"):
        return Packing(f"{type(bare).__name__} is not a transformers model")
    before = bare.config._attn_implementation
    if before in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        # transformers' own flash attention takes the borders from the positions.
        return Packing(None)
    hooks: list[RemovableHandle] = []

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        bare.set_attn_implementation(before)

    was_training = bare.training
    bare.eval()
    try:
        with torch.no_grad():
            reason = _ready(bare, hooks)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        reason = f"{type(bare).__name__} does not take them ({str(error).splitlines()[0][:80]})"
    finally:
        bare.train(was_training)
    if reason is not None:
        undo()
        return Packing(reason)
    return Packing(None, undo)


def _ready(model: Any, hooks: list[RemovableHandle]) -> str | None:
    """Change a model's attention; why that does not do, if it does not."""
    ids = _tokens(model)
    alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in ids])
    attention.register()
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        return f"{type(model).__name__} has an attention of its own"
    if _keeps_apart(model, ids, alone):
        return None
    # A model that makes its mask without looking at the positions is handed the borders as the mask.
    hooks.append(model.register_forward_pre_hook(_with_borders, with_kwargs=True))
    if _keeps_apart(model, ids, alone):
        return None
    return f"{type(model).__name__} lets sequences see each other when they lie end to end"


def _with_borders(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = kwargs.get("position_ids")
    if positions is not None and kwargs.get("attention_mask") is None:
        kwargs = {**kwargs, "attention_mask": attention.borders(positions)}
    return args, kwargs


def _keeps_apart(model: Any, ids: list[Tensor], alone: Tensor) -> bool:
    """Whether packed and padded sequences have the logits that each has alone."""
    tolerance = _TOLERANCES.get(alone.dtype, _LOW_PRECISION) * max(1.0, float(alone.abs().max()))
    return all(float((logits - alone).abs().max()) <= tolerance for logits in _both_ways(model, ids))


def _tokens(model: Any) -> list[Tensor]:
    """Three sequences of random tokens, (1, T) each, the same on every call."""
    device = model.get_input_embeddings().weight.device
    vocabulary = int(model.config.get_text_config().vocab_size)
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=drawn).to(device) for length in (5, 3, 7)]


def _both_ways(model: Any, ids: list[Tensor]) -> list[Tensor]:
    """The logits of the sequences packed, and padded, each (all tokens, V)."""
    lengths = [part.shape[1] for part in ids]
    positions = torch.cat([torch.arange(length, device=ids[0].device) for length in lengths])[None]
    packed = model(input_ids=torch.cat(ids, dim=1), position_ids=positions, use_cache=False).logits[0]
    longest = max(lengths)
    rows = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in ids])
    mask = torch.arange(longest, device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    padded = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits
    return [packed, padded[mask]]

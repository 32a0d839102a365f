"""transformers' attention for packed and padded batches: functions registered through its own ``AttentionInterface``.

transformers tells from positions that begin anew that sequences lie end to end, and builds a T x T mask that lets
each see itself alone. Here the borders are handed on in the mask's place, and attention is run within them. Padded rows
go to torch's attention, or to a kernel where that keeps all weights for backward: on a CPU with dropout.

Shape legend: T tokens of all sequences, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine.inputs import token_inputs
from veneer.kernels import dropout as dropouts
from veneer.kernels.attention import attention, packed_attention, row_attention

NAME = "veneer"
"""The ``attn_implementation`` of a model that uses this."""

_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""What transformers' configs call the share of the attention weights that is dropped."""


def register() -> None:
    """Make the implementation known to transformers; a second time does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        module: the attention layer.
        query: (B, H, T, D).
        key: (B, G, T, D).
        value: (B, G, T, D).
        attention_mask: what ``mask`` made.
        scaling: what the scores are multiplied with; 1 / sqrt(D) without it.
        dropout: the share of the attention weights to drop.
        softcap: see ``packed_attention``.
        kwargs: whatever else the model passes on to transformers' own functions.

    Returns:
        (B, T, H, D), and None in the place of the attention weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        window, *starts = attention_mask.flatten().tolist()
        window = window or kwargs.get("sliding_window")
        out = packed_attention(
            query, key, value, starts, scaling=scaling, dropout=dropout, window=window, softcap=softcap
        )
    elif softcap is None and dropout and _served(module, query, key, attention_mask, kwargs):
        out = row_attention(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    elif softcap is not None:
        out = attention(query, key, value, scaling=scaling, dropout=dropout, softcap=softcap, seen=attention_mask)
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return plain
    return out.transpose(1, 2).contiguous(), None


def _served(module: nn.Module, q: Tensor, k: Tensor, seen: Tensor | None, others: dict[str, Any]) -> bool:
    """Whether ``row_attention`` computes what a layer asks for, and is better at it than torch."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not dropouts.repeatable(q):
        return False
    if q.shape[1] != k.shape[1] or any(others.get(name) is not None for name in ("position_bias", "cache")):
        return False
    if seen is not None:
        return seen.dtype == torch.bool
    causal = others.get("is_causal")
    return not (getattr(module, "is_causal", True) if causal is None else causal)


def use_rows(model: Any) -> Callable[[], None] | None:
    """Let a model that reads tokens and drops attention weights attend by this, on a CPU.

    A few tokens are run both ways. Where the outputs differ, the model stays as it was.

    Returns:
        What gives it its own attention back; None where there is nothing to gain, or it has another attention.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(model, "main_input_name", "") != "input_ids":
        return None
    embeddings = model.get_input_embeddings()
    if embeddings is None or not any(getattr(config, name, 0.0) for name in _DROPOUTS):
        return None
    if embeddings.weight.device.type != "cpu":
        return None

    def undo() -> None:
        model.set_attn_implementation("sdpa")

    ids = torch.arange(6).view(2, 3) % embeddings.weight.shape[0]
    inputs = {**token_inputs(model, ids), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    if inputs["input_ids"].dim() == 3:
        inputs["attention_mask"] = inputs["attention_mask"][None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            own = model(**inputs)[0]
            register()
            model.set_attn_implementation(NAME)
            kept = model.config._attn_implementation == NAME and torch.equal(model(**inputs)[0], own)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
        kept = False
    finally:
        model.train(was_training)
    if not kept:
        undo()
        return None
    return undo


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a batch, or the borders of a packed one.

    Returns:
        For a packed row (1, 1, 1, S + 2) int32: the attention window (0 for none), where each sequence begins, and T.
        Otherwise what transformers' ``sdpa_mask`` gives.
    """
    packed = (
        attention_mask is None
        and batch_size == 1
        and q_length == kv_length
        and not (allow_is_causal_skip or use_vmap or kwargs.get("q_offset") or kwargs.get("kv_offset"))
    )
    found = _borders(mask_function, q_length, device) if packed else None
    if found is not None:
        return found
    from transformers.masking_utils import sdpa_mask

    whole: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    return whole


def borders(position_ids: Tensor) -> Tensor | None:
    """What ``mask`` gives for one row of positions (1, T), told from where they begin anew; None for one sequence."""
    begins = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    if position_ids.shape[0] != 1 or not len(begins):
        return None
    row = [0, 0, *begins.tolist(), position_ids.shape[1]]
    return torch.tensor(row, dtype=torch.int32)[None, None, None]


def _borders(sees: Callable[..., Tensor], length: int, device: torch.device | str) -> Tensor | None:
    """The borders that a pattern of attention has; None where it is more than windows within sequences."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    at = torch.arange(length, device=device)

    def seen(query: Tensor, key: Tensor) -> Tensor:
        return torch.as_tensor(sees(zero, zero, query, key), device=device).expand(
            torch.broadcast_shapes(query.shape, key.shape)
        )

    begins = torch.cat([torch.ones(1, dtype=torch.bool, device=device), ~seen(at[1:], at[:-1])])
    starts = torch.cat([begins.nonzero().flatten(), torch.tensor([length], device=device)])
    lengths = starts.diff()
    longest = int(lengths.argmax())
    first, last = starts[longest], starts[longest + 1] - 1
    reach = int(seen(last, torch.arange(int(first), int(last) + 1, device=device)).sum())
    window = reach if reach < int(lengths[longest]) else 0
    # Each sequence's last token must see just what that says, and nothing of the sequence before it.
    ends = starts[1:] - 1
    furthest = torch.maximum(starts[:-1], ends - window + 1) if window else starts[:-1]
    before = furthest - 1
    inside = seen(ends, furthest).all()
    outside = seen(ends[before >= 0], before[before >= 0]).any()
    ahead = seen(at[:-1], at[1:]).any()
    if not inside or outside or ahead:
        return None
    # On the CPU, where every layer reads it without waiting for the device.
    return torch.cat([torch.tensor([window]), starts.cpu()]).to(torch.int32)[None, None, None]

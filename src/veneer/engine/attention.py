"""transformers' attention for packed batches: functions registered through its own ``AttentionInterface``.

transformers tells from positions that begin anew that sequences lie end to end, and builds a T x T mask that lets
each see itself alone. Here the borders are handed on in the mask's place, and attention is run within them.

Shape legend: T tokens of all sequences, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.attention import attention, packed_attention

NAME = "veneer"
"""The ``attn_implementation`` of a model that uses this."""


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
    elif softcap is not None:
        out = attention(query, key, value, scaling=scaling, dropout=dropout, softcap=softcap, seen=attention_mask)
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return plain
    return out.transpose(1, 2).contiguous(), None


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

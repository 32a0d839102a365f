"""Attention over sequences that lie end to end, each seeing itself alone.

Shape legend: B rows, H heads, G key and value heads, T tokens of all sequences, L tokens of one, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_VARLEN_CAPABILITY = (8, 0)
"""The first NVIDIA generation (Ampere) that flash attention runs on."""


def packed_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    starts: Sequence[int],
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each of the sequences of one row.

    On a CPU, sequence by sequence: no product is computed whose result is masked away, and neighbours of one
    length share a call. On a GPU that has it, torch's varlen flash kernel (not run on that hardware here).

    Args:
        q_BHTD: queries, B = 1.
        k_BGTD: keys; H is a multiple of G.
        v_BGTD: values.
        starts: where each sequence begins, ascending from 0, and T at the end.
        scaling: what the scores are multiplied with.
        dropout: the share of the attention weights to drop.
        window: the most tokens that one sees, itself among them; all before it without.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        (1, H, T, D).
    """
    if _has_varlen(q_BHTD, dropout, softcap):
        return _varlen(q_BHTD, k_BGTD, v_BGTD, starts, scaling, window)
    runs = [(length, len(list(group))) for length, group in groupby(end - start for start, end in pairwise(starts))]
    # Split as a whole: a slice for each sequence would fill a gradient of all tokens with zeros, each time.
    parts = zip(
        *(torch.split(x[0], [length * rows for length, rows in runs], dim=1) for x in (q_BHTD, k_BGTD, v_BGTD)),
        strict=True,
    )
    outputs = []
    for (length, rows), tensors in zip(runs, parts, strict=True):
        q, k, v = (x.reshape(x.shape[0], rows, length, -1).transpose(0, 1) for x in tensors)
        out = attention(q, k, v, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
        outputs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, dim=1)[None] if len(outputs) > 1 else outputs[0][None]


def attention(
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Attention of whole sequences, (B, H, L, D): causal, or as a boolean mask says.

    Args as in ``packed_attention``; ``seen`` is a mask that broadcasts to (B, H, L, L), true where a token is seen.
    """
    length = q_BHLD.shape[2]
    shared = q_BHLD.shape[1] != k_BGLD.shape[1]
    if seen is None and (softcap is not None or (window is not None and window < length)):
        seen = _band(length, window, q_BHLD.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_BHLD, k_BGLD, v_BGLD, seen, dropout, is_causal=seen is None, scale=scaling, enable_gqa=shared
        )
    assert seen is not None
    if shared:
        k_BGLD, v_BGLD = (part.repeat_interleave(q_BHLD.shape[1] // part.shape[1], 1) for part in (k_BGLD, v_BGLD))
    scores = torch.tanh(q_BHLD @ k_BGLD.transpose(2, 3) * (scaling / softcap)) * softcap
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=wide).to(scores.dtype), dropout)
    return weights @ v_BGLD


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L): whether a row's token sees a column's."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def _has_varlen(q: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether torch's flash kernel for sequences of unequal lengths is there and can do what is asked."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and softcap is None
        and torch.cuda.get_device_capability(q.device) >= MIN_VARLEN_CAPABILITY
        and find_spec("torch.nn.attention.varlen") is not None
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scaling: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor(starts, dtype=torch.int32, device=q.device)
    longest = max(end - start for start, end in pairwise(starts))
    q_THD, k_TGD, v_TGD = (part[0].transpose(0, 1) for part in (q, k, v))
    left = -1 if window is None else window - 1
    shared = q.shape[1] != k.shape[1]
    out_THD = varlen_attn(
        q_THD, k_TGD, v_TGD, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=shared
    )
    return out_THD.transpose(0, 1)[None]  # type: ignore[union-attr]

"""Attention over sequences that lie end to end, each seeing itself alone, and over the rows of padded batches.

Shape legend: B rows, H heads, G key and value heads, T tokens of all sequences, L tokens of one, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import dropout as dropouts

BLOCK = 128
"""Queries whose scores exist at a time on a CPU: what they do not see of a causal sequence is not computed."""

SCORES = 2**19
"""Scores of a padded batch that exist at a time on a CPU: 2 MiB of float32, which stay in the cache."""

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

    On a CPU, block by block of each sequence in plain products: torch's own kernel for it takes up to four times as
    long backward. On a GPU that has it, torch's varlen flash kernel (not run on that hardware here).

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
    if q_BHTD.device.type == "cpu" and not dropout and softcap is None:
        out: Tensor = _Blocks.apply(q_BHTD[0], k_BGTD[0], v_BGTD[0], tuple(starts), scaling, window)  # type: ignore[no-untyped-call]
        return out[None]
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


class _Blocks(torch.autograd.Function):
    """Of the weights nothing is kept: backward computes them again, as flash attention does (arXiv 2205.14135).

    The heads that share keys and values are rows of one product. All is computed in float32 or wider. More shapes:
    Q queries of a block, K keys that they may see, R query heads to a key head, S = R Q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: Tensor,
        k_GTD: Tensor,
        v_GTD: Tensor,
        starts: tuple[int, ...],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q_HTD, k_GTD, v_GTD)
        ctx.starts, ctx.scaling, ctx.window = starts, scaling, window
        out_HTD = _in_order_of_tokens(q_HTD)
        # Autocast would round here, and not in the backward pass, which computes the same again.
        with torch.autocast(q_HTD.device.type, enabled=False):
            for queries, keys in _blocks(starts, window):
                _, _, w_GSK = _weights(q_HTD[:, queries], k_GTD[:, keys], scaling, window)
                out_GSD = torch.bmm(w_GSK, v_GTD[:, keys].to(w_GSK.dtype))
                out_HTD[:, queries].copy_(out_GSD.view(q_HTD[:, queries].shape))
        return out_HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HTD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_GTD, v_GTD = ctx.saved_tensors
        d_q = _in_order_of_tokens(q_HTD)
        wide = _wide(q_HTD)
        # Keys are seen by several blocks, whose gradients are added up.
        d_k, d_v = (torch.zeros_like(part, dtype=wide) for part in (k_GTD, v_GTD))
        for queries, keys in _blocks(ctx.starts, ctx.window):
            q_GSD, k_GKD, w_GSK = _weights(q_HTD[:, queries], k_GTD[:, keys], ctx.scaling, ctx.window)
            g_GSD = grad_HTD[:, queries].to(wide).reshape(q_GSD.shape)
            d_v[:, keys].add_(torch.bmm(w_GSK.transpose(1, 2), g_GSD))
            d_w = torch.bmm(g_GSD, v_GTD[:, keys].to(wide).transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_w, w_GSK, -1, wide)
            d_q[:, queries].copy_(torch.bmm(d_scores, k_GKD).mul_(ctx.scaling).view(d_q[:, queries].shape))
            d_k[:, keys].add_(torch.bmm(d_scores.transpose(1, 2), q_GSD))
        return d_q, d_k.to(k_GTD.dtype), d_v.to(v_GTD.dtype), None, None, None


def _in_order_of_tokens(x: Tensor, width: int | None = None) -> Tensor:
    """Room for (..., H, T, D) whose memory is in the order (..., T, H, D), as the layers around attention have it."""
    *rows, H, T, D = x.shape
    return x.new_empty(*rows, T, H, D if width is None else width).transpose(-3, -2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(starts: Sequence[int], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Stretches of queries of one sequence each, with the keys that they may see."""
    for begin, end in pairwise(starts):
        for first in range(begin, end, BLOCK):
            last = min(first + BLOCK, end)
            yield slice(first, last), slice(begin if window is None else max(begin, first - window + 1), last)


def _weights(q_HQD: Tensor, k_GKD: Tensor, scaling: float, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled queries (G, S, D), the keys, and what each query makes of each key, (G, S, K)."""
    (H, Q, D), (G, K, _) = q_HQD.shape, k_GKD.shape
    wide = _wide(q_HQD)
    q_GSD, k_GKD = q_HQD.to(wide).mul(scaling).reshape(G, H // G * Q, D), k_GKD.to(wide)
    scores = torch.bmm(q_GSD, k_GKD.transpose(1, 2))
    each = scores.view(G, H // G, Q, K)
    # The last query is the last key; only among the last Q keys are some later than a query.
    each[..., K - Q :].add_(_later(Q, wide))
    if window is not None and window < K:
        each.add_(_before(Q, K, window, wide))
    return q_GSD, k_GKD, scores.softmax(-1)


def _later(length: int, dtype: torch.dtype) -> Tensor:
    """(L, L): -inf where a column's token is later than the row's."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)


def _before(queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """(Q, K): -inf where a key is out of a query's window."""
    return torch.full((queries, keys), float("-inf"), dtype=dtype).tril_(keys - queries - window)


def row_attention(
    q_BHLD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    seen: Tensor | None = None,
    *,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention of the rows of a padded batch, a few at a time, of which nothing is kept for backward.

    Torch's own on a CPU keeps the weights, the mask and the product of both where there is dropout; here the mask is
    drawn again from where the generator stood. It need not be the one that torch's own draws from the same seed.

    Args:
        q_BHLD: queries.
        k_BHKD: keys.
        v_BHKD: values.
        seen: a boolean mask that broadcasts to (B, H, L, K), true where a query sees a key; a query that sees none
            gets zeros. Without it each sees all.
        scaling: what the scores are multiplied with.
        dropout: the share of the attention weights to drop.

    Returns:
        (B, H, L, D).
    """
    out: Tensor = _Rows.apply(q_BHLD, k_BHKD, v_BHKD, seen, scaling, dropout)  # type: ignore[no-untyped-call]
    return out


class _Rows(torch.autograd.Function):
    """As ``_Blocks`` for rows of one length. N is the heads of a few rows."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHLD: Tensor,
        k_BHKD: Tensor,
        v_BHKD: Tensor,
        seen: Tensor | None,
        scaling: float,
        p: float,
    ) -> Tensor:
        ctx.save_for_backward(q_BHLD, k_BHKD, v_BHKD, seen)
        ctx.scaling, ctx.p, ctx.states = scaling, p, []
        out_BHLD = _in_order_of_tokens(q_BHLD, v_BHKD.shape[3])
        with torch.autocast(q_BHLD.device.type, enabled=False):
            for rows in _some_rows(q_BHLD, k_BHKD):
                _, _, w_NLK = _row_weights(q_BHLD[rows], k_BHKD[rows], _of_rows(seen, rows), scaling)
                ctx.states.append(dropouts.state_of(w_NLK.device))
                w_NLK.mul_(dropouts.mask(w_NLK.shape, p, dtype=w_NLK.dtype, device=w_NLK.device))
                v_NKD = _heads(v_BHKD[rows], w_NLK.dtype)
                out_NLD = torch.bmm(w_NLK, v_NKD)
                out_BHLD[rows].copy_(out_NLD.mul_(dropouts.weight(p)).view(out_BHLD[rows].shape))
        return out_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLD, k_BHKD, v_BHKD, seen = ctx.saved_tensors
        d_q, d_k, d_v = (_in_order_of_tokens(x) for x in (q_BHLD, k_BHKD, v_BHKD))
        for rows, state in zip(_some_rows(q_BHLD, k_BHKD), ctx.states, strict=True):
            q_NLD, k_NKD, w_NLK = _row_weights(q_BHLD[rows], k_BHKD[rows], _of_rows(seen, rows), ctx.scaling)
            g_NLD = _heads(grad_BHLD[rows], w_NLK.dtype)
            mask = dropouts.mask(w_NLK.shape, ctx.p, dtype=w_NLK.dtype, device=w_NLK.device, state=state)
            g_NLD = g_NLD * dropouts.weight(ctx.p)
            d_w = torch.bmm(g_NLD, _heads(v_BHKD[rows], w_NLK.dtype).transpose(1, 2)).mul_(mask)
            d_v[rows].copy_(torch.bmm(mask.mul_(w_NLK).transpose(1, 2), g_NLD).view(d_v[rows].shape))
            d_scores = torch._softmax_backward_data(d_w, w_NLK, -1, w_NLK.dtype)
            d_q[rows].copy_(torch.bmm(d_scores, k_NKD).mul_(ctx.scaling).view(d_q[rows].shape))
            d_k[rows].copy_(torch.bmm(d_scores.transpose(1, 2), q_NLD).view(d_k[rows].shape))
        return d_q, d_k, d_v, None, None, None


def _some_rows(q_BHLD: Tensor, k_BHKD: Tensor) -> Iterator[slice]:
    """Rows whose scores may exist at a time; at least one."""
    B, H, L, _ = q_BHLD.shape
    count = max(1, SCORES // (H * L * k_BHKD.shape[2]))
    for first in range(0, B, count):
        yield slice(first, first + count)


def _of_rows(seen: Tensor | None, rows: slice) -> Tensor | None:
    return seen if seen is None or seen.shape[0] == 1 else seen[rows]


def _heads(x_BHLD: Tensor, dtype: torch.dtype) -> Tensor:
    """The heads of some rows as the batch of a product."""
    return x_BHLD.to(dtype).reshape(-1, *x_BHLD.shape[2:])


def _row_weights(q_BHLD: Tensor, k_BHKD: Tensor, seen: Tensor | None, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled queries (N, L, D), the keys (N, K, D), and what each query makes of each key, (N, L, K)."""
    wide = _wide(q_BHLD)
    q_NLD, k_NKD = _heads(q_BHLD, wide) * scaling, _heads(k_BHKD, wide)
    scores = torch.bmm(q_NLD, k_NKD.transpose(1, 2))
    if seen is None:
        return q_NLD, k_NKD, scores.softmax(-1)
    each = scores.view(*q_BHLD.shape[:3], -1)
    each.masked_fill_(~seen, float("-inf"))
    weights = scores.softmax(-1)
    blind = ~seen.any(-1, keepdim=True)
    if blind.any():
        weights.view(each.shape).masked_fill_(blind, 0.0)
    return q_NLD, k_NKD, weights


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

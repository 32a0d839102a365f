from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from veneer.kernels import attention as kernel
from veneer.kernels import dropout as dropouts
from veneer.kernels.attention import BLOCK, attention, packed_attention, row_attention

STARTS = (0, 4, 8, 9, 15)


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """Attention over all tokens with a mask of all pairs, in plain sums."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    length = q.shape[2]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for start, end in pairwise(STARTS):
        for query in range(start, end):
            first = start if window is None else max(start, query - window + 1)
            seen[query, first : query + 1] = True
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def tensors(heads: int = 4, groups: int = 2) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(1, count, STARTS[-1], 6, dtype=torch.float64, requires_grad=True)
        for count in (heads, groups, groups)
    )


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_outputs_and_gradients_are_those_of_a_mask_of_all_pairs(
    groups: int, window: int | None, softcap: float | None
) -> None:
    q, k, v = tensors(groups=groups)
    found = packed_attention(q, k, v, STARTS, scaling=0.3, window=window, softcap=softcap)
    expected = reference(q, k, v, window, softcap)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(found, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("window", [None, 5, 140, 200])
def test_sequences_of_several_blocks(window: int | None) -> None:
    starts = (0, BLOCK - 1, 3 * BLOCK + 9, 3 * BLOCK + 10)
    q, k, v = (torch.randn(1, n, starts[-1], 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    found = packed_attention(q, k, v, starts, scaling=0.3, window=window)
    alone = [
        attention(*(part[:, :, first:last] for part in (q, k, v)), scaling=0.3, window=window)
        for first, last in pairwise(starts)
    ]
    expected = torch.cat(alone, dim=2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(found, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_bfloat16_is_rounded_where_it_comes_in_and_goes_out() -> None:
    narrow = [part.detach().bfloat16().requires_grad_() for part in tensors()]
    wide = [part.detach().float().requires_grad_() for part in narrow]
    found, expected = (packed_attention(*parts, STARTS, scaling=0.3) for parts in (narrow, wide))
    assert torch.equal(found, expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed_attention(*narrow, STARTS, scaling=0.3), found)
    weights = torch.randn_like(found)
    for got, wanted in zip(
        torch.autograd.grad(found, narrow, weights),
        torch.autograd.grad(expected, wide, weights.float()),
        strict=True,
    ):
        assert torch.equal(got, wanted.bfloat16())


def test_outputs_lie_in_the_order_of_tokens() -> None:
    q, k, v = tensors()
    found = packed_attention(q, k, v, STARTS, scaling=0.3)
    # The layer behind it reads (B, T, H, D), without a copy.
    assert found.transpose(1, 2).is_contiguous()


def test_dropout_drops_attention_weights_alone() -> None:
    q, k, v = tensors()
    everything = packed_attention(q, k, v, STARTS, scaling=0.3, dropout=1.0)
    assert not everything.any()
    # A first token sees itself alone, so that dropping scales or clears it.
    first = packed_attention(q, k, v, STARTS, scaling=0.3, dropout=0.5, softcap=9.0)[0, :, 0]
    assert all(not row.any() or torch.allclose(row, 2 * v[0, head // 2, 0]) for head, row in enumerate(first))


def test_a_mask_of_ones_own() -> None:
    q, k, v = tensors()
    seen = torch.ones(STARTS[-1], STARTS[-1], dtype=torch.bool)
    for softcap in (None, 1e9):
        found = attention(q, k, v, scaling=0.3, seen=seen, softcap=softcap)
        keys, values = (part.repeat_interleave(2, 1) for part in (k, v))
        torch.testing.assert_close(found, (q @ keys.transpose(2, 3) * 0.3).softmax(-1) @ values)


def rows(B: int = 5, H: int = 3, L: int = 7, K: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(B, H, n, 4, dtype=dtype, requires_grad=True) for n in (L, K, K)]


def some_mask(B: int = 5, L: int = 7, K: int = 7) -> Tensor:
    """Padded rows of several lengths; one query of the second row sees nothing."""
    seen = (torch.arange(K) < torch.tensor([7, 4, 1, 6, 7])[:B, None])[:, None, None].repeat(1, 1, L, 1)
    seen[1, 0, 2] = False
    return seen


@pytest.mark.parametrize("scores", [2**19, 3 * 7 * 7 * 2, 1], ids=["all rows at once", "two", "one"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_rows_of_a_padded_batch(p: float, masked: bool, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SCORES", scores)
    q, k, v = rows()
    seen = some_mask() if masked else None
    torch.manual_seed(3)
    found = row_attention(q, k, v, seen, scaling=0.3, dropout=p)
    # The same draws in one go: the generator gives rows in their order.
    weights = q @ k.transpose(2, 3) * 0.3
    if seen is not None:
        weights = weights.masked_fill(~seen, -math.inf)
    weights = torch.nan_to_num(weights.softmax(-1))
    torch.manual_seed(3)
    step = max(1, scores // (3 * 7 * 7))
    drawn = [dropouts.mask((len(part) * 3, 7, 7), p, dtype=q.dtype, device=q.device) for part in q.split(step)]
    expected = (weights * torch.cat(drawn).view(weights.shape) * dropouts.weight(p)) @ v
    torch.testing.assert_close(found, expected)
    given = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), given)
    torch.rand(9)  # the generator has moved on
    for got, gradient in zip(torch.autograd.grad(found, (q, k, v), given), wanted, strict=True):
        torch.testing.assert_close(got, torch.nan_to_num(gradient))


@pytest.mark.parametrize("shape", [(1, 1, 7, 5), (5, 1, 1, 5), (5, 3, 7, 5)], ids=str)
def test_rows_without_dropout_are_torchs_attention(shape: tuple[int, ...]) -> None:
    q, k, _ = rows(K=5)
    v = torch.randn(5, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    seen = torch.rand(shape) < 0.7
    seen[..., 0] = True
    found = row_attention(q, k, v, seen, scaling=0.3, dropout=0.0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3)
    torch.testing.assert_close(found, expected)
    assert found.transpose(1, 2).is_contiguous()
    assert torch.autograd.gradcheck(lambda *parts: row_attention(*parts, seen, scaling=0.3, dropout=0.0), (q, k, v))


def test_rows_in_bfloat16_are_rounded_where_they_come_in_and_go_out() -> None:
    narrow = rows(dtype=torch.bfloat16)
    wide = [part.detach().float().requires_grad_() for part in narrow]
    seen = some_mask()
    outputs = []
    for parts in (narrow, wide):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(row_attention(*parts, seen, scaling=0.3, dropout=0.2))
    found, expected = outputs
    assert torch.equal(found, expected.bfloat16())
    given = torch.randn_like(found)
    gradients = torch.autograd.grad(found, narrow, given), torch.autograd.grad(expected, wide, given.float())
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted.bfloat16())

"""NF4 and int8 against bitsandbytes' own."""

from __future__ import annotations

import pytest
import torch

from veneer.kernels.quantise import BLOCK, NF4, int8_rounded, nf4_rounded

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("shape", [(40, 48), (40, 64), (3, 7), (1, BLOCK), (5, BLOCK + 1)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape: tuple[int, int]) -> None:
    """Its codes and scales are read here: its own way back is wrong on CPU where rows are not whole blocks (0.50)."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, state = bnb.functional.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: W.numel()].long()
    scales = state.absmax.repeat_interleave(BLOCK)[: W.numel()]
    assert torch.equal(nf4_rounded(W), (state.code[codes] * scales).view(shape))


def test_int8_is_bitsandbytes() -> None:
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).half()
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(W)
    theirs = bnb.functional.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(int8_rounded(W.float()), theirs.float(), rtol=1e-6, atol=1e-6)


def test_values_of_the_code_are_kept_and_zero_stays_zero() -> None:
    code = torch.tensor([NF4 * 4]) * 3
    assert torch.equal(nf4_rounded(code), code)
    assert torch.equal(nf4_rounded(torch.zeros(2, 70)), torch.zeros(2, 70))
    assert torch.equal(int8_rounded(torch.zeros(2, 7)), torch.zeros(2, 7))

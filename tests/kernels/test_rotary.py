from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from veneer.kernels import reference
from veneer.kernels.rotary import rotary

F64 = torch.float64


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 3, 5, 8, dtype=F64, requires_grad=True)
    # Of any kind, also such that the halves differ.
    return x, torch.randn(2, 1, 5, 8, dtype=F64), torch.randn(2, 1, 5, 8, dtype=F64)


def test_values_and_gradients() -> None:
    x, cos, sin = operands()
    found, expected = rotary(x, cos, sin), reference.rotary(x, cos, sin)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    theirs, _ = apply_rotary_pos_emb(x, x, cos[:, 0], sin[:, 0])
    torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (got,), (wanted,) = (torch.autograd.grad(y, x, weights) for y in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,))


def test_nothing_of_its_input_is_kept() -> None:
    x, cos, sin = operands()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        rotary(x, cos, sin)
    assert sorted(kept) == sorted([cos.data_ptr(), sin.data_ptr()])


def test_without_gradients_it_is_the_same() -> None:
    x, cos, sin = operands()
    with torch.no_grad():
        assert torch.equal(rotary(x, cos, sin), reference.rotary(x, cos, sin)) or torch.allclose(
            rotary(x, cos, sin), reference.rotary(x, cos, sin), rtol=1e-12
        )

"""Linear layers of one input together, and the gated feed-forward block, against the plain formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import reference
from veneer.kernels.gated_mlp import activate, gated_mlp
from veneer.kernels.lora_group import Member, lora_group

F64 = torch.float64
IN, FEATURES = 4, 6


def member(out: int, inputs: int, r: int | None, *, bias: bool = False, learns: str = "AB") -> Member:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64)

    A, B = (None, None) if r is None else (tensor(r, inputs), tensor(out, r))
    for name, factor in (("A", A), ("B", B)):
        if factor is not None and name in learns:
            factor.requires_grad_()
    return Member(tensor(out, inputs), tensor(out) if bias else None, A, B, 0.7)


def plain(x: Tensor, m: Member) -> Tensor:
    if m.A_RI is None or not m.dropout:
        return reference.adapted_linear(x, m.W_OI, m.bias, m.A_RI, m.B_OR, m.scaling)
    return reference.lora_linear(x, m.W_OI, m.bias, m.A_RI, m.B_OR, m.scaling, F.dropout(x, m.dropout))


def compare(x: Tensor, members: Sequence[Member], found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    learning = [t for m in members for t in (m.A_RI, m.B_OR) if t is not None and t.requires_grad]
    wanted = ([x] if x.requires_grad else []) + learning
    assert [y.requires_grad for y in found] == [y.requires_grad for y in expected]
    found, expected = ([y for y in outputs if y.requires_grad] for outputs in (found, expected))
    weights = [torch.randn_like(y) for y in expected]
    if not wanted:
        return
    for got, right in zip(
        torch.autograd.grad(found, wanted, weights, allow_unused=True),
        torch.autograd.grad(expected, wanted, weights, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ranks", list(itertools.product((None, 2), repeat=3)))
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)])
def test_a_group_is_its_members(ranks: tuple[int | None, ...], needs_x: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=F64, requires_grad=needs_x)
    members = [
        member(out, IN, r, bias=bias) for out, r, bias in zip((6, 3, 3), ranks, (True, False, True), strict=True)
    ]
    compare(x, members, lora_group(x, members), [plain(x, m) for m in members])
    with torch.no_grad():
        for ours, m in zip(lora_group(x, members), members, strict=True):
            torch.testing.assert_close(ours, plain(x, m))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 2), (2,)])
def test_outputs_that_nobody_uses(used: tuple[int, ...]) -> None:
    x = torch.randn(5, IN, dtype=F64, requires_grad=True)
    members = [member(3, IN, 2), member(3, IN, 1), member(3, IN, None)]
    learning = [t for m in members[:2] for t in (m.A_RI, m.B_OR)]
    found, expected = lora_group(x, members), [plain(x, m) for m in members]
    ours, theirs = (sum(outputs[at].square().sum() for at in used) for outputs in (found, expected))
    got = torch.autograd.grad(ours, [x, *learning], materialize_grads=True, allow_unused=True)
    right = torch.autograd.grad(theirs, [x, *learning], materialize_grads=True, allow_unused=True)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("learns", ["A", "B", ""])
def test_a_frozen_factor(learns: str) -> None:
    x = torch.randn(5, IN, dtype=F64, requires_grad=True)
    members = [member(3, IN, 2, learns=learns), member(2, IN, 1, learns=learns)]
    compare(x, members, lora_group(x, members), [plain(x, m) for m in members])


@pytest.mark.parametrize("dropouts", [(0.4, 0.0, 0.4), (0.0, 0.4, 0.9), (0.4, 0.0, 1.0)])
@pytest.mark.parametrize("learns", ["AB", "A", "B"])
@pytest.mark.parametrize("needs_x", [True, False])
def test_dropout_draws_what_the_layers_would_draw(dropouts: tuple[float, ...], learns: str, needs_x: bool) -> None:
    x = torch.randn(2, 7, IN, dtype=F64, requires_grad=needs_x)

    def dropped(*outs: tuple[int, int, int | None]) -> list[Member]:
        made = [member(*shape, learns=learns) for shape in outs]
        return [replace(m, dropout=p) for m, p in zip(made, dropouts, strict=True)]

    def drawn(run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        torch.manual_seed(7)
        return run()

    members = dropped((6, IN, 2), (3, IN, 1), (3, IN, None))
    compare(x, members, drawn(lambda: lora_group(x, members)), drawn(lambda: [plain(x, m) for m in members]))
    parts = dropped((FEATURES, IN, 2), (FEATURES, IN, 1), (IN, FEATURES, 2))
    compare(x, parts, drawn(lambda: [gated_mlp(x, *parts, "silu")]), drawn(lambda: [plain_block(x, parts, "silu")]))
    with torch.no_grad():
        for ours, own in zip(
            drawn(lambda: lora_group(x, members)), drawn(lambda: [plain(x, m) for m in members]), strict=True
        ):
            torch.testing.assert_close(ours, own)


def kept_by(run: Callable[[], object]) -> set[int]:
    kept: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.add(t.data_ptr()), t)[1], lambda t: t):
        run()
    return kept


@pytest.mark.parametrize(("learns", "keeps"), [("AB", True), ("B", False)])
def test_the_input_is_kept_only_for_an_A_that_learns(learns: str, keeps: bool) -> None:
    x = torch.randn(5, IN, dtype=F64, requires_grad=True)
    members = [member(3, IN, 2, learns=learns), member(3, IN, None)]
    assert (x.data_ptr() in kept_by(lambda: lora_group(x, members))) == keeps


def block(ranks: Sequence[int | None]) -> list[Member]:
    gate, up, down = ranks
    return [member(FEATURES, IN, gate), member(FEATURES, IN, up), member(IN, FEATURES, down)]


def plain_block(x: Tensor, members: Sequence[Member], activation: str) -> Tensor:
    gate, up, down = members
    return plain(activate(plain(x, gate), activation) * plain(x, up), down)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("ranks", list(itertools.product((None, 2), repeat=3)))
@pytest.mark.parametrize("needs_x", [True, False])
def test_a_gated_block(activation: str, ranks: tuple[int | None, ...], needs_x: bool) -> None:
    x = torch.randn(2, 3, IN, dtype=F64, requires_grad=needs_x)
    members = block(ranks)
    compare(x, members, [gated_mlp(x, *members, activation)], [plain_block(x, members, activation)])
    with torch.no_grad():
        torch.testing.assert_close(gated_mlp(x, *members, activation), plain_block(x, members, activation))


def test_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    x = torch.randn(100)
    for ours, theirs in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")):
        torch.testing.assert_close(activate(x, ours), ACT2FN[theirs](x))


def test_gradcheck() -> None:
    x = torch.randn(3, IN, dtype=F64, requires_grad=True)
    gate, up, down = block((2, None, 1))
    assert torch.autograd.gradcheck(
        lambda x, A, B: gated_mlp(x, Member(gate.W_OI, None, A, B, 0.7), up, down, "silu"), (x, gate.A_RI, gate.B_OR)
    )
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_group(x, [Member(gate.W_OI, None, A, B, 0.7), up]), (x, gate.A_RI, gate.B_OR)
    )


def test_a_block_keeps_what_comes_out_of_gate_and_up_and_no_more_of_that_size() -> None:
    x = torch.randn(50, IN, dtype=F64, requires_grad=True)
    members = block((2, 2, 2))
    sizes: list[int] = []
    weights = {t.data_ptr() for m in members for t in (m.W_OI, m.A_RI, m.B_OR)}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()) if t.data_ptr() not in weights else None, t)[1], lambda t: t
    ):
        gated_mlp(x, *members, "silu")
    assert sorted(sizes) == sorted([50 * IN, 50 * FEATURES, 50 * FEATURES, 50 * 4, 50 * 2])

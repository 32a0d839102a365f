"""Several linear layers that read the same input, adapted or frozen, as one function: query, key and value above all.

Autograd would make a full gradient of the input for each and add them up; here each adds its own into one tensor, and
the thin factors A, stacked, read the input once. The input is kept once, and only if a factor A learns. Under dropout
each A reads what its own mask leaves of the input; masks are drawn in the order of the layers, and again for backward.

Shape legend: N tokens, I inputs, O outputs, R rank, S the ranks of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import dropout as dropout_


@dataclass(frozen=True)
class Member:
    """One linear layer: ``W x + bias + scaling * B A drop(x)``."""

    W_OI: Tensor
    """Its frozen weight."""
    bias: Tensor | None = None
    """Its frozen bias."""
    A_RI: Tensor | None = None
    """The first factor of its adapter; None where it has none."""
    B_OR: Tensor | None = None
    """The second factor."""
    scaling: float = 1.0
    dropout: float = 0.0
    """The share of the input that A does not see."""

    @property
    def factor(self) -> float:
        """What B is multiplied with; masks are not scaled up themselves."""
        return self.scaling * dropout_.weight(self.dropout)


Numbers = tuple[tuple[float, float], ...]
"""The scaling and the dropout of each member."""

States = list[Tensor | None]
"""For each adapted member where its mask was drawn from; None where it has no dropout."""


def forward_members(x_NI: Tensor, members: Sequence[Member]) -> tuple[list[Tensor], Tensor | None, States]:
    """The outputs (N, O) of all members, ``A drop(x)^T`` of all adapters, (S, N), and the states of their masks."""
    adapted = [member for member in members if member.A_RI is not None]
    xA_SN, states = _read(x_NI, adapted) if adapted else (None, [])
    outputs, at = [], 0
    for member in members:
        y_NO = F.linear(x_NI, member.W_OI, member.bias)
        if member.A_RI is not None and member.B_OR is not None:
            assert xA_SN is not None
            end = at + member.A_RI.shape[0]
            y_NO.addmm_(xA_SN[at:end].t(), member.B_OR.t(), alpha=member.factor)
            at = end
        outputs.append(y_NO)
    return outputs, xA_SN, states


def _read(x_NI: Tensor, adapted: Sequence[Member]) -> tuple[Tensor, States]:
    if not any(member.dropout for member in adapted):
        return stacked(adapted) @ x_NI.t(), [None] * len(adapted)
    parts: list[Tensor] = []
    states: States = []
    for member in adapted:
        assert member.A_RI is not None
        seen_NI, state = x_NI, None
        if member.dropout:
            state = dropout_.state_of(x_NI.device)
            seen_NI = dropout_.mask(x_NI.shape, member.dropout, dtype=x_NI.dtype, device=x_NI.device).mul_(x_NI)
        states.append(state)
        parts.append(member.A_RI @ seen_NI.t())
    return torch.cat(parts), states


def backward_members(
    x_NI: Tensor | None,
    xA_SN: Tensor | None,
    members: Sequence[Member],
    grads: Sequence[Tensor | None],
    states: States,
    *,
    need_x: bool,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """The gradient of the input, and (dA, dB) of each member.

    Args:
        x_NI: the input; not needed where no A learns.
        xA_SN: what ``forward_members`` gave.
        members: as they were then.
        grads: the gradient of each output (N, O); None where it was not used.
        states: of the masks, as ``forward_members`` gave them.
        need_x: whether the input's gradient is wanted.
    """
    dx_NI: Tensor | None = None
    found: list[tuple[Tensor | None, Tensor | None]] = []
    thin: list[Tensor] = []
    at = 0
    for member, g_NO in zip(members, grads, strict=True):
        if g_NO is not None and need_x:
            dx_NI = g_NO @ member.W_OI if dx_NI is None else dx_NI.addmm_(g_NO, member.W_OI)
        if member.A_RI is None or member.B_OR is None:
            found.append((None, None))
            continue
        end = at + member.A_RI.shape[0]
        if g_NO is None:
            thin.append(member.A_RI.new_zeros(member.A_RI.shape[0], _tokens(x_NI, xA_SN)))
            found.append((torch.zeros_like(member.A_RI), torch.zeros_like(member.B_OR)))
        else:
            thin.append((member.B_OR.t() @ g_NO.t()).mul_(member.factor))
            d_B = None
            if member.B_OR.requires_grad:
                assert xA_SN is not None
                d_B = (xA_SN[at:end] @ g_NO).t().mul(member.factor).contiguous()
            found.append((None, d_B))
        at = end
    if not thin:
        return dx_NI, found
    adapted = [member for member in members if member.A_RI is not None]
    if any(state is not None for state in states):
        parts = _through_masks(x_NI, adapted, thin, states, dx_NI)
    else:
        gB_SN = torch.cat(thin)
        if dx_NI is not None:
            dx_NI.addmm_(gB_SN.t(), stacked(adapted))
        parts = None if x_NI is None else list(torch.split(gB_SN @ x_NI, [len(gB_RN) for gB_RN in thin]))
    if parts is not None:
        each = iter(parts)
        found = [
            (next(each), d_B) if member.A_RI is not None else (None, None)
            for member, (_, d_B) in zip(members, found, strict=True)
        ]
    return dx_NI, found


def _through_masks(
    x_NI: Tensor | None, adapted: Sequence[Member], thin: Sequence[Tensor], states: States, dx_NI: Tensor | None
) -> list[Tensor] | None:
    """Add to the input's gradient what goes through each A and its mask; the gradients of the A's, if x is given."""
    parts = []
    for member, gB_RN, state in zip(adapted, thin, states, strict=True):
        A_RI = member.A_RI
        assert A_RI is not None
        shape = gB_RN.shape[1], A_RI.shape[1]
        kept_NI = None
        if state is not None:
            kept_NI = dropout_.mask(shape, member.dropout, dtype=gB_RN.dtype, device=gB_RN.device, state=state)
        if dx_NI is not None:
            if kept_NI is None:
                dx_NI.addmm_(gB_RN.t(), A_RI)
            else:
                dx_NI.addcmul_(gB_RN.t() @ A_RI, kept_NI)
        if x_NI is not None:
            parts.append(gB_RN @ (x_NI if kept_NI is None else kept_NI.mul_(x_NI)))
    return None if x_NI is None else parts


def stacked(adapted: Sequence[Member]) -> Tensor:
    """The factors A of some members over each other, (S, I)."""
    factors = [member.A_RI for member in adapted if member.A_RI is not None]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


def _tokens(x_NI: Tensor | None, xA_SN: Tensor | None) -> int:
    if x_NI is not None:
        return x_NI.shape[0]
    assert xA_SN is not None
    return xA_SN.shape[1]


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Numbers, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        members = members_of(tensors, numbers)
        x_NI = x.reshape(-1, x.shape[-1])
        outputs, xA_SN, ctx.states = forward_members(x_NI, members)
        keeps = any(member.A_RI is not None and member.A_RI.requires_grad for member in members)
        ctx.save_for_backward(x_NI if keeps else None, xA_SN, *tensors)
        ctx.numbers, ctx.shape = numbers, x.shape
        ctx.set_materialize_grads(False)
        shaped = tuple(y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in outputs)
        if not ctx.needs_input_grad[0]:
            # Below the first adapter nothing needs a gradient, and what reads a frozen output keeps nothing for one.
            ctx.mark_non_differentiable(*(y for y, m in zip(shaped, members, strict=True) if m.A_RI is None))
        return shaped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_NI, xA_SN, *tensors = ctx.saved_tensors
        members = members_of(tensors, ctx.numbers)
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx_NI, factors = backward_members(x_NI, xA_SN, members, flat, ctx.states, need_x=ctx.needs_input_grad[0])
        each = (gradient for d_A, d_B in factors for gradient in (None, None, d_A, d_B))
        return None if dx_NI is None else dx_NI.view(ctx.shape), None, *each


def taken_apart(members: Sequence[Member]) -> tuple[Numbers, list[Tensor | None]]:
    """Members as autograd passes them: their numbers, and four tensors each in the order of their fields."""
    tensors = [tensor for m in members for tensor in (m.W_OI, m.bias, m.A_RI, m.B_OR)]
    return tuple((m.scaling, m.dropout) for m in members), tensors


def members_of(tensors: Sequence[Tensor | None], numbers: Numbers) -> list[Member]:
    """Members from what ``taken_apart`` made of them."""
    found = []
    for at, (scaling, dropout) in enumerate(numbers):
        W_OI, bias_O, A_RI, B_OR = tensors[4 * at : 4 * at + 4]
        assert W_OI is not None
        found.append(Member(W_OI, bias_O, A_RI, B_OR, scaling, dropout))
    return found


def lora_group(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """The outputs of several linear layers of one input.

    >>> q, k, v = lora_group(x, [Member(Wq, A_RI=A, B_OR=B, scaling=2.0), Member(Wk), Member(Wv)])

    Args:
        x: (..., I) input, in the dtype of every weight and factor.
        members: frozen weights and biases, with factors that may learn; a mask is drawn for each with dropout.

    Returns:
        (..., O) for each member.
    """
    if not torch.is_grad_enabled():
        outputs, *_ = forward_members(x.reshape(-1, x.shape[-1]), members)
        return tuple(y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in outputs)
    numbers, tensors = taken_apart(members)
    found: tuple[Tensor, ...] = _LoraGroup.apply(x, numbers, *tensors)  # type: ignore[no-untyped-call]
    return found

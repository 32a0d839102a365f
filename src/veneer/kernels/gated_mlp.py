"""``down(act(gate(x)) * up(x))``, its three products adapted or frozen, as one function.

Kept for backward are the input, and what comes out of gate and up: the activation and the product are computed again.
SwiGLU and GeGLU: Shazeer, arXiv 2002.05202. Shape legend: N tokens, I inputs, F features between, R rank.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels.lora_group import Member, Numbers, backward_members, forward_members, members_of, taken_apart

Activation = Literal["silu", "gelu", "gelu_tanh"]


def activate(x: Tensor, name: Activation) -> Tensor:
    """The activation itself."""
    return F.silu(x) if name == "silu" else F.gelu(x, approximate=_approximate(name))


def _activate_backward(grad: Tensor, x: Tensor, name: Activation) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu_backward(grad, x, approximate=_approximate(name))  # type: ignore[no-any-return]


def _approximate(name: Activation) -> str:
    return "tanh" if name == "gelu_tanh" else "none"


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, numbers: Numbers, *tensors: Tensor | None) -> Tensor:
        gate, up, down = members = members_of(tensors, numbers)
        x_NI = x.reshape(-1, x.shape[-1])
        (g_NF, u_NF), xA_SN, ctx.states = forward_members(x_NI, [gate, up])
        (y_NI,), hA_RN, ctx.states_of_down = forward_members(activate(g_NF, activation).mul_(u_NF), [down])
        keeps = any(member.A_RI is not None and member.A_RI.requires_grad for member in members[:2])
        ctx.save_for_backward(x_NI if keeps else None, g_NF, u_NF, xA_SN, hA_RN, *tensors)
        ctx.activation, ctx.numbers, ctx.shape = activation, numbers, x.shape
        return y_NI.view(*x.shape[:-1], y_NI.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, g_NF, u_NF, xA_SN, hA_RN, *tensors = ctx.saved_tensors
        gate, up, down = members_of(tensors, ctx.numbers)
        act_NF = activate(g_NF, ctx.activation)
        learns = down.A_RI is not None and down.A_RI.requires_grad
        h_NF = act_NF * u_NF if learns else None
        g_NI = grad.reshape(-1, grad.shape[-1])
        dh_NF, of_down = backward_members(h_NF, hA_RN, [down], [g_NI], ctx.states_of_down, need_x=True)
        assert dh_NF is not None
        du_NF = act_NF.mul_(dh_NF)
        dg_NF = _activate_backward(dh_NF.mul_(u_NF), g_NF, ctx.activation)
        dx_NI, of_both = backward_members(
            x_NI, xA_SN, [gate, up], [dg_NF, du_NF], ctx.states, need_x=ctx.needs_input_grad[0]
        )
        each = (gradient for d_A, d_B in (*of_both, *of_down) for gradient in (None, None, d_A, d_B))
        return None if dx_NI is None else dx_NI.view(ctx.shape), None, None, *each


def gated_mlp(x: Tensor, gate: Member, up: Member, down: Member, activation: Activation) -> Tensor:
    """The output of a gated feed-forward block.

    Args:
        x: (..., I) input, in the dtype of every weight and factor.
        gate: (F, I), the product that is activated.
        up: (F, I), the product that it is multiplied with.
        down: (I, F).
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU).

    Returns:
        (..., I).
    """
    if not torch.is_grad_enabled():
        (g_NF, u_NF), *_ = forward_members(x.reshape(-1, x.shape[-1]), [gate, up])
        (y_NI,), *_ = forward_members(activate(g_NF, activation).mul_(u_NF), [down])
        return y_NI.view(*x.shape[:-1], y_NI.shape[1])
    numbers, tensors = taken_apart((gate, up, down))
    y: Tensor = _GatedMLP.apply(x, activation, numbers, *tensors)  # type: ignore[no-untyped-call]
    return y

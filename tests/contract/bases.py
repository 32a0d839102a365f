"""One or more tiny modules for every base. A new file in ``bases/`` needs an entry here and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from veneer.core import registry


@dataclass(frozen=True)
class BaseCase:
    """A module to adapt and inputs for it."""

    module: Callable[[], nn.Module]
    """Makes the module, seeded by the caller."""
    inputs: Callable[[], Tensor]
    """Makes an input: floating-point features, or token ids."""
    dense: Callable[[Tensor], Tensor] = lambda x: x
    """The same input as floating-point numbers: ids become one-hot rows."""
    plain: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor] = lambda _, x, W, bias: F.linear(x, W, bias)
    """The module's output in plain torch, from a dense input, an (O, I) weight in its place, and the bias."""
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    """How the module is called."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that select the module, where its name in target_modules does not."""
    quantise: Callable[[nn.Module], nn.Module] = lambda module: module
    """Applied after the module has its dtype."""


class _ScaledEmbedding(nn.Embedding):
    """As in Gemma: the looked-up rows are scaled."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def _features() -> Tensor:
    return torch.randn(2, 3, 6)


def _ids() -> Tensor:
    return torch.randint(0, 9, (2, 3))


def _one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids, 9)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(5, 6)
    nn.init.normal_(module.weight)
    return nn.Module.requires_grad_(module, True)


_KERNEL = (3, 3, 1)


def _conv(dimensions: int, **options: Any) -> BaseCase:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    sizes = (5, 4, 4)[:dimensions]

    # More outputs than twice the rank, which LoRA-GA needs; nine of them for the groups.
    outputs = 5 if "groups" not in options else 3 * options["groups"]

    def module() -> nn.Module:
        return kind(2 * options.get("groups", 1), outputs, _KERNEL[:dimensions], **options)

    def plain(conv: nn.Module, x: Tensor, W_OI: Tensor, bias: Tensor | None) -> Tensor:
        # In the layer's own words, so that only W is another: the padding is tested against torch in test_conv.py.
        return conv._conv_forward(x, W_OI.view(W_OI.shape[0], 2, *_KERNEL[:dimensions]), bias)

    # The rank of a grouped convolution is a multiple of its groups.
    fields = {"r": options["groups"]} if "groups" in options else {}
    return BaseCase(module, lambda: torch.randn(2, 2 * options.get("groups", 1), *sizes), plain=plain, fields=fields)


def _four_bits(kind: str, nested: bool) -> Callable[[nn.Module], nn.Module]:
    def quantise(plain: nn.Module) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        dtype, bias = plain.weight.dtype, plain.bias is not None
        module = Linear4bit(6, 5, bias, compute_dtype=dtype, compress_statistics=nested, quant_type=kind).to(dtype)
        module.load_state_dict(plain.state_dict())
        # So that it can be called in evaluation mode before it is adapted; see bases/bnb_4bit.py.
        module.support_avx512bf16_for_cpu = False
        return module.to("cpu")

    return quantise


def _eight_bits(plain: nn.Module) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    module = Linear8bitLt(6, 5, has_fp16_weights=False, threshold=6.0)
    module.load_state_dict(plain.state_dict())
    module.bias.data = module.bias.data.to(plain.bias.dtype)
    return module.to("cpu")


class _Rounded(nn.Module):
    """A layer of 8 bits a weight that gives its weight back when asked, as HQQ's does."""

    __module__ = "hqq.core.quantize"

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.scale = nn.Buffer(plain.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.W_q = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias

    def dequantize(self) -> Tensor:
        return self.W_q * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(), self.bias)


def _attention(**options: Any) -> BaseCase:
    def plain(module: nn.Module, x: Tensor, W_OI: Tensor, bias: Tensor | None) -> Tensor:
        x, extra = x.transpose(0, 1), (module.bias_k, module.bias_v, module.add_zero_attn, 0.0)
        out = module.out_proj.weight, module.out_proj.bias
        y, _ = F.multi_head_attention_forward(x, x, x, 6, 2, W_OI, bias, *extra, *out, need_weights=False)
        return y.transpose(0, 1)

    return BaseCase(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True, **options),
        _features,
        plain=plain,
        call=lambda module, x: module(x, x, x, need_weights=False)[0],
    )


class _Experts(nn.Module):
    """Each of three tokens goes through a matrix of its own; a single matrix takes them all."""

    def __init__(self, *shape: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(shape))
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        W = self.stack.transpose(-1, -2) if self.is_transposed else self.stack
        return torch.einsum("bti,toi->bto", x, W if W.ndim == 3 else W.expand(3, -1, -1))


class _Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, W: Tensor) -> Tensor:
        return 2 * W


def _parameter(*shape: int, is_transposed: bool = False, is_computed: bool = False) -> BaseCase:
    def module() -> nn.Module:
        experts = _Experts(*shape, is_transposed=is_transposed)
        return parametrize.register_parametrization(experts, "stack", _Doubled()) if is_computed else experts

    def plain(module: nn.Module, x: Tensor, W_OI: Tensor, bias: Tensor | None) -> Tensor:
        # Rows of the experts below each other; each token's own are found on the diagonal.
        return (x @ W_OI.t()).view(2, 3, -1, 5).expand(2, 3, 3, 5).diagonal(dim1=1, dim2=2).transpose(1, 2)

    fields = {"target_modules": [], "target_parameters": ["layer.stack"]}
    return BaseCase(module, _features, plain=plain, fields=fields)


CASES: dict[str, dict[str, BaseCase]] = {
    "linear": {
        "bias": BaseCase(lambda: nn.Linear(6, 5), _features),
        "no-bias": BaseCase(lambda: nn.Linear(6, 5, bias=False), _features),
    },
    "attention": {"packed": _attention(), "bare": _attention(bias=False), "more-keys": _attention(add_bias_kv=True)},
    "conv": {
        "1d": _conv(1, stride=2, padding=1),
        "2d": _conv(2, padding=(2, 1), dilation=(2, 1), padding_mode="circular"),
        "3d": _conv(3, padding="same", bias=False),
        "groups": _conv(2, groups=3),
    },
    "bnb_4bit": {
        "nf4": BaseCase(lambda: nn.Linear(6, 5), _features, lambda x: x, quantise=_four_bits("nf4", True)),
        "fp4": BaseCase(lambda: nn.Linear(6, 5, bias=False), _features, lambda x: x, quantise=_four_bits("fp4", False)),
    },
    "bnb_8bit": {"bias": BaseCase(lambda: nn.Linear(6, 5), _features, lambda x: x, quantise=_eight_bits)},
    "quantised": {"bias": BaseCase(lambda: nn.Linear(6, 5), _features, lambda x: x, quantise=_Rounded)},
    "conv1d": {"bias": BaseCase(_conv1d, _features)},
    "parameter": {
        "experts": _parameter(3, 5, 6),
        "transposed": _parameter(3, 6, 5, is_transposed=True),
        "matrix": _parameter(5, 6),
        "parametrised": _parameter(3, 5, 6, is_computed=True),
    },
    "embedding": {
        "plain": BaseCase(lambda: nn.Embedding(9, 5), _ids, _one_hot),
        "scaled": BaseCase(lambda: _ScaledEmbedding(9, 5), _ids, lambda x: 3.0 * _one_hot(x)),
    },
}


def cases_of(base: str) -> dict[str, BaseCase]:
    """The modules for one base."""
    if base not in CASES:
        pytest.fail(f"bases/{base}.py is new: give it a module and an input in CASES of {__file__}.")
    return CASES[base]


def all_cases(exact: bool | None = None) -> list[tuple[str, str]]:
    """(base, case) for every base of the registry; one without an entry is kept, to fail in its tests.

    ``exact`` picks those that keep W as it is, or those that store it in fewer bits.
    """
    wanted = [base for base in registry.names("bases") if exact in (None, registry.load("bases", base).Base.exact)]
    return [(base, case) for base in wanted for case in CASES.get(base, {"missing": None})]

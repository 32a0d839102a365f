"""nn.MultiheadAttention as a base: PEFT's numbers and files, every way to call it, and the fused paths of torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer.bases.attention import Base
from veneer.core.errors import ConfigError, TargetError

E, HEADS, T = 8, 2, 5
KINDS: dict[str, dict[str, Any]] = {
    "batch-first": {"batch_first": True},
    "batch-second": {},
    "no-bias": {"batch_first": True, "bias": False},
    "more-keys": {"add_bias_kv": True, "add_zero_attn": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-weights": {"need_weights": False},
    "every-head": {"average_attn_weights": False},
    "causal": {"attn_mask": torch.ones(T, T).triu(1).bool(), "is_causal": True},
    "float-mask": {"attn_mask": torch.ones(T, T).triu(1) * -1e4},
    "padded": {"key_padding_mask": torch.tensor([[False] * T, [False] * (T - 2) + [True] * 2])},
}


class Model(nn.Module):
    """A self-attention between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(E, E)
        self.mha = nn.MultiheadAttention(E, HEADS, **options)
        self.last = nn.Linear(E, 3)

    def forward(self, x: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        x = self.first(x)
        y, weights = self.mha(x, x, x, **how)
        return self.last(y), weights


class Subclass(nn.MultiheadAttention):
    """An attention that computes in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def model(kind: str = "batch-first") -> Model:
    torch.manual_seed(5)
    made = Model(**KINDS[kind])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def inputs(kind: str = "batch-first") -> Tensor:
    torch.manual_seed(9)
    return torch.randn(2, T, E) if KINDS[kind].get("batch_first") else torch.randn(T, 2, E)


def fields(**more: Any) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 6, "target_modules": ["mha"], "init_lora_weights": False} | more


def adapt(base: nn.Module, **more: Any) -> Any:
    return veneer.get_peft_model(base, veneer.LoraConfig(**fields(**more)))


def plain(adapted: Any, base: Model) -> Model:
    """The same attention with its weights written out, in plain torch."""
    written = copy.deepcopy(base)
    wrapper = adapted.base_model.model.mha
    out = wrapper.base_layer.out_proj
    with torch.no_grad():
        for holder, weight in ((wrapper, written.mha.in_proj_weight), (out, written.mha.out_proj.weight)):
            A, B = holder.lora_A["default"].weight, holder.lora_B["default"].weight
            weight.add_(B @ A * holder.scaling["default"])
    return written


@kinds
def test_outputs_gradients_and_files_are_pefts(kind: str, tmp_path: Path) -> None:
    x = inputs(kind)
    theirs = peft.get_peft_model(model(kind), peft.LoraConfig(**fields()))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(model(kind), tmp_path / "theirs", is_trainable=True)
    gradients = []
    for adapted in (ours, theirs):
        y, weights = adapted(x)
        (y.square().sum() + weights.square().sum()).backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for one, other in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(one, other)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        # PEFT adds the update of out_proj twice, and tells autograd of the first time only.
        times = 2 if "out_proj" in name else 1
        torch.testing.assert_close(gradient, times * gradients[1][name], rtol=1e-4, atol=1e-5)

    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(model(kind), tmp_path / "ours")
    torch.testing.assert_close(back(x)[0], ours(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours.merge_and_unload()(x)[0], merged(x)[0])


@kinds
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_every_way_to_call_it(kind: str, call: str, training: bool, grad: bool) -> None:
    base = model(kind).double()
    adapted = adapt(base)
    expected = plain(adapted, model(kind).double()).train(training)
    x = inputs(kind).double()
    how = {name: v.double() if name == "attn_mask" and v.is_floating_point() else v for name, v in CALLS[call].items()}
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = adapted.train(training)(x, **how), expected(x, **how)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_keys_and_values_of_their_own() -> None:
    adapted = adapt(model("batch-second"))
    expected = plain(adapted, model("batch-second")).mha
    q, k, v = torch.randn(4, 2, E), torch.randn(6, 2, E), torch.randn(6, 2, E)
    torch.testing.assert_close(adapted.base_model.model.mha(q, k, v)[0], expected(q, k, v)[0])


def _layer() -> nn.Module:
    return nn.TransformerEncoderLayer(E, HEADS, 12, batch_first=True, dropout=0.0)


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(_layer(), 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [_layer, _encoder], ids=["layer", "encoder"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_the_fused_encoder_of_torch_sees_the_adapter(
    make: Callable[[], nn.Module], padded: bool, training: bool, grad: bool
) -> None:
    """In evaluation it reads the weights of its attention instead of calling it."""
    torch.manual_seed(4)
    base = nn.Sequential(make())
    x = torch.randn(2, T, E)
    mask = {"src_key_padding_mask": CALLS["padded"]["key_padding_mask"]} if padded else {}
    adapted = adapt(base, target_modules=["self_attn"]).train(training)
    with torch.set_grad_enabled(grad):
        seen = adapted.base_model.model[0](x, **mask)
        assert seen.requires_grad == grad
        with adapted.disable_adapter():
            frozen = base[0](x, **mask)
        merged = adapted.merge_and_unload()[0].train(training)(x, **mask)
    rows = ~mask["src_key_padding_mask"] if padded else torch.ones(2, T).bool()
    torch.testing.assert_close(seen[rows], merged[rows], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[rows], frozen[rows], atol=1e-3)


def test_gradients_reach_the_factors_from_an_encoder_in_evaluation() -> None:
    torch.manual_seed(4)
    adapted = adapt(nn.Sequential(_layer()), target_modules=["self_attn"]).eval()
    adapted(torch.randn(2, T, E)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_under_gradient_checkpointing() -> None:
    adapted, x = adapt(model()), inputs()
    wanted = [p for p in adapted.parameters() if p.requires_grad]
    direct = torch.autograd.grad(adapted(x)[0].square().sum(), wanted)
    again = torch.autograd.grad(checkpoint(lambda x: adapted(x)[0], x, use_reentrant=False).square().sum(), wanted)
    for one, other in zip(direct, again, strict=True):
        torch.testing.assert_close(one, other)


def test_two_adapters_and_switching() -> None:
    base, x = model().requires_grad_(False), inputs()
    frozen = base(x)[0]
    adapted = adapt(base)
    adapted.add_adapter("second", veneer.LoraConfig(**fields(r=2)))
    first = adapted(x)[0]
    adapted.set_adapter(["default", "second"])
    both = adapted(x)[0]
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x)[0], both)
    adapted.unmerge_adapter()
    adapted.set_adapter("default")
    assert torch.equal(adapted(x)[0], first)
    adapted.delete_adapter("second")
    assert torch.equal(adapted(x)[0], first)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x)[0], frozen)
    assert torch.equal(adapted.unload()(x)[0], frozen)
    assert type(base.mha) is nn.MultiheadAttention
    assert not any("Adapted" in type(module).__name__ for module in base.modules())


def test_trained_biases_are_pefts(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**fields(bias="all")))
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(model(), tmp_path, is_trainable=True)
    learning = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == learning
    assert "base_model.model.mha.base_layer.out_proj.base_layer.bias" in learning


@pytest.mark.parametrize("more", [{"lora_dropout": 0.1}, {"lora_bias": True}], ids=lambda more: next(iter(more)))
def test_what_has_no_meaning_is_refused(more: dict[str, Any]) -> None:
    base = model()
    with pytest.raises(ConfigError, match=next(iter(more))):
        adapt(base, **more)
    assert type(base.mha) is nn.MultiheadAttention


def test_what_is_accepted() -> None:
    assert Base.accepts(model().mha)
    assert not Base.accepts(Subclass(E, HEADS))
    with pytest.raises(TargetError, match="kdim or vdim"):
        adapt(nn.Sequential(nn.MultiheadAttention(E, HEADS, kdim=4)), target_modules=["0"])
    with pytest.raises(TargetError, match="name that module instead"):
        adapt(model(), target_modules=["out_proj"])


def test_the_rank_of_an_attention_is_that_of_both_weights() -> None:
    adapted = adapt(model(), rank_pattern={"mha": 2}, alpha_pattern={"mha": 8})
    assert [(t.path, t.r, t.lora_alpha) for t in adapted.match_report.targets] == [
        ("mha", 2, 8),
        ("mha.out_proj", 2, 8),
    ]


def test_all_linear_leaves_attention_alone() -> None:
    adapted = adapt(model(), target_modules="all-linear")
    assert [t.path for t in adapted.match_report.targets] == ["first", "last"]

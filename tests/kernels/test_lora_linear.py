"""The LoRA linear against the plain formula: values, gradients, and what it keeps in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.kernels import reference
from veneer.kernels.lora_linear import lora_linear, low_rank

F64 = torch.float64
IN, OUT, R, SCALING = 4, 3, 2, 0.7
SHAPES = [(5, IN), (2, 3, IN), (IN,), (2, 1, 3, IN), (0, IN), (2, 0, IN)]


P = 0.4


def operands(
    shape: tuple[int, ...] = (5, IN), *, dtype: torch.dtype = F64, bias: bool = True, dropout: float = 0.0
) -> dict[str, Any]:
    return {
        "x": torch.randn(shape).to(dtype),
        "W_OI": torch.randn(OUT, IN).to(dtype),
        "bias_O": torch.randn(OUT).to(dtype) if bias else None,
        "A_RI": torch.randn(R, IN).to(dtype),
        "B_OR": torch.randn(OUT, R).to(dtype),
        "dropout": dropout,
    }


def ours(x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, dropout: float) -> Tensor:
    if dropout:
        torch.manual_seed(7)
    return lora_linear(x, W_OI, bias_O, A_RI, B_OR, SCALING, dropout)


def theirs(x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, dropout: float) -> Tensor:
    torch.manual_seed(7)
    dropped = F.dropout(x.contiguous(), dropout) if dropout else None
    return reference.lora_linear(x, W_OI, bias_O, A_RI, B_OR, SCALING, dropped)


def check_gradients(given: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        given[name].requires_grad_()
    y, expected = ours(**given), theirs(**given)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.requires_grad == bool(names)
    if not names:
        return
    wanted = [given[name] for name in names]
    weights = torch.randn_like(expected)
    for gradient, right in zip(
        torch.autograd.grad(y, wanted, weights), torch.autograd.grad(expected, wanted, weights), strict=True
    ):
        assert gradient.shape == right.shape
        torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-12)


LEARN = ("x", "bias_O", "A_RI", "B_OR")
SUBSETS = [subset for n in range(len(LEARN) + 1) for subset in itertools.combinations(LEARN, n)]


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, P])
def test_every_subset_of_gradients(subset: tuple[str, ...], dropout: float) -> None:
    check_gradients(operands(dropout=dropout), subset)
    if "bias_O" not in subset:
        check_gradients(operands(bias=False, dropout=dropout), subset)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, P])
def test_input_shapes(shape: tuple[int, ...], dropout: float) -> None:
    check_gradients(operands(shape, dropout=dropout), ("x", "A_RI", "B_OR", "bias_O"))
    with torch.no_grad():
        given = operands(shape, dropout=dropout)
        torch.testing.assert_close(ours(**given), theirs(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, P, 1.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_gradcheck(dropout: float, bias: bool) -> None:
    given = operands((3, IN), dropout=dropout, bias=bias)
    learn = [name for name in LEARN if given[name] is not None]

    def function(*values: Tensor) -> Tensor:
        return ours(**{**given, **dict(zip(learn, values, strict=True))})

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in learn])


@pytest.mark.parametrize("dropout", [0.0, P])
def test_layouts_that_are_not_contiguous(dropout: float) -> None:
    given = operands((6, IN), dropout=dropout)
    given["x"] = torch.randn(IN, 2, 3, dtype=F64).permute(2, 1, 0)
    given["W_OI"], given["A_RI"], given["B_OR"] = (
        given[name].t().contiguous().t() for name in ("W_OI", "A_RI", "B_OR")
    )
    check_gradients(given, ("x", "A_RI", "B_OR"))
    y = ours(**given)
    # An incoming gradient of any layout, also one that is a single broadcast number.
    for gradient in (torch.randn(OUT, 2, 3, dtype=F64).permute(2, 1, 0), torch.ones(()).double().expand(3, 2, OUT)):
        found = torch.autograd.grad(y, given["x"], gradient, retain_graph=True)[0]
        right = torch.autograd.grad(theirs(**given), given["x"], gradient)[0]
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_a_weight_that_learns_gets_its_gradient() -> None:
    check_gradients(operands(), ("x", "W_OI", "A_RI", "B_OR"))


@pytest.mark.parametrize("dropout", [0.0, P])
def test_operands_are_not_written_to(dropout: float) -> None:
    given = operands(dropout=dropout)
    before = {name: tensor.clone() for name, tensor in given.items() if name != "dropout"}
    for name in LEARN:
        given[name].requires_grad_()
    ours(**given).sum().backward()
    with torch.no_grad():
        ours(**given)
    for name, tensor in before.items():
        assert torch.equal(given[name], tensor)


def saved_for_backward(given: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """What autograd keeps, the operands that stay in memory anyway left out (x counts)."""
    kept: list[Tensor] = []
    operands_ = {t.untyped_storage().data_ptr() for name, t in given.items() if name in HELD and t is not None}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in operands_:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if dtype is None:
            y = ours(**given)
        else:
            with torch.autocast("cpu", dtype):
                y = ours(**given)
    y.sum().backward()
    return kept


HELD = ("W_OI", "bias_O", "A_RI", "B_OR")


def sizes(kept: list[Tensor]) -> list[int]:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sorted(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, P])
def test_only_the_input_and_xA_are_kept(dtype: torch.dtype, dropout: float) -> None:
    given = operands((50, IN), dtype=dtype, dropout=dropout)
    for name in ("A_RI", "B_OR", "bias_O"):
        given[name].requires_grad_()
    given["x"].requires_grad_()
    kept = saved_for_backward(given)
    itemsize = dtype.itemsize
    assert sizes(kept) == [50 * R * itemsize, 50 * IN * itemsize]
    held = given["x"].untyped_storage().data_ptr()
    assert held in {tensor.untyped_storage().data_ptr() for tensor in kept}


@pytest.mark.parametrize("dropout", [0.0, P])
def test_a_frozen_A_keeps_its_few_outputs_and_not_the_input(dropout: float) -> None:
    given = operands((50, IN), dtype=torch.float32, dropout=dropout)
    given["B_OR"].requires_grad_()
    given["x"].requires_grad_()
    assert sizes(saved_for_backward(given)) == [50 * R * 4]


def test_a_frozen_B_keeps_the_input_alone() -> None:
    given = operands((50, IN), dtype=torch.float32)
    given["A_RI"].requires_grad_()
    assert sizes(saved_for_backward(given)) == [50 * IN * 4]


def test_float32_factors_on_a_bfloat16_layer_copy_the_factors_and_not_the_input() -> None:
    given = operands((500, IN), dtype=torch.bfloat16)
    given["A_RI"], given["B_OR"] = given["A_RI"].float().requires_grad_(), given["B_OR"].float().requires_grad_()
    kept = saved_for_backward(given)
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert sizes(kept) == sorted([2 * R * IN, 2 * OUT * R, 2 * 500 * R, 2 * 500 * IN])
    assert given["A_RI"].grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dropout", [0.0, P])
def test_autocast(grad: bool, dropout: float) -> None:
    given = operands((7, IN), dtype=torch.float32, dropout=dropout)
    for name in ("x", "A_RI", "B_OR", "bias_O"):
        given[name].requires_grad_(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y = ours(**given)
    assert y.dtype == torch.bfloat16
    halves = {name: given[name].detach().bfloat16() for name in given if name != "dropout"}
    halves["dropout"] = dropout
    with torch.set_grad_enabled(grad):
        plain = ours(**halves)
    assert torch.equal(y.detach(), plain)
    if grad:
        y.float().sum().backward()
        assert {given[name].grad.dtype for name in ("x", "A_RI", "B_OR", "bias_O")} == {torch.float32}


def test_other_dtype_outside_autocast_is_torchs_own_error() -> None:
    given = operands(dtype=torch.float32)
    given["x"] = given["x"].bfloat16()
    with pytest.raises(RuntimeError):
        F.linear(given["x"], given["W_OI"])
    with pytest.raises(RuntimeError):
        ours(**given)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    given = operands((4, IN), dropout=P)
    learn = [given[name].requires_grad_() for name in ("x", "A_RI", "B_OR")]

    def run(x: Tensor) -> Tensor:
        operands_ = (given[name] for name in ("W_OI", "bias_O", "A_RI", "B_OR"))
        return lora_linear(x, *operands_, SCALING, P)

    torch.manual_seed(3)
    direct = torch.autograd.grad(run(given["x"]).square().sum(), learn)
    torch.manual_seed(3)
    y = checkpoint(run, given["x"], use_reentrant=reentrant)
    # Whatever is drawn in between, the recomputation draws what the first pass drew.
    torch.rand(5)
    y.square().sum().backward()
    for tensor, right in zip(learn, direct, strict=True):
        torch.testing.assert_close(tensor.grad, right, rtol=1e-12, atol=1e-12)


def test_gradients_accumulate() -> None:
    given = operands()
    learn = [given[name].requires_grad_() for name in ("x", "A_RI", "B_OR")]
    ours(**given).sum().backward()
    once = [tensor.grad.clone() for tensor in learn]
    ours(**given).sum().backward()
    for tensor, first in zip(learn, once, strict=True):
        assert torch.equal(tensor.grad, 2 * first)


def test_compiles_without_a_graph_break() -> None:
    given = operands((4, IN), dtype=torch.float32)
    learn = [given[name].requires_grad_() for name in ("x", "A_RI", "B_OR")]
    # aot_eager traces forward and backward as the default backend does, without calling a C++ compiler.
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y, expected = compiled(**given), ours(**given)
    torch.testing.assert_close(y, expected)
    found, right = torch.autograd.grad(y.sum(), learn), torch.autograd.grad(expected.sum(), learn)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_compiles_too() -> None:
    given = operands((4000, IN), dtype=torch.float32)
    learn = [given[name].requires_grad_() for name in ("x", "A_RI", "B_OR")]

    def run(*tensors: Tensor) -> Tensor:
        return lora_linear(tensors[0], given["W_OI"], given["bias_O"], *tensors[1:], SCALING, P)

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(*learn)
    plain = F.linear(given["x"], given["W_OI"], given["bias_O"])
    update = torch.linalg.lstsq(given["B_OR"].detach().double(), (y - plain).detach().double().t() / SCALING).solution
    # In the mean over many rows the update is that of all of x.
    expected = given["x"].detach().double() @ given["A_RI"].detach().double().t()
    slope = (update.t() * expected).sum() / expected.square().sum()
    assert abs(float(slope) - 1) < 0.1
    assert not torch.allclose(update.t(), expected, atol=0.1)
    assert all(gradient is not None for gradient in torch.autograd.grad(y.sum(), learn))


def test_an_adapted_layer_compiles_without_a_graph_break() -> None:
    import veneer

    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.ReLU(), torch.nn.Linear(OUT, IN))
    adapted = veneer.get_peft_model(
        model, veneer.LoraConfig(r=R, target_modules=["0", "2"], init_lora_weights=False, bias="lora_only")
    )
    x = torch.randn(5, IN)
    learn = [p for p in adapted.parameters() if p.requires_grad]
    expected = torch.autograd.grad(adapted(x).sum(), learn)
    compiled = torch.compile(adapted.get_base_model(), fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(x).sum(), learn), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_alone(shape: tuple[int, ...]) -> None:
    given = operands(shape)
    alone = low_rank(given["x"], given["A_RI"], given["B_OR"], SCALING, bias_O=given["bias_O"], dropout=0.0)
    expected = SCALING * (given["x"] @ given["A_RI"].t() @ given["B_OR"].t() + given["bias_O"])
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-12)
    half = low_rank(given["x"].bfloat16(), given["A_RI"], given["B_OR"], SCALING, bias_O=None, dropout=0.0)
    assert half.dtype == torch.bfloat16

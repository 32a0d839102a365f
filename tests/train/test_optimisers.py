from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.core.errors import UsageError
from veneer.train import optimisers
from veneer.train.config import OptimiserName
from veneer.train.optimisers import factor, optimiser, remarks, scheduled


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_schedules_rise_then_go_their_way(name: str, end: float) -> None:
    at = factor(name, steps=100, warmup=0.1)
    rising = [at(step) for step in range(10)]
    assert rising[0] > 0
    assert rising == sorted(rising)
    assert at(10) == 1.0
    assert [at(step) for step in range(10, 101)] == sorted((at(step) for step in range(10, 101)), reverse=True)
    assert at(100) == pytest.approx(end, abs=1e-12)


def test_half_way() -> None:
    assert factor("linear", steps=100, warmup=0)(25) == pytest.approx(0.75)
    assert factor("cosine", steps=100, warmup=0)(50) == pytest.approx(0.5)


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert factor("constant", steps=40, warmup=0.25)(4) == factor("constant", steps=40, warmup=10)(4) < 1
    assert factor("constant", steps=40, warmup=0)(0) == 1
    assert factor("cosine", steps=3, warmup=100)(2) < 1


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_vectors_do_not_decay_and_frozen_parameters_stay_out(name: OptimiserName) -> None:
    layer = nn.Linear(3, 2)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    made = optimiser(name, [*layer.parameters(), *frozen.parameters()], learning_rate=0.1, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.5, id(layer.bias): 0.0}


def test_a_step_is_adamws() -> None:
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    fused = optimiser("adamw", ours.parameters(), learning_rate=0.1, weight_decay=0.0)
    schedule = scheduled(fused, "constant", steps=5, warmup=0)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    x = torch.randn(4, 3)
    for _ in range(3):
        for module, made in ((ours, fused), (plain, reference)):
            made.zero_grad()
            module(x).square().sum().backward()
            made.step()
        schedule.step()
    torch.testing.assert_close(ours.weight, plain.weight)


SHAPE = (8, 600)
"""More than the 4096 elements from which on bitsandbytes keeps 8 bits."""


def walked(made: torch.optim.Optimizer, parameter: nn.Parameter, steps: int, *, begin: int = 0) -> list[Tensor]:
    """Where a parameter is after each of some steps along a fixed way of gradients."""
    places = []
    for step in range(begin, begin + steps):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        parameter.grad = torch.linspace(-1, 1, SHAPE[1]).expand(SHAPE) + 0.3 * noise
        made.step()
        places.append(parameter.detach().clone())
    return places


def made_on(name: OptimiserName, **settings: Any) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(SHAPE))
    return optimiser(name, [parameter], learning_rate=0.01, **{"weight_decay": 0.1, **settings}), parameter


def adamw_by_hand(steps: int, rate: float = 0.01, decay: float = 0.1) -> list[Tensor]:
    parameter = nn.Parameter(torch.zeros(SHAPE))
    return walked(torch.optim.AdamW([parameter], lr=rate, weight_decay=decay), parameter, steps)


def test_paged_adamw_in_32_bits_is_adamw() -> None:
    for one, other in zip(walked(*made_on("paged_adamw_32bit"), 6), adamw_by_hand(6), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_adamw_in_8_bits_stays_near_adamw(name: OptimiserName) -> None:
    found, expected = walked(*made_on(name), 20)[-1], adamw_by_hand(20)[-1]
    assert not torch.equal(found, expected)
    # The dynamic map's numbers lie up to a tenth apart from each other (arXiv 2110.02861), at every moment.
    error = (found - expected).norm() / expected.norm()
    assert error < 0.1


@pytest.mark.parametrize("name", ["lion_8bit", "paged_lion_8bit"])
def test_lion_moves_by_the_sign(name: OptimiserName) -> None:
    made, parameter = made_on(name, weight_decay=0.0)
    (first,) = walked(made, parameter, 1)
    torch.testing.assert_close(first, -0.01 * parameter.grad.sign())


def test_adafactor_is_its_papers() -> None:
    """arXiv 1804.04235, algorithm 4 with a given rate: one row and one column of means, and a clipped update."""
    made, parameter = made_on("adafactor", weight_decay=0.0)
    (first,) = walked(made, parameter, 1)
    square = parameter.grad.square() + 1e-30
    rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    update = parameter.grad / (rows @ columns / rows.mean()).sqrt()
    update = update / update.square().mean().sqrt().clamp(min=1.0)
    torch.testing.assert_close(first, -0.01 * update, rtol=1e-4, atol=1e-6)
    assert sum(t.numel() for t in made.state[parameter].values() if isinstance(t, Tensor) and t.ndim) == sum(SHAPE)


def test_sgd_goes_down_the_gradient() -> None:
    made, parameter = made_on("sgd")
    (first,) = walked(made, parameter, 1)
    torch.testing.assert_close(first, -0.01 * parameter.grad)


def test_8_bits_are_a_quarter_of_the_state() -> None:
    def size(name: OptimiserName) -> int:
        made, parameter = made_on(name)
        walked(made, parameter, 1)
        # The two maps of 256 numbers are shared by all tensors.
        held = {
            t.data_ptr(): t.nbytes for k, t in made.state[parameter].items() if isinstance(t, Tensor) and "map" not in k
        }
        return sum(held.values())

    assert size("adamw_8bit") < 0.27 * size("adamw")


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_parameters_with_rates_of_their_own(name: OptimiserName) -> None:
    A, B, head = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8, 4)), nn.Linear(4, 2)
    frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    rates = [([B], 1.6), (head.parameters(), 0.3), ([frozen], 0.7)]
    made = optimiser(name, [A, B, *head.parameters(), frozen], learning_rate=0.1, weight_decay=0.5, rates=rates)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in made.param_groups for p in group["params"]}
    expected = {id(A): (0.1, 0.5), id(B): (1.6, 0.5), id(head.weight): (0.3, 0.5), id(head.bias): (0.3, 0.0)}
    assert found == expected
    assert made.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_the_state_goes_through_a_file_bit_for_bit(name: OptimiserName, tmp_path: Path) -> None:
    made, parameter = made_on(name)
    walked(made, parameter, 3)
    state = copy.deepcopy(made.state_dict())
    tensors, rest = {}, {}
    for key, value in _leaves(state["state"]):
        (tensors if isinstance(value, Tensor) else rest)[key] = value
    if tensors:
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "state.safetensors")
        tensors = load_file(tmp_path / "state.safetensors")
    rest = json.loads(json.dumps(rest))
    again, twin = made_on(name)
    twin.data.copy_(parameter.detach())
    again.load_state_dict({"state": _tree({**tensors, **rest}), "param_groups": state["param_groups"]})
    ours, theirs = walked(made, parameter, 3, begin=3), walked(again, twin, 3, begin=3)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    before, after = dict(_leaves(made.state_dict())), dict(_leaves(again.state_dict()))
    assert before.keys() == after.keys()
    for key, one in before.items():
        assert torch.equal(one, after[key]) if isinstance(one, Tensor) else one == after[key], key


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}")]
    return [(path, tree)]


def _tree(leaves: dict[str, Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.removeprefix("/").split("/")
        place = made
        for part in parents:
            place = place.setdefault(int(part) if part.isdigit() else part, {})
        place[last] = value
    return made


def test_without_bitsandbytes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"optimizer=lion_8bit needs bitsandbytes.*pip install 'veneer\[quant\]'"):
        optimisers.check_installed("lion_8bit")
    for name in ("adamw", "adafactor", "sgd"):
        optimisers.check_installed(name)


def test_paging_on_a_cpu_is_said_to_be_none() -> None:
    assert "it is adamw_8bit here" in remarks("paged_adamw_8bit", "cpu")[0]
    assert remarks("paged_adamw_8bit", "cuda") == remarks("adamw_8bit", "cpu") == ()


def test_paging_is_asked_for_off_the_cpu() -> None:
    assert made_on("paged_adamw_8bit", device="cuda")[0].is_paged
    assert not made_on("adamw_8bit", device="cuda")[0].is_paged

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.train.optimisers import adamw, factor, scheduled


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


def test_vectors_do_not_decay_and_frozen_parameters_stay_out() -> None:
    layer = nn.Linear(3, 2)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    optimiser = adamw([*layer.parameters(), *frozen.parameters()], learning_rate=0.1, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert decay == {id(layer.weight): 0.5, id(layer.bias): 0.0}


def test_a_step_is_adamws() -> None:
    ours, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    fused = adamw(ours.parameters(), learning_rate=0.1, weight_decay=0.0)
    schedule = scheduled(fused, "constant", steps=5, warmup=0)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    x = torch.randn(4, 3)
    for _ in range(3):
        for module, optimiser in ((ours, fused), (plain, reference)):
            optimiser.zero_grad()
            module(x).square().sum().backward()
            optimiser.step()
        schedule.step()
    torch.testing.assert_close(ours.weight, plain.weight)

"""nn.Embedding as a base: padding, scaling, and what dropout drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, get_peft_model
from veneer.bases.embedding import Base


class Offset(nn.Embedding):
    """As OPT's positions: another lookup than nn.Embedding's."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


def adapt(layer: nn.Module, **fields: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **fields)
    return get_peft_model(nn.Sequential(layer), config)


def test_padding_learns_nothing() -> None:
    model = adapt(nn.Embedding(6, 3, padding_idx=2))
    model(torch.tensor([[1, 2, 2, 4]])).square().sum().backward()
    gradient = model.base_model.model[0].lora_embedding_A["default"].grad
    learned = gradient.abs().sum(0) > 0
    assert learned.tolist() == [False, True, False, False, True, False]


def test_dropout_drops_whole_tokens_and_scales_the_rest() -> None:
    layer = nn.Embedding(50, 3)
    ids = torch.arange(50)
    frozen = layer(ids)
    model = adapt(layer, lora_dropout=0.4)
    full = (model.eval()(ids) - frozen).detach()
    dropped = (model.train()(ids) - frozen).detach()
    kept = dropped.abs().sum(1) > 0
    assert 0 < kept.sum() < 50
    torch.testing.assert_close(dropped[kept], full[kept] / 0.6, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 1, 2)], ids=str)
def test_ids_of_any_shape(shape: tuple[int, ...]) -> None:
    layer = nn.Embedding(6, 3)
    ids = torch.randint(0, 6, shape)
    model = adapt(layer)
    y = model(ids)
    assert y.shape == (*shape, 3)
    model.merge_adapter()
    torch.testing.assert_close(model(ids), y)


def test_what_is_accepted() -> None:
    assert Base.accepts(nn.Embedding(2, 2))
    assert not Base.accepts(nn.Embedding(2, 2, max_norm=1.0))
    assert not Base.accepts(Offset(2, 2))
    assert not Base.accepts(nn.Linear(2, 2))


def test_under_autocast() -> None:
    model = adapt(nn.Embedding(6, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.tensor([1, 2]))
    # As the frozen lookup alone: autocast does not touch it.
    assert y.dtype == torch.float32

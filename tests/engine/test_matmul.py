"""Which library multiplies, from times that are given here, and that its products are float32's."""

from __future__ import annotations

from itertools import chain, repeat

import pytest
import torch

import tests.chat
from veneer import LoraConfig, accelerated, get_peft_model, restored
from veneer.core.errors import ConfigError
from veneer.engine import matmul
from veneer.engine.matmul import Matmuls, check, measure, multiplying, settled


def machine(torch_seconds: float, onednn_seconds: float, error: float = 1e-7):
    """A machine with two libraries, and what was asked of them."""
    asked: list[tuple[str, int]] = []

    def run(library: str, width: int) -> tuple[float, float]:
        asked.append((library, width))
        return (torch_seconds, 1e-7) if library == "torch" else (onednn_seconds, error)

    return run, asked


@pytest.mark.parametrize(
    ("seconds", "error", "chosen"),
    [
        (0.5, 1e-7, "onednn"),
        (0.76, 1e-7, "onednn"),
        (0.78, 1e-7, "torch"),
        (1.0, 1e-7, "torch"),
        (2.0, 1e-7, "torch"),
        (0.1, 3e-3, "torch"),
    ],
)
def test_onednn_must_be_worth_it_and_exact(seconds: float, error: float, chosen: str) -> None:
    run, asked = machine(1.0, seconds, error)
    found = measure(576, run=run)
    assert found is not None
    assert found.chosen == chosen
    assert str(found).startswith(f"{chosen}: torch ")
    assert ("not exact" in str(found)) == (error > 1e-5)
    assert asked == [("torch", 576), ("onednn", 576)] * matmul._ROUNDS


def test_the_best_round_of_each_counts() -> None:
    times = chain([1.0, 1.0, 1.0, 0.4, 1.0, 1.0, 0.9], repeat(1.0))
    found = measure(256, run=lambda library, width: (next(times), 1e-7))
    assert found == Matmuls(2 * 512 * 256**2 / 1e9 / 0.9, 2 * 512 * 256**2 / 1e9 / 0.4, 1e-7)


def test_a_narrow_model_is_left_to_torch() -> None:
    run, asked = machine(1.0, 0.1)
    assert measure(255, run=run) is None
    assert asked == []


def test_a_precision_that_the_user_set_is_left_alone() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        assert measure(576) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_real_measurement() -> None:
    found = measure(256)
    assert found is not None
    assert found.torch > 0
    assert found.onednn > 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_is_chosen_multiplies_as_exactly() -> None:
    found = measure(576)
    assert found is not None
    x, w = (torch.randn(64, 576, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    true = x.double() @ w.double().t()
    with multiplying(found.chosen):
        error = (x @ w.t() - true).abs().max() / true.abs().max()
    assert error < 2e-6


def test_the_setting_is_taken_back() -> None:
    with multiplying("onednn"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check("torch")
    monkeypatch.setattr(matmul, "_product", lambda library, width: (1.0, 2e-3))
    with pytest.raises(ConfigError, match=r"matmul=onednn is not exact on this processor \(relative error 2e-03\)"):
        check("onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="built without oneDNN; use matmul=torch"):
        check("onednn")


def test_what_does_not_multiply_in_float32_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(matmul, "measure", lambda width: (asked.append(width), Matmuls(1.0, 2.0, 1e-7))[1])
    model = tests.chat.model()
    assert settled("auto", model) == "onednn"
    assert settled("auto", model.to(torch.bfloat16)) == "torch"
    assert settled("torch", model) == "torch"
    assert settled("auto", torch.nn.Linear(2, 2, device="meta")) == "torch"
    assert asked == [model.config.hidden_size]


def test_accelerated_multiplies_with_it_until_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "measure", lambda width: Matmuls(1.0, 2.0, 1e-7))
    monkeypatch.setattr(matmul, "check", lambda library: None)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    accelerated(model)
    assert torch.get_float32_matmul_precision() == "medium"
    restored(model)
    assert torch.get_float32_matmul_precision() == "highest"
    accelerated(model, matmul="torch")
    assert torch.get_float32_matmul_precision() == "highest"
    restored(model)

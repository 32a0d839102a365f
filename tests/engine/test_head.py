from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.engine.decoders import FAMILIES, make
from veneer.adapters.model import get_peft_model
from veneer.core.config import LoraConfig
from veneer.engine import head as heads
from veneer.engine.head import HeadForm, form_of, language_loss

FORMS = {"Gemma2": HeadForm(cap=2.0), "Granite": HeadForm(scale=0.25), "Cohere": HeadForm(scale=0.25)}


def batch(rows: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 97, (rows, length))
    labels = torch.where(torch.rand(rows, length) < 0.4, ids, -100)
    labels[:, 0] = -100
    return ids, labels


def reference(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", 4)


def check(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> None:
    expected = reference(model, ids, labels)
    expected.backward()
    wanted = gradients(model)
    found = language_loss(model, {"input_ids": ids}, labels)
    assert found.units == int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)
    each = language_loss(model, {"input_ids": ids}, labels, reduction="none").total
    with torch.no_grad():
        alike = language_loss(model, {"input_ids": ids}, labels, reduction="none").total
    torch.testing.assert_close(alike, each)
    assert each.shape == (found.units,)
    torch.testing.assert_close(each.sum(), expected, rtol=1e-5, atol=1e-5)
    found.total.backward()
    got = gradients(model)
    each.sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_all_gradients_are_those_of_the_whole_logits(family: str) -> None:
    """The head learns too here, so this is full fine-tuning."""
    model = make(family)
    check(model, *batch())
    assert form_of(model) == FORMS.get(family, HeadForm())


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_also_on_the_head(family: str, targets: list[str]) -> None:
    model = get_peft_model(make(family), LoraConfig(target_modules=targets, init_lora_weights=False))
    check(model, *batch())


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_head_that_is_trained_whole(saved: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[saved], init_lora_weights=False)
    check(get_peft_model(make("Llama"), config), *batch())


def test_without_gradients_the_first_choices_are_counted() -> None:
    model = make("Llama")
    ids, labels = batch()
    with torch.no_grad():
        found = language_loss(model, {"input_ids": ids}, labels)
        logits = model(input_ids=ids).logits[:, :-1]
    supervised = labels[:, 1:] != -100
    assert found.correct == int((logits.argmax(-1) == labels[:, 1:])[supervised].sum())
    torch.testing.assert_close(found.total, reference(model, ids, labels), rtol=1e-5, atol=1e-5)


def test_nothing_supervised_is_a_zero_with_a_graph() -> None:
    model = make("Llama")
    ids, labels = batch()
    found = language_loss(model, {"input_ids": ids}, torch.full_like(labels, -100))
    assert (found.total.item(), found.units) == (0.0, 0)
    found.total.backward()
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_an_unknown_form_is_left_to_the_model() -> None:
    model = make("Llama")
    forward = model.forward

    def odd(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits**3
        return output

    model.forward = odd
    assert form_of(model) is None
    check(model, *batch())


def test_autocast_sums_in_float32() -> None:
    model = make("Llama")
    ids, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = language_loss(model, {"input_ids": ids}, labels)
        expected = reference(model, ids, labels)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, expected, rtol=2e-2, atol=1e-2)


def test_no_logits_of_all_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(make("Llama"), LoraConfig(target_modules=["q_proj"]))
    ids, labels = batch(rows=4, length=16)
    form_of(model)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        language_loss(model, {"input_ids": ids}, labels)
    supervised = int((labels[:, 1:] != -100).sum())
    assert not [shape for shape in kept if shape[-1:] == (97,) and shape[0] == supervised]

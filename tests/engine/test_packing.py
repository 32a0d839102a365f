from __future__ import annotations

import pytest
import torch

from tests.engine.decoders import FAMILIES, NOT_PACKED, make
from veneer.adapters.model import get_peft_model
from veneer.core.config import LoraConfig
from veneer.core.errors import ConfigError
from veneer.data.encode import Encoded
from veneer.data.packing import pack
from veneer.engine import attention
from veneer.engine.packing import use_packing

LENGTHS = (9, 4, 4, 1, 13)


def sequences() -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(3, 97, (length,), generator=drawn) for length in LENGTHS]


def packed(parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    batch = pack([Encoded("x", part.tolist(), part.tolist()) for part in parts])
    return {key: batch[key] for key in ("input_ids", "position_ids")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_PACKED))
def test_packed_logits_and_gradients_are_those_of_each_sequence_alone(family: str, training: bool) -> None:
    reference, model = make(family), make(family)
    assert use_packing(model).reason is None
    assert model.config._attn_implementation == attention.NAME
    reference.train(training)
    model.train(training)
    parts = sequences()
    alone = torch.cat([reference(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    together = model(**packed(parts), use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(alone)
    (together * weights).sum().backward()
    (alone * weights).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            truth = expected[name].grad
            # Sums in another order: float32 rounds each by a share of its largest term.
            close = max(1e-5, 1e-6 * float(truth.abs().max()))
            torch.testing.assert_close(parameter.grad, truth, rtol=1e-4, atol=close, msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_PACKED))
def test_padded_batches_are_as_before(family: str) -> None:
    reference, model = make(family), make(family)
    use_packing(model)
    rows = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in sequences()], batch_first=True)
    inputs = {"input_ids": rows, "attention_mask": mask}
    wanted, found = (m(**inputs, use_cache=False).logits[mask.bool()] for m in (reference, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mistral"])
def test_generation_is_as_before(family: str) -> None:
    reference, model = make(family), make(family)
    use_packing(model)
    prompt = torch.randint(3, 97, (2, 6))
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **settings), reference.generate(prompt, **settings))


@pytest.mark.parametrize("family", sorted(NOT_PACKED))
def test_models_that_would_mix_sequences_stay_as_they_are(family: str) -> None:
    model = make(family)
    before = model.config._attn_implementation
    packing = use_packing(model)
    assert packing.reason is not None
    assert type(model).__name__ in packing.reason
    assert model.config._attn_implementation == before
    assert not model.training
    with pytest.raises(ConfigError, match=r"packing=on is not possible: .*auto"):
        packing.check()


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_it_is_taken_back(family: str) -> None:
    model = make(family)
    packing = use_packing(model)
    packing.undo()
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_an_adapted_model_packs_too() -> None:
    model = get_peft_model(make("Llama"), LoraConfig(target_modules="all-linear"))
    assert use_packing(model).reason is None
    parts = sequences()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
        torch.testing.assert_close(model(**packed(parts), use_cache=False).logits[0], alone, rtol=1e-5, atol=1e-5)


def test_something_else_than_a_transformers_model_says_so() -> None:
    assert "Linear is not a transformers model" in use_packing(torch.nn.Linear(2, 2)).reason


def test_no_mask_of_all_tokens_is_made() -> None:
    """The borders stand in its place: memory grows with the tokens, not with their square."""
    model = make("Llama")
    use_packing(model)
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**packed(sequences()), use_cache=False)
    assert seen[0].flatten().tolist() == [0, 0, 9, 13, 17, 18, 31]

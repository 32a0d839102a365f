"""Layers used several times: as a deeper model with copied weights, as PEFT's, and back again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.adapters.snapshot import assert_same, snapshot
from tests.models import batch, make, output
from veneer import AdapterFileError, ConfigError, LoraConfig, PeftModel, TargetError, UsageError, get_peft_model

RANGES = [[0, 2], [0, 1], [1, 2]]
ORDER = [0, 1, 0, 1]
TARGETS = {"llama": "q_proj", "bert": "query", "gemma": "q_proj", "gpt2": "c_attn", "llama-tied": "down_proj"}
LISTS = {
    "llama": "model.layers",
    "llama-tied": "model.layers",
    "gemma": "model.layers",
    "bert": "bert.encoder.layer",
    "gpt2": "transformer.h",
}
KINDS = list(TARGETS)


def fields(kind: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "target_modules": [TARGETS[kind]], "layer_replication": RANGES, **more}


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def ours(kind: str, **more: Any) -> PeftModel:
    model = get_peft_model(make(kind), LoraConfig(**fields(kind, **more)))
    move(model)
    return model.eval()


def deeper(kind: str) -> Any:
    """A model of as many layers, built by its own class, with the weights copied."""
    model = make(kind)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(ORDER)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in ORDER]
    built = type(model)(config).eval()
    state = {}
    prefix = LISTS[kind]
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{prefix}."):
            state[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        state |= {f"{prefix}.{new}.{rest}": tensor for new, old in enumerate(ORDER) if old == int(number)}
    built.load_state_dict(state)
    return built


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_deeper_model(kind: str, tmp_path: Path) -> None:
    model, truth = ours(kind), get_peft_model(deeper(kind), LoraConfig(**fields(kind, layer_replication=None)))
    move(truth)
    own, their = dict(model.named_parameters()), dict(truth.named_parameters())
    trained = {name for name, p in their.items() if p.requires_grad}
    assert trained == {name for name, p in own.items() if p.requires_grad}
    assert len(trained) == 2 * len(ORDER)
    assert model.config.num_hidden_layers == len(ORDER)
    with model.disable_adapter(), truth.disable_adapter():
        assert torch.equal(output(model, batch(kind)), output(truth, batch(kind)))
    assert torch.equal(output(model, batch(kind)), output(truth.eval(), batch(kind)))
    # Copies cost nothing: the parameters are those of the shallow model and the adapter's.
    shallow = sum(p.numel() for p in make(kind).parameters())
    assert model.get_nb_trainable_parameters()[1] == shallow + sum(own[name].numel() for name in trained)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_outputs_and_files_are_pefts(kind: str, tmp_path: Path) -> None:
    model = ours(kind)
    theirs = peft.get_peft_model(make(kind), peft.LoraConfig(**fields(kind))).eval()
    move(theirs)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    a, b = output(model, batch(kind)), output(theirs, batch(kind))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    loaded = PeftModel.from_pretrained(make(kind), tmp_path / "theirs")
    assert torch.equal(output(loaded, batch(kind)), output(model, batch(kind)))
    again = peft.PeftModel.from_pretrained(make(kind), str(tmp_path / "ours"))
    torch.testing.assert_close(output(again, batch(kind)), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_generation_with_a_cache_is_that_without(kind: str) -> None:
    model, ids = ours(kind), batch(kind)["input_ids"]
    found = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False), found)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_and_back(kind: str) -> None:
    """PEFT merges every copy's change into the one weight that they share."""
    model = ours(kind)
    unmerged = output(model, batch(kind))
    before = dict(model.named_parameters(remove_duplicate=False))
    model.merge_adapter()
    torch.testing.assert_close(output(model, batch(kind)), unmerged, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(output(model, batch(kind)), unmerged)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_for_good_it_is_a_deeper_model_of_its_own(kind: str, tmp_path: Path) -> None:
    model = ours(kind)
    unmerged = output(model, batch(kind))
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, batch(kind)), unmerged, rtol=1e-5, atol=1e-5)
    assert bool(getattr(merged.config, "tie_word_embeddings", False)) == make(kind).config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, batch(kind)), output(merged, batch(kind)))
    assert len(again.get_submodule(LISTS[kind])) == len(ORDER)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_unloaded_it_is_the_very_model_again(kind: str) -> None:
    base = make(kind)
    before, expected = snapshot(base), output(base, batch(kind))
    types = getattr(base.config, "layer_types", None)
    model = get_peft_model(base, LoraConfig(**fields(kind))).eval()
    unloaded = model.unload()
    assert unloaded is base
    assert_same(before, snapshot(unloaded))
    assert unloaded.config.num_hidden_layers == 2
    assert getattr(unloaded.config, "layer_types", None) == types
    assert torch.equal(output(unloaded, batch(kind)), expected)


@torch.no_grad()
def test_moved_and_cast_while_replicated_the_layers_come_back_so() -> None:
    model = get_peft_model(make("llama"), LoraConfig(**fields("llama", layer_replication=[[0, 1], [0, 1]])))
    unloaded = model.to(torch.float64).train().unload()
    assert {p.dtype for p in unloaded.model.layers[0].parameters()} == {torch.float64}
    assert all(module.training for module in unloaded.modules())


def test_several_adapters_stand_on_the_same_layers(tmp_path: Path) -> None:
    model = ours("llama")
    alone = output(model, batch("llama"))
    model.save_pretrained(tmp_path)
    model.add_adapter("other", LoraConfig(**fields("llama", target_modules=["v_proj"])))
    model.load_adapter(tmp_path, "again")
    assert len(model.get_base_model().model.layers) == len(ORDER)
    model.set_adapter("again")
    assert torch.equal(output(model, batch("llama")), alone)
    model.add_weighted_adapter(["default", "again"], [0.5, 0.5], "mean", combination_type="cat")
    model.set_adapter("mean")
    torch.testing.assert_close(output(model, batch("llama")), alone, rtol=1e-5, atol=1e-5)
    assert model.peft_config["mean"].layer_replication == RANGES
    for other in (None, [[0, 2]]):
        with pytest.raises(UsageError, match="all adapters of a model need the same layers"):
            model.add_adapter("none", LoraConfig(**fields("llama", layer_replication=other)))
    plain = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    before = snapshot(plain)
    with pytest.raises(UsageError, match="all adapters of a model need the same layers"):
        plain.load_adapter(tmp_path, "deep")
    assert_same(before, snapshot(plain))


def test_layers_may_be_chosen_by_their_new_number() -> None:
    model = ours("llama", layers_to_transform=[3], modules_to_save=["layers.2.mlp"])
    assert list(model.base_model.layers) == ["model.layers.3.self_attn.q_proj"]
    assert list(model.base_model.saved) == ["model.layers.2.mlp"]
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, batch("llama")), output(model, batch("llama")))


FAILS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("llama", {"target_modules": ["nothing"]}, TargetError, "matches no module"),
    ("llama", {"layer_replication": [[0, 3]]}, ConfigError, "has 2 layers, 0 to 1"),
    ("llama", {"layers_to_transform": [9]}, TargetError, "layers_to_transform has 9"),
    ("t5", {"target_modules": ["q"]}, ConfigError, "there is none"),
    ("whisper", {"target_modules": ["q_proj"]}, ConfigError, "there are several"),
]


@pytest.mark.parametrize(("kind", "more", "error", "message"), FAILS)
def test_a_failure_leaves_the_model_as_it_was(
    kind: str, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make(kind)
    before, layers = snapshot(model), getattr(model.config, "num_hidden_layers", None)
    with pytest.raises(error, match=message):
        get_peft_model(model, LoraConfig(**{**fields("llama"), **more}))
    assert_same(before, snapshot(model))
    assert getattr(model.config, "num_hidden_layers", None) == layers


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    ours("llama").save_pretrained(tmp_path)
    model = make("llama")
    before = snapshot(model)
    config = LoraConfig(**fields("llama", layer_replication=[[0, 2]]))
    with pytest.raises(AdapterFileError, match="has no place in this model"):
        PeftModel.from_pretrained(model, tmp_path, config=config)
    assert_same(before, snapshot(model))


def test_replaced_forwards_cannot_be_copied() -> None:
    model = make("llama")
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    with pytest.raises(ConfigError, match="whose forward was replaced"):
        get_peft_model(model, LoraConfig(**fields("llama")))


@pytest.mark.parametrize(
    "value",
    [[[1, 1]], [[2, 1]], [[0]], [[0, 1, 2]], [[-1, 1]], [[0, 1.5]], [[True, 2]], [0, 2], "x", 3, [[]]],
    ids=repr,
)
def test_values_that_are_no_ranges_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected ranges of layers \[\[start, end\]"):
        LoraConfig(layer_replication=value)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_copies_share_cannot_be_trained(bias: str) -> None:
    with pytest.raises(ConfigError, match="share the base's biases"):
        LoraConfig(layer_replication=RANGES, bias=bias)

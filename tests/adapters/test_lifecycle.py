"""Switching adapters: what is active, what learns, and the base model that always comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, UsageError, get_peft_model

INPUTS = models.batch("llama")
MERGED = pytest.mark.filterwarnings("ignore:Adapters were merged:UserWarning")


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return models.output(model, INPUTS)


@pytest.fixture
def three(llama: torch.nn.Module) -> PeftModel:
    """Adapters "a" and "b" overlap on q_proj; "c" is on other layers."""
    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False), "a")
    adapted.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.add_adapter("c", LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    return adapted.eval()


def learning(model: PeftModel) -> set[str]:
    """The adapters that have parameters which learn."""
    return {name.split(".lora_")[1].split(".")[1] for name, p in model.named_parameters() if p.requires_grad}


def test_a_new_adapter_is_not_active_and_does_not_learn(three: PeftModel) -> None:
    assert three.active_adapters == ["a"]
    assert three.active_adapter == "a"
    assert learning(three) == {"a"}


@pytest.mark.parametrize("names", ["b", ["b"], ["a", "c"], ("c", "b", "a")], ids=str)
def test_exactly_the_named_ones_are_active_and_learn(names: Any, three: PeftModel) -> None:
    three.set_adapter(names)
    wanted = [names] if isinstance(names, str) else list(names)
    assert three.active_adapters == wanted
    assert learning(three) == set(wanted)
    three.set_adapter(names, inference_mode=True)
    assert learning(three) == set()


def test_outputs_do_not_depend_on_what_was_active_before(three: PeftModel) -> None:
    first = {}
    for name in "abc":
        three.set_adapter(name)
        first[name] = out(three)
    assert not torch.equal(first["a"], first["b"])
    for name in "cabbac":
        three.set_adapter(name)
        assert torch.equal(out(three), first[name])


@pytest.mark.parametrize(
    ("names", "message"), [("d", "no adapter 'd'"), ([], "No adapter"), (["a", "a"], "twice"), (["a", "d"], "'d'")]
)
def test_names_that_mean_nothing_change_nothing(names: Any, message: str, three: PeftModel) -> None:
    before = snapshot(three)
    with pytest.raises(UsageError, match=message):
        three.set_adapter(names)
    assert_same(before, snapshot(three))
    assert three.active_adapters == ["a"]


def test_disabled_is_the_base_and_nests(three: PeftModel) -> None:
    base = out(models.make("llama"))
    before = out(three)
    with three.disable_adapter():
        assert torch.equal(out(three), base)
        with three.disable_adapter():
            assert torch.equal(out(three), base)
        assert torch.equal(out(three), base)
        three.set_adapter("b")
        assert torch.equal(out(three), base)
        with pytest.raises(UsageError, match="disabled"):
            three.merge_adapter()
    three.set_adapter("a")
    assert torch.equal(out(three), before)


def test_an_error_inside_the_block_enables_again(three: PeftModel) -> None:
    before = out(three)
    with pytest.raises(KeyError), three.disable_adapter():
        raise KeyError
    assert torch.equal(out(three), before)


def test_disabling_while_merged_restores_the_merge(three: PeftModel) -> None:
    three.set_adapter(["a", "c"])
    three.merge_adapter()
    merged, weight = out(three), three.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with three.disable_adapter():
        assert torch.equal(out(three), out(models.make("llama")))
    layer = three.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.merged_adapters == ["a"]
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(out(three), merged)


def test_switching_while_merged_unmerges_with_a_warning(three: PeftModel) -> None:
    three.set_adapter("b")
    alone = out(three)
    three.set_adapter("a")
    three.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        three.set_adapter("b")
    assert not three.get_base_model().model.layers[0].self_attn.q_proj.merged
    assert torch.equal(out(three), alone)


def test_deleting(three: PeftModel) -> None:
    three.set_adapter(["a", "b"])
    three.delete_adapter("b")
    assert three.active_adapters == ["a"]
    assert list(three.peft_config) == ["a", "c"]
    assert not [name for name in three.state_dict() if ".b." in name]
    three.delete_adapter("a")
    assert three.active_adapters == ["c"]
    assert learning(three) == {"c"}
    # Layers that carry no adapter any more are the plain modules again.
    assert type(three.get_base_model().model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with pytest.raises(UsageError, match="unload"):
        three.delete_adapter("c")
    with pytest.raises(UsageError, match="no adapter 'a'"):
        three.delete_adapter("a")


def test_deleting_and_adding_again_starts_afresh(three: PeftModel) -> None:
    three.delete_adapter("b")
    three.add_adapter("b", LoraConfig(r=5, target_modules=["up_proj"]))
    three.set_adapter("b")
    assert torch.equal(out(three), out(models.make("llama")))


def test_deleting_beside_a_merged_adapter_keeps_the_merge(three: PeftModel) -> None:
    three.set_adapter(["b", "c"])
    both = out(three)
    three.set_adapter("a")
    three.merge_adapter(["a", "c"])
    three.delete_adapter("a")
    assert three.get_base_model().model.layers[0].mlp.down_proj.merged_adapters == ["c"]
    assert three.active_adapters == ["b"]
    torch.testing.assert_close(out(three), both)


def test_unload_gives_the_base_back_exactly(three: PeftModel) -> None:
    untouched = models.make("llama")
    base = three.unload()
    assert type(base) is type(untouched)
    assert base.state_dict().keys() == untouched.state_dict().keys()
    assert torch.equal(out(base), out(untouched))
    assert {name: p.requires_grad for name, p in base.named_parameters()} == {
        name: p.requires_grad for name, p in untouched.named_parameters()
    }


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_leaving_restores_which_parameters_learned(leave: str) -> None:
    model = models.make("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", bias="all"))
    base = getattr(adapted, leave)()
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before
    # and the model can be adapted again
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))


@MERGED
def test_a_long_life_ends_where_it_began(three: PeftModel) -> None:
    """Any sequence of operations, and the base is bit-identical under it."""
    base = out(models.make("llama"))
    steps = [
        lambda: three.set_adapter(["a", "b", "c"]),
        lambda: three.merge_adapter(["b"]),
        lambda: three.merge_adapter(["a"]),
        lambda: three.unmerge_adapter(),
        lambda: three.set_adapter("c"),
        lambda: three.merge_adapter(),
        lambda: three.set_adapter("a"),
        lambda: three.delete_adapter("b"),
        lambda: three.merge_adapter(["c", "a"]),
        lambda: three.delete_adapter("a"),
    ]
    for step in steps:
        step()
        with three.disable_adapter():
            assert torch.equal(out(three), base)
    assert torch.equal(out(three.unload()), base)

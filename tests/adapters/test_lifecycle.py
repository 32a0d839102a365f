"""Switching adapters: what is active, what learns, and the base model that always comes back."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, UsageError, get_peft_model
from veneer.adapters.lifecycle import rescale_adapter_scale

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
    both = out(three)
    three.delete_adapter("c")
    assert torch.equal(out(three), both)
    assert list(three.peft_config) == ["a", "b"]
    three.set_adapter("b")
    three.delete_adapter("a")
    assert not [name for name in three.state_dict() if ".a." in name]
    # Layers that carry no adapter any more are the plain modules again.
    assert type(three.get_base_model().model.layers[0].self_attn.v_proj) is torch.nn.Linear
    with pytest.raises(UsageError, match="no adapter 'a'"):
        three.delete_adapter("a")


@pytest.mark.parametrize(
    ("active", "left", "way"),
    [
        (["a"], ["a", "b", "c"], r"set_adapter\('b'\)"),
        (["c", "a"], ["a", "b", "c"], r"set_adapter\('b'\)"),
        (["a", "b", "c"], ["a", "b", "c"], "activate another"),
        (["a"], ["a"], r"unload\(\)"),
    ],
    ids=str,
)
def test_an_active_adapter_is_not_deleted(active: list[str], left: list[str], way: str, three: PeftModel) -> None:
    for name in set("abc") - set(left):
        three.delete_adapter(name)
    three.set_adapter(active)
    before, shown = snapshot(three), out(three)
    with pytest.raises(UsageError, match=f"'a' is active and cannot be deleted.*{way}"):
        three.delete_adapter("a")
    assert_same(before, snapshot(three))
    assert three.active_adapters == active
    assert torch.equal(out(three), shown)


def test_deleting_and_adding_again_starts_afresh(three: PeftModel) -> None:
    three.delete_adapter("b")
    three.add_adapter("b", LoraConfig(r=5, target_modules=["up_proj"]))
    three.set_adapter("b")
    assert torch.equal(out(three), out(models.make("llama")))


def test_deleting_beside_a_merged_adapter_keeps_the_merge(three: PeftModel) -> None:
    three.set_adapter(["b", "c"])
    both = out(three)
    three.set_adapter("b")
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
        lambda: three.rename_adapter("c", "d"),
        lambda: three.set_adapter("d"),
        lambda: three.merge_adapter(["a"]),
        lambda: three.delete_adapter("a"),
    ]
    for step in steps:
        step()
        with three.disable_adapter():
            assert torch.equal(out(three), base)
    assert torch.equal(out(three.unload()), base)


# Blocks


@pytest.mark.parametrize("names", [("b",), ("c", "b")], ids=str)
def test_a_block_runs_these_adapters_alone(names: tuple[str, ...], three: PeftModel) -> None:
    three.set_adapter(list(names))
    expected = out(three)
    three.set_adapter("a")
    before, learned = out(three), learning(three)
    with three.adapter(*names):
        assert torch.equal(out(three), expected)
        assert three.active_adapters == list(names)
        with three.adapter("a"):
            assert torch.equal(out(three), before)
        assert torch.equal(out(three), expected)
        assert learning(three) == learned
    assert three.active_adapters == ["a"]
    assert torch.equal(out(three), before)
    assert learning(three) == learned == {"a"}


@pytest.mark.parametrize("names", [("d",), (), ("b", "b")], ids=str)
def test_a_block_of_no_adapter_changes_nothing(names: tuple[str, ...], three: PeftModel) -> None:
    three.merge_adapter()
    before = snapshot(three)
    with pytest.raises(UsageError), three.adapter(*names):
        raise AssertionError
    assert_same(before, snapshot(three))


def test_a_block_restores_on_an_error_what_was_disabled_and_what_was_merged(three: PeftModel) -> None:
    three.set_adapter("b")
    alone = out(three)
    three.set_adapter(["a", "c"])
    three.merge_adapter(["a"])
    before, base = out(three), out(models.make("llama"))
    q_proj = three.get_base_model().model.layers[0].self_attn.q_proj

    def inside() -> None:
        assert torch.equal(out(three), alone)
        three.merge_adapter()
        raise KeyError

    with pytest.raises(KeyError), three.adapter("b"):
        inside()
    assert q_proj.merged_adapters == ["a"]
    assert three.active_adapters == ["a", "c"]
    assert torch.equal(out(three), before)
    with three.disable_adapter():
        with three.adapter("b"):
            assert torch.equal(out(three), alone)
        assert torch.equal(out(three), base)
    assert q_proj.merged_adapters == ["a"]
    assert torch.equal(out(three), before)


def test_a_block_in_which_the_one_before_goes(three: PeftModel) -> None:
    with three.adapter("b"):
        three.delete_adapter("a")
    assert three.active_adapters == ["b"]


@MERGED
def test_what_a_disabled_block_activates_is_not_joined_by_what_was_merged(three: PeftModel) -> None:
    three.set_adapter("b")
    alone = out(three)
    three.set_adapter("a")
    three.merge_adapter()
    with three.disable_adapter():
        three.set_adapter("b")
    assert torch.equal(out(three), alone)


# Names


@pytest.mark.parametrize("active", ["a", "b"])
def test_renaming(active: str, three: PeftModel) -> None:
    three.set_adapter(active)
    before = out(three)
    parameters = [id(p) for p in three.parameters()]
    names = [name.replace(".a.", ".z.") for name, _ in three.named_parameters()]
    three.rename_adapter("a", "z")
    assert [name for name, _ in three.named_parameters()] == names
    assert [id(p) for p in three.parameters()] == parameters
    assert list(three.peft_config) == ["z", "b", "c"]
    assert three.active_adapters == ["z" if active == "a" else "b"]
    assert torch.equal(out(three), before)
    three.set_adapter("z")
    three.merge_adapter()
    three.rename_adapter("z", "a")
    three.unmerge_adapter()
    three.set_adapter(active)
    assert torch.equal(out(three), before)


def test_renaming_takes_heads_and_biases_along(tmp_path: Any) -> None:
    config = LoraConfig(task_type="SEQ_CLS", bias="all", init_lora_weights=False)
    model = get_peft_model(models.make("bert"), config, "a").eval()
    inputs = models.batch("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.add_adapter("b", config)
    before = models.output(model, inputs)
    model.rename_adapter("a", "z")
    assert torch.equal(models.output(model, inputs), before)
    model.set_adapter("b")
    model.set_adapter("z")
    assert torch.equal(models.output(model, inputs), before)
    model.save_pretrained(tmp_path, selected_adapters=["z"])
    again = PeftModel.from_pretrained(models.make("bert"), tmp_path / "z")
    assert torch.equal(models.output(again, inputs), before)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("d", "e", "no adapter 'd'"), ("a", "b", "already an adapter 'b'"), ("a", "x.y", "cannot name")],
)
def test_renaming_that_means_nothing(old: str, new: str, message: str, three: PeftModel) -> None:
    before = snapshot(three)
    with pytest.raises(UsageError, match=message):
        three.rename_adapter(old, new)
    assert_same(before, snapshot(three))
    three.rename_adapter("a", "a")
    assert_same(before, snapshot(three))


# What learns


@pytest.mark.parametrize(("names", "on"), [("b", True), (["b", "c"], True), ("a", False), (["c"], False)], ids=str)
def test_gradients_of_some_adapters_as_in_peft(names: Any, on: bool, three: PeftModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on short names
        theirs = peft.get_peft_model(models.make("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]), "a")
        theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        theirs.add_adapter("c", peft.LoraConfig(target_modules=["down_proj"]))
        theirs.set_adapter("a")
    theirs.set_requires_grad(names, on)
    three.set_requires_grad(names, on)
    assert {n: p.requires_grad for n, p in three.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }


def test_gradients_of_frozen_factors_heads_and_biases() -> None:
    config = LoraConfig(target_modules=["query"], task_type="SEQ_CLS", bias="lora_only", use_lorafa=True)
    model = get_peft_model(models.make("bert"), config, "a")
    right = {name for name, p in model.named_parameters() if p.requires_grad}
    model.set_requires_grad("a", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("a")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == right
    model.add_adapter("b", config)
    with pytest.raises(UsageError, match="'b' trains the base's biases"):
        model.set_requires_grad("b")
    with pytest.raises(UsageError, match="no adapter 'x'"):
        model.set_requires_grad(["a", "x"], False)


@pytest.mark.parametrize("multiplier", [0, 0.25, 1.0, 2])
def test_rescaling_for_a_block_as_in_peft(multiplier: float, three: PeftModel, tmp_path: Any) -> None:
    three.save_pretrained(tmp_path, selected_adapters=["a"])
    theirs = peft.PeftModel.from_pretrained(models.make("llama"), str(tmp_path / "a"))
    before = out(three)
    with rescale_adapter_scale(three, multiplier), peft.helpers.rescale_adapter_scale(theirs, multiplier):
        torch.testing.assert_close(out(three), out(theirs))
        three.delete_adapter("b")
    assert torch.equal(out(three), before)
    with pytest.raises(KeyError), rescale_adapter_scale(three, 0.5):
        raise KeyError
    assert torch.equal(out(three), before)


def test_rescaling_that_would_do_nothing(three: PeftModel) -> None:
    with pytest.raises(UsageError, match="a number, not '2'"), rescale_adapter_scale(three, "2"):  # type: ignore[arg-type]
        raise AssertionError
    with pytest.raises(UsageError, match="no adapter"), rescale_adapter_scale(models.make("llama"), 2):
        raise AssertionError
    three.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"), rescale_adapter_scale(three, 2):
        raise AssertionError

"""Trained rows of embeddings: PEFT's numbers, names and files; the rows alone, bit for bit."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapters.snapshot import assert_same, snapshot
from tests.models import D, V, batch, make, output
from veneer import AdapterFileError, ConfigError, LoraConfig, MergeError, PeftModel, UsageError, get_peft_model
from veneer.core.errors import TargetError

IDS = [5, 3, 11]
TARGETS = {"llama": "q_proj", "llama-tied": "q_proj", "gpt2": "c_attn", "t5": "q", "bert": "query", "gemma": "q_proj"}
TABLES = {
    "llama": "model.embed_tokens",
    "llama-tied": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "t5": "shared",
    "bert": "bert.embeddings.word_embeddings",
    "gemma": "model.embed_tokens",
}
KINDS = list(TARGETS)
DELTA = "token_adapter.trainable_tokens_delta"


def fields(kind: str, ids: Any = None, **more: Any) -> dict[str, Any]:
    more.setdefault("trainable_token_indices", IDS if ids is None else ids)
    return {"r": 2, "lora_alpha": 4, "target_modules": [TARGETS[kind]], **more}


def move(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "trainable_tokens_delta" in name:
                start = 0 if "lora_" in name else parameter
                parameter.copy_(start + 0.3 * torch.randn(parameter.shape, generator=generator))


def tokens(kind: str) -> dict[str, Tensor]:
    """A batch with trained and other tokens."""
    inputs = batch(kind)
    for key, ids in inputs.items():
        ids[:, :2] = torch.tensor(IDS[:2])
        inputs[key] = ids
    return inputs


def both(kind: str, **more: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself, and says so.
        theirs = peft.get_peft_model(make(kind), peft.LoraConfig(**fields(kind, **more)))
    ours = get_peft_model(make(kind), LoraConfig(**fields(kind, **more)))
    move(theirs)
    move(ours)
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_names_are_pefts(kind: str) -> None:
    ours, theirs = both(kind)
    mine, reference = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == reference.keys()
    assert {n for n, p in mine.items() if p.requires_grad} == {n for n, p in reference.items() if p.requires_grad}
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    inputs = tokens(kind)
    a, b = output(ours, inputs), output(theirs, inputs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(b)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for name, parameter in mine.items():
        assert (parameter.grad is None) == (reference[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()  # T5 picks another attention kernel for a bias that requires gradients.
def test_a_fresh_adapter_changes_nothing_and_a_disabled_one_either(kind: str) -> None:
    base = output(make(kind), tokens(kind))
    model = get_peft_model(make(kind), LoraConfig(**fields(kind)))
    # A head's scores of some rows are one product of their own, which may round otherwise.
    torch.testing.assert_close(output(model, tokens(kind)), base, rtol=1e-6, atol=1e-6)
    move(model)
    changed = output(model, tokens(kind))
    assert not torch.equal(changed, base)
    with model.disable_adapter():
        assert torch.equal(output(model, tokens(kind)), base)
    assert torch.equal(output(model, tokens(kind)), changed)
    assert torch.equal(output(model.unload(), tokens(kind)), base)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_only_the_rows_learn(kind: str) -> None:
    model = get_peft_model(make(kind), LoraConfig(**fields(kind)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output(model, tokens(kind)).square().sum().backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert f"base_model.model.{TABLES[kind]}.{DELTA}.default" in moved
    assert all("lora_" in name or DELTA in name for name in moved)
    assert model.get_nb_trainable_parameters()[0] == model.match_report.trainable
    assert model.match_report.rows == ((TABLES[kind], len(IDS) * D),)
    assert model.get_nb_trainable_parameters() == both(kind)[1].get_nb_trainable_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    ours, theirs = both(kind)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, reference = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == reference.keys()
    assert f"base_model.model.{TABLES[kind]}.{DELTA}" in mine
    for key, tensor in mine.items():
        assert torch.equal(tensor, reference[key])
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["trainable_token_indices"] == IDS
    inputs = tokens(kind)
    loaded = PeftModel.from_pretrained(make(kind), tmp_path / "theirs")
    assert torch.equal(output(loaded, inputs), output(ours, inputs))
    again = peft.PeftModel.from_pretrained(make(kind), str(tmp_path / "ours"))
    torch.testing.assert_close(output(again, inputs), output(theirs, inputs), rtol=0, atol=0)


def test_whole_embeddings_that_peft_wrote_beside_the_rows_are_read(tmp_path: Path) -> None:
    for kind in ("llama", "llama-tied"):
        ours, theirs = both(kind)
        theirs.save_pretrained(tmp_path / kind, save_embedding_layers=True)
        loaded = PeftModel.from_pretrained(make(kind), tmp_path / kind)
        assert torch.equal(output(loaded, tokens(kind)), output(ours, tokens(kind)))
        ours.save_pretrained(tmp_path / f"{kind}-ours", save_embedding_layers=True)
        again = peft.PeftModel.from_pretrained(make(kind), str(tmp_path / f"{kind}-ours"))
        torch.testing.assert_close(output(again, tokens(kind)), output(theirs, tokens(kind)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_writes_the_rows_exactly_and_unmerging_gives_the_tensor_back(kind: str) -> None:
    model = get_peft_model(make(kind), LoraConfig(**fields(kind)))
    move(model)
    inputs = tokens(kind)
    before, unmerged = dict(model.named_parameters(remove_duplicate=False)), output(model, inputs)
    values = {name: p.detach().clone() for name, p in before.items()}
    rows = before[f"base_model.model.{TABLES[kind]}.{DELTA}.default"].detach()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        table = model.get_input_embeddings().weight
        assert torch.equal(table[IDS], rows)
        others = [i for i in range(V) if i not in IDS]
        assert torch.equal(table[others], make(kind).get_input_embeddings().weight[others])
        torch.testing.assert_close(output(model, inputs), unmerged, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        after = dict(model.named_parameters(remove_duplicate=False))
        assert all(after[name] is parameter for name, parameter in before.items())
        assert all(torch.equal(after[name], value) for name, value in values.items())
        assert torch.equal(output(model, inputs), unmerged)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unloaded(kind: str, tmp_path: Path) -> None:
    ours, theirs = both(kind)
    inputs = tokens(kind)
    unmerged = output(ours, inputs)
    tied = getattr(ours.config, "tie_word_embeddings", False) and kind != "bert"
    merged = ours.merge_and_unload()
    assert not any("token_adapter" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(output(merged, inputs), unmerged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(merged, inputs), output(theirs.merge_and_unload(), inputs), rtol=1e-5, atol=1e-5)
    if tied:
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert torch.equal(output(type(merged).from_pretrained(tmp_path).eval(), inputs), output(merged, inputs))


def test_several_adapters() -> None:
    kind = "llama-tied"
    base = output(make(kind), tokens(kind))
    model = get_peft_model(make(kind), LoraConfig(**fields(kind)), "one")
    model.add_adapter("two", LoraConfig(**fields(kind, ids=[7, 8])))
    model.add_adapter("same", LoraConfig(**fields(kind, ids=[3])))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    move(model)
    alone = {}
    for name in ("one", "two", "same", "plain"):
        model.set_adapter(name)
        alone[name] = output(model, tokens(kind))
        learning = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".{name}" in n for n in learning)
    assert not torch.equal(alone["one"], alone["same"])
    with pytest.raises(UsageError, match="both train the row of token 3"):
        model.set_adapter(["one", "same"])
    assert model.active_adapters == ["plain"]
    model.set_adapter(["one", "two", "plain"])
    together = output(model, tokens(kind))
    model.merge_adapter(["two"])
    torch.testing.assert_close(output(model, tokens(kind)), together, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="both train the row of token 3"):
        model.merge_adapter(["one", "same"])
    model.merge_adapter(["one", "plain"])
    torch.testing.assert_close(output(model, tokens(kind)), together, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, tokens(kind)), together)
    with model.disable_adapter():
        assert torch.equal(output(model, tokens(kind)), base)
    model.set_adapter("one")
    for name in ("two", "same"):
        model.delete_adapter(name)
    assert torch.equal(output(model, tokens(kind)), alone["one"])
    assert torch.equal(output(copy.deepcopy(model), tokens(kind)), alone["one"])


def test_deleting_the_last_adapter_with_rows_unwraps_the_table() -> None:
    model = get_peft_model(make("llama-tied"), LoraConfig(r=2, target_modules=["q_proj"]), "plain")
    embedding = model.get_input_embeddings()
    model.add_adapter("rows", LoraConfig(**fields("llama-tied")))
    assert model.get_input_embeddings() is not embedding
    model.delete_adapter("rows")
    assert model.get_input_embeddings() is embedding
    assert type(model.get_output_embeddings()) is nn.Linear


def test_by_module_name_also_a_head_of_its_own() -> None:
    ids = {"embed_tokens": [3, 5], "lm_head": [5, 9, 2]}
    for kind in ("llama", "llama-tied"):
        ours, theirs = both(kind, trainable_token_indices=ids)
        assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        reference = output(theirs, tokens(kind))
        torch.testing.assert_close(output(ours, tokens(kind)), reference, rtol=1e-5, atol=1e-5)
        merged = ours.merge_and_unload()
        torch.testing.assert_close(output(merged, tokens(kind)), reference, rtol=1e-5, atol=1e-5)
        assert not merged.config.tie_word_embeddings
    ours, theirs = both("llama-tied", trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [3, 5]})
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    torch.testing.assert_close(output(ours, tokens("llama")), output(theirs, tokens("llama")), rtol=1e-5, atol=1e-5)


def test_a_head_keeps_its_bias() -> None:
    """PEFT leaves the head's bias out."""
    model = make("bert-tokens")
    config = LoraConfig(r=2, target_modules=["query"], trainable_token_indices={"classifier": [1]})
    base = output(model, batch("bert-tokens"))
    assert model.classifier.bias is not None
    adapted = get_peft_model(model, config)
    torch.testing.assert_close(output(adapted, batch("bert-tokens")), base, rtol=1e-6, atol=1e-6)


def test_rows_of_a_head_alone_do_not_reach_the_embedding_that_it_is_tied_to() -> None:
    config = LoraConfig(**fields("llama-tied", ids={"lm_head": [3]}))
    with pytest.warns(UserWarning, match="are not trained in model.embed_tokens"):
        model = get_peft_model(make("llama-tied"), config)
    move(model)
    merged = model.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_other_modules_see_the_rows_in_weight() -> None:
    model = get_peft_model(make("llama"), LoraConfig(**fields("llama")))
    move(model)
    wrapper = model.get_input_embeddings()
    assert torch.equal(wrapper.weight[IDS], wrapper.token_adapter.trainable_tokens_delta["default"])
    assert wrapper.num_embeddings == V
    with model.disable_adapter():
        assert torch.equal(wrapper.weight, make("llama").model.embed_tokens.weight)


@pytest.mark.parametrize("widen", [True, False])
def test_halves(widen: bool, tmp_path: Path) -> None:
    model = make("llama-tied", dtype=torch.bfloat16)
    base = output(model, tokens("llama"))
    adapted = get_peft_model(model, LoraConfig(**fields("llama")), autocast_adapter_dtype=widen)
    rows = adapted.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert rows.dtype == (torch.float32 if widen else torch.bfloat16)
    assert output(adapted, tokens("llama")).dtype == torch.bfloat16
    torch.testing.assert_close(output(adapted, tokens("llama")), base, rtol=1e-2, atol=1e-2)
    move(adapted)
    unmerged = output(adapted, tokens("llama"))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama-tied", dtype=torch.bfloat16), tmp_path, autocast_adapter_dtype=widen)
    assert torch.equal(output(again, tokens("llama")), unmerged)
    torch.testing.assert_close(output(adapted.merge_and_unload(), tokens("llama")), unmerged, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_new_tokens_are_saved_without_the_table(kind: str, tmp_path: Path) -> None:
    """The rows that ``resize_token_embeddings`` fills at random differ from run to run; the trained ones do not."""
    make(kind).save_pretrained(tmp_path / "base")
    cls = type(make(kind))
    new = list(range(V, V + 30))
    ids = new if kind == "llama-tied" else {"embed_tokens": new, "lm_head": new}

    def resized(seed: int) -> Any:
        torch.manual_seed(seed)
        model = cls.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(V + 30, mean_resizing=False)
        return model

    model = get_peft_model(resized(1), LoraConfig(**fields(kind, ids=ids)))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert max(t.shape[0] for t in tensors.values()) <= 30
    assert not any(key.endswith(("embed_tokens.weight", "base_layer.weight")) for key in tensors)
    inputs = {"input_ids": torch.tensor([[V, 4, V + 29, 7]])}
    loaded = PeftModel.from_pretrained(resized(2), tmp_path / "adapter")
    assert torch.equal(output(loaded, inputs), output(model.eval(), inputs))
    with pytest.raises(AdapterFileError, match=r"resize_token_embeddings\(67\) first"):
        PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_table_with_new_rows_that_are_not_all_trained_is_saved_whole(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    model = type(make("llama")).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(**fields("llama", ids=[V, V + 1, V + 2])))
    with pytest.warns(UserWarning, match="lm_head is saved whole"):
        adapted.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert "base_model.model.lm_head.weight" in keys
    assert not any("embed_tokens" in key and DELTA not in key for key in keys)


def test_loading_a_checkpoint_again_fills_the_rows(tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), LoraConfig(**fields("llama")))
    move(model)
    model.save_pretrained(tmp_path)
    expected = output(model, tokens("llama"))
    meta = get_peft_model(make("llama"), LoraConfig(**fields("llama")), low_cpu_mem_usage=True)
    assert meta.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].is_meta
    meta.load_adapter(tmp_path, "default")
    assert torch.equal(output(meta, tokens("llama")), expected)
    other = get_peft_model(make("llama"), LoraConfig(**fields("llama", ids=[3, 5, 11])), low_cpu_mem_usage=True)
    with pytest.raises(UsageError, match="another config"):
        other.load_adapter(tmp_path, "default")


REFUSED: list[tuple[Any, str]] = [
    ([], "expected a list of token ids"),
    ("3", "expected a list of token ids"),
    (3, "expected a list of token ids"),
    ([3, 3], "token 3 twice"),
    ([-1], "whole numbers from 0"),
    ([True], "whole numbers from 0"),
    ([1.0], "whole numbers from 0"),
    ({"embed_tokens": []}, "expected a list of token ids"),
    ({1: [1]}, "expected a list of token ids"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_values_that_mean_nothing_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(trainable_token_indices=value)


CANNOT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"trainable_token_indices": [V]}, TargetError, rf"resize_token_embeddings\({V + 1}\) first"),
    ({"trainable_token_indices": {"embed_token": [1]}}, TargetError, r"Did you mean 'embed_tokens'"),
    ({"trainable_token_indices": {"norm": [1]}}, TargetError, "no plain embedding"),
    ({"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}, TargetError, "twice"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, UsageError, "leave one of the two out"),
    ({"modules_to_save": ["embed_tokens"]}, UsageError, "leave one of the two out"),
]


@pytest.mark.parametrize(("more", "error", "message"), CANNOT)
def test_what_cannot_be_is_refused_before_anything_changes(
    more: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make("llama")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, LoraConfig(**fields("llama", **more)))
    assert_same(before, snapshot(model))


def test_other_adapters_cannot_change_the_same_table() -> None:
    model = get_peft_model(make("llama-tied"), LoraConfig(**fields("llama-tied")))
    before = snapshot(model)
    for more in ({"target_modules": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        config = {"r": 2, "target_modules": ["q_proj"], **more}
        with pytest.raises(UsageError, match="leave one of the two out"):
            model.add_adapter("other", LoraConfig(**config))
    with pytest.raises(UsageError, match="in another way"), pytest.warns(UserWarning, match="are not trained in"):
        model.add_adapter("other", LoraConfig(**fields("llama-tied", ids={"lm_head": [1]})))
    assert_same(before, snapshot(model))


def test_an_encoder_decoder_cannot_be_untied() -> None:
    ids = {"shared": [1], "lm_head": [2]}
    with pytest.warns(UserWarning, match="are not trained in"):
        model = get_peft_model(make("t5"), LoraConfig(**fields("t5", ids=ids)))
    with pytest.raises(MergeError, match="cannot be saved with the two different"):
        model.merge_and_unload()


def test_values_that_are_not_finite_are_not_merged_when_asked_to_be_safe() -> None:
    model = get_peft_model(make("llama"), LoraConfig(**fields("llama")))
    with torch.no_grad():
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"][0] = torch.nan
    with pytest.raises(MergeError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert not model.base_model.tokens.merged


def test_generation_uses_the_rows() -> None:
    ours, theirs = both("llama-tied")
    ids = tokens("llama")["input_ids"]
    a = ours.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(a, theirs.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_adapters_with_rows_are_renamed_frozen_and_not_combined() -> None:
    model = get_peft_model(make("llama-tied"), LoraConfig(**fields("llama-tied")))
    move(model)
    before = output(model, tokens("llama"))
    with pytest.raises(UsageError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "other")
    model.rename_adapter("default", "first")
    assert torch.equal(output(model, tokens("llama")), before)
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["first"]
    model.set_requires_grad("first", False)
    assert not rows.requires_grad
    model.set_requires_grad("first", True)
    assert rows.requires_grad

"""A LoRA made of the difference of two models, against the dense SVD of every difference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters.making import adapted, best, close, peft_updates_in, updates
from veneer import LoraConfig, PeftModel, TargetError, UsageError
from veneer.adapters.checkpoint import Checkpoint
from veneer.adapters.derived import write
from veneer.adapters.extract import Extraction, extract
from veneer.tasks.shards import shards, skeleton, weight_files


def opened(folder: Path, model_class: str) -> tuple[Any, Checkpoint]:
    model = skeleton(folder, auto_class=model_class)
    return model, Checkpoint(model, shards(model, weight_files(folder)))


def extracted(base: Any, tuned: Any, folder: Path, rank: float, *, shard: str = "5GB", **config: Any) -> Extraction:
    base.save_pretrained(folder / "base", max_shard_size=shard)
    tuned.save_pretrained(folder / "tuned", max_shard_size=shard)
    kind = type(tuned).__name__
    model, before = opened(folder / "base", kind)
    _, after = opened(folder / "tuned", kind)
    full = LoraConfig(**{"target_modules": "all-linear", "base_model_name_or_path": str(folder / "base"), **config})
    found = extract(model, before, after, full, rank)
    write(folder / "adapter", found.files, figures={})
    return found


def moved(kind: str, *, seed: int = 5, scale: float = 0.05, only: str = "") -> Any:
    """The same model after a full fine-tune of everything whose name has ``only`` in it."""
    model = models.make(kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def differences(base: Any, tuned: Any) -> dict[str, Tensor]:
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    return {name: (after[name] - before[name]).detach().double() for name in before}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize("rank", [2, 0.7])
def test_every_layer_is_the_best_of_its_rank(kind: str, rank: float, tmp_path: Path) -> None:
    base, tuned = models.make(kind), moved(kind)
    changes = differences(base, tuned)
    found = extracted(base, tuned, tmp_path, rank, shard="5KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 3
    wanted = {}
    for layer in found.layers:
        change = changes[f"{layer.path}.weight"]
        change = change.T if kind == "gpt2" else change
        S = torch.linalg.svdvals(change)
        kept = (S.square().cumsum(0) / S.square().sum()).tolist()
        r = rank if rank == 2 else next(r for r, share in enumerate(kept, start=1) if share >= rank)
        assert layer.r == r
        assert layer.r_before is None
        assert layer.norm == pytest.approx(float(change.norm()), rel=1e-5)
        assert layer.kept == pytest.approx(kept[r - 1], abs=1e-5)
        assert layer.error == pytest.approx(math.sqrt(1 - kept[r - 1]), abs=1e-4)
        wanted[layer.path] = best(change, r)
    assert found.unchanged == ()
    close(updates(PeftModel.from_pretrained(base, tmp_path / "adapter")), wanted, relative=1e-5)
    close(peft_updates_in(tmp_path / "adapter", kind), wanted, relative=1e-5)
    # Everything else that changed is named: with the layers, that is every parameter.
    named = {f"{layer.path}.weight" for layer in found.layers} | {tensor.name for tensor in found.left_out}
    assert named >= {name for name, change in changes.items() if change.any()} - _tied(base)


def _tied(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(dict(model.named_parameters()))


def test_a_merged_lora_is_found_again(tmp_path: Path) -> None:
    source = adapted("llama", r=3)
    wanted = updates(source)
    tuned = source.merge_and_unload()
    given = models.batch("llama")
    expected = models.output(tuned, given)
    found = extracted(models.make("llama"), tuned, tmp_path, 3)
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "adapter")
    close(updates(again), wanted, relative=1e-6)
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-5, atol=1e-5)
    assert max(layer.error for layer in found.layers) < 1e-5
    assert found.left_out == ()
    assert again.peft_config["default"].target_modules == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_differ_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = models.make("llama").to(dtype), moved("llama").to(dtype)
    changes = differences(base.float(), tuned.float())
    found = extracted(base.to(dtype), tuned.to(dtype), tmp_path, 16)
    again = updates(PeftModel.from_pretrained(base.float(), tmp_path / "adapter"))
    close(again, {path: changes[f"{path}.weight"] for path in again})
    assert {tensor.dtype for tensor in found.files.tensors.values()} == {torch.float32}


def test_layers_that_did_not_change_are_left_out(tmp_path: Path) -> None:
    base, tuned = models.make("llama"), moved("llama", only="layers.1.self_attn")
    found = extracted(base, tuned, tmp_path, 2)
    changed = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert sorted(layer.path for layer in found.layers) == sorted(changed)
    assert len(found.unchanged) == 10
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "adapter")
    assert sorted(again.base_model.layers) == sorted(changed)


def test_the_rank_is_at_most_the_smaller_side(tmp_path: Path) -> None:
    found = extracted(models.make("llama"), moved("llama"), tmp_path, 12, target_modules=["q_proj", "k_proj"])
    assert {layer.path.rpartition(".")[2]: layer.r for layer in found.layers} == {"q_proj": 12, "k_proj": 8}
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "adapter")
    assert {layer.r["default"] for layer in again.base_model.layers.values()} == {8, 12}
    assert {layer.scaling["default"] for layer in again.base_model.layers.values()} == {1.0}


def test_what_cannot_be_in_it_is_named_and_modules_can_be_kept_whole(tmp_path: Path) -> None:
    base, tuned = models.make("llama"), moved("llama")
    found = extracted(base, tuned, tmp_path / "one", 2, exclude_modules=["down_proj"])
    changes = differences(base, tuned)
    names = {tensor.name: tensor for tensor in found.left_out}
    assert set(names) == {
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"),
        *(
            f"model.layers.{n}.{norm}.weight"
            for n in (0, 1)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ),
        *(f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)),
    }
    norm = names["model.norm.weight"]
    weight = base.model.norm.weight.detach()
    assert norm.how == "changed"
    assert norm.relative == pytest.approx(float(changes["model.norm.weight"].norm() / weight.norm()), rel=1e-5)

    whole = ["lm_head", "embed_tokens", "norm", "layernorm"]
    found = extracted(base, tuned, tmp_path / "two", 16, modules_to_save=whole)
    assert found.left_out == ()
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "two" / "adapter")
    given = models.batch("llama")
    torch.testing.assert_close(models.output(again, given), models.output(tuned, given), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_are_read_once(tmp_path: Path) -> None:
    base, tuned = models.make("llama-tied"), moved("llama-tied")
    found = extracted(base, tuned, tmp_path, 2)
    assert [tensor.name for tensor in found.left_out if "norm" not in tensor.name] == ["model.embed_tokens.weight"]
    with pytest.warns(UserWarning, match="does not reach"):
        found = extracted(base, tuned, tmp_path, 2, target_modules=["lm_head"])
    assert [layer.path for layer in found.layers] == ["lm_head"]


def test_a_new_head_is_kept_whole(tmp_path: Path) -> None:
    """The base is a body; the fine-tune has a classification head, which its task saves whole."""
    tuned = moved("bert")
    base = models.make("bert").bert
    with pytest.warns(UserWarning, match="no weights for classifier"):
        found = extracted(base, tuned, tmp_path, 16, task_type="SEQ_CLS", target_modules=["query", "value"])
    assert {key for key in found.files.tensors if "classifier" in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    again = PeftModel.from_pretrained(models.make("bert"), tmp_path / "adapter")
    head = again.base_model.saved["classifier"].modules_to_save["default"]
    assert torch.equal(head.weight, tuned.classifier.weight)


def test_another_vocabulary(tmp_path: Path) -> None:
    base, tuned = models.make("llama"), moved("llama")
    tuned.resize_token_embeddings(models.V + 3)
    found = extracted(base, tuned, tmp_path, 2)
    how = {tensor.name: tensor.how for tensor in found.left_out}
    assert how["lm_head.weight"] == f"shape ({models.V}, {models.D}) became ({models.V + 3}, {models.D})"
    with pytest.raises(UsageError, match=r"'lm_head.weight' has shape .* in the base"):
        extracted(base, tuned, tmp_path, 2, target_modules=["lm_head"])


def test_the_base_is_recognised(tmp_path: Path) -> None:
    from veneer import BaseMismatchWarning

    extracted(models.make("llama"), moved("llama"), tmp_path, 2)
    PeftModel.from_pretrained(models.make("llama"), tmp_path / "adapter")
    with pytest.warns(BaseMismatchWarning, match="its weights differ"):
        PeftModel.from_pretrained(models.make("llama", seed=8), tmp_path / "adapter")


def test_nothing_changed(tmp_path: Path) -> None:
    base = models.make("llama")
    with pytest.raises(UsageError, match=r"Nothing changed in the 14 layers that were looked at\.$"):
        extracted(base, base, tmp_path, 2)
    with pytest.raises(UsageError, match=r"in the 14 layers .* 5 other tensors did, such as 'model.layers.0.input"):
        extracted(base, moved("llama", only="norm"), tmp_path, 2)


def test_a_name_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="q_proj"):
        extracted(models.make("llama"), moved("llama"), tmp_path, 2, target_modules=["q_porj"])


def test_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each model no tensor is held when the next one is read."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = Checkpoint.read

    def watched(self: Checkpoint, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    extracted(models.make("llama"), moved("llama"), tmp_path, 2)
    assert len(alive) > 40
    assert most == 2

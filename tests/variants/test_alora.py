"""Activated LoRA: PEFT's numbers where it is invoked, the base's bits where it is not, with and without a cache."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.adapters.snapshot import assert_same, snapshot
from tests.models import make
from veneer import ConfigError, LoraConfig, MergeError, PeftModel, UsageError, get_peft_model
from veneer.adapters.invocation import NEVER, starts

INVOKE = [5, 9]
IDS = torch.tensor(
    [
        [3, 4, 5, 9, 7, 8, 11, 12],  # in the middle
        [3, 4, 6, 9, 7, 8, 11, 12],  # not at all
        [5, 9, 6, 5, 9, 8, 11, 12],  # twice: the last one counts
        [3, 4, 6, 7, 7, 8, 5, 9],  # at the end
        [3, 4, 6, 7, 7, 8, 9, 5],  # begun, not completed
        [5, 9, 6, 7, 7, 8, 9, 4],  # from the start
    ]
)
FIRST = [2, NEVER, 3, 6, NEVER, 0]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "gemma": ["v_proj", "up_proj"]}
KINDS = list(TARGETS)


def fields(kind: str = "llama", **more: Any) -> dict[str, Any]:
    return {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": TARGETS[kind],
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": kind == "gpt2",
        "alora_invocation_tokens": INVOKE,
        **more,
    }


def move(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def ours(kind: str = "llama", **more: Any) -> PeftModel:
    model = get_peft_model(make(kind), LoraConfig(**fields(kind, **more)))
    move(model)
    return model.eval()


def theirs(kind: str = "llama", **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a layer without a bias could not be merged with lora_bias
        model = peft.get_peft_model(make(kind), peft.LoraConfig(**fields(kind, **more)))
    move(model)
    return model.eval()


def logits(model: nn.Module, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model(input_ids=ids, **more).logits


def greedy(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"lora_bias": True}, {"use_rslora": True}, {"rank_pattern": {".*": 3}}], ids=str)
def test_outputs_and_gradients_are_pefts(kind: str, more: dict[str, Any]) -> None:
    a, b = ours(kind, **more), theirs(kind, **more)
    x, y = logits(a), logits(b)
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    x.square().sum().backward()
    y.square().sum().backward()
    reference = {name: p.grad for name, p in b.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in a.named_parameters() if p.requires_grad}
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_dropout_draws_as_pefts_does() -> None:
    a, b = ours(lora_dropout=0.5).train(), theirs(lora_dropout=0.5).train()
    torch.manual_seed(3)
    x = logits(a)
    torch.manual_seed(3)
    torch.testing.assert_close(x, logits(b), rtol=1e-5, atol=1e-5)
    assert not torch.equal(x, logits(a.eval()))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_before_the_invocation_is_the_base_bit_for_bit(kind: str) -> None:
    base, model = logits(make(kind)), ours(kind)
    found = logits(model)
    for row, first in enumerate(FIRST):
        assert torch.equal(found[row, :first], base[row, :first])
        assert not (found[row, first:] == base[row, first:]).all(-1).any()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), found)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), base)
    assert not unloaded._forward_pre_hooks
    assert not unloaded._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_pefts(kind: str) -> None:
    assert torch.equal(greedy(ours(kind)), greedy(theirs(kind)))


def test_generate_with_padding_on_the_left() -> None:
    ids = torch.tensor([[0, 0, 0, 5, 9, 7], [3, 4, 5, 9, 7, 8], [0, 0, 3, 4, 6, 7]])
    mask = (ids != 0).long()
    found = greedy(ours(), ids, attention_mask=mask)
    assert torch.equal(found, greedy(theirs(), ids, attention_mask=mask))
    for row, length in enumerate(mask.sum(1)):
        alone = greedy(ours(), ids[row : row + 1, -length:])
        assert torch.equal(found[row, -6:], alone[0, -6:])


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_does_the_same_without_a_cache(more: dict[str, Any]) -> None:
    """PEFT counts from the end of what it has so far, and activates fewer tokens at every step without a cache."""
    model = ours()
    assert torch.equal(greedy(model, use_cache=False, **more), greedy(model, **more))
    # Also when the model itself is asked, which finds the invocation in each call.
    assert torch.equal(greedy(model.get_base_model()), greedy(model))


def test_one_prompt_without_a_batch_dimension_and_as_inputs() -> None:
    model = ours()
    for row in IDS[:3]:
        expected = greedy(model, row[None])
        assert torch.equal(model.generate(row[None], max_new_tokens=6, do_sample=False), expected)
        assert torch.equal(model.generate(inputs=row[None], max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
def test_token_by_token_with_a_cache_is_the_whole_sequence_at_once() -> None:
    model = ours()
    whole = logits(model)
    # A prompt that ends inside an invocation is taken up to its end.
    for prompt in (2, 4, 8):
        rows = [row for row, first in enumerate(FIRST) if first == NEVER or not first < prompt < first + len(INVOKE)]
        rows = [row for row in rows if FIRST[row] == NEVER or FIRST[row] + len(INVOKE) <= prompt]
        out = model(input_ids=IDS[rows, :prompt], use_cache=True)
        found = [out.logits]
        for step in range(prompt, IDS.shape[1]):
            out = model(input_ids=IDS[rows, step : step + 1], past_key_values=out.past_key_values)
            found.append(out.logits)
        expected = whole[rows]
        if prompt == 2:
            # Row 2 is invoked a second time later on, which a cache of what came before cannot know.
            assert rows == [1, 4, 5]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_cache_of_the_base_is_continued() -> None:
    model = ours()
    rows, prompt = [0, 1, 3], 2
    with model.disable_adapter():
        cache = model(input_ids=IDS[rows, :prompt], use_cache=True).past_key_values
    rest = model(input_ids=IDS[rows, prompt:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits(model)[rows, prompt:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_offsets_said_outright() -> None:
    """PEFT's keyword: tokens from the end."""
    a, b = ours(), theirs()
    offsets = [3, None, 8, 1, 0, 20]
    for module in (a, b):
        assert not torch.equal(logits(module, alora_offsets=offsets), logits(module))
    torch.testing.assert_close(logits(a, alora_offsets=offsets), logits(b, alora_offsets=offsets), rtol=1e-5, atol=1e-5)
    embeds = a.get_input_embeddings()(IDS)
    torch.testing.assert_close(
        a(inputs_embeds=embeds, alora_offsets=offsets).logits, logits(a, alora_offsets=offsets), rtol=0, atol=0
    )
    assert torch.equal(greedy(a, alora_offsets=offsets), greedy(b, alora_offsets=offsets))
    with pytest.raises(UsageError, match="2 entries for 6 sequences"):
        logits(a, alora_offsets=[1, 2])


def test_starts_of_documents_that_share_a_row() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    ids = torch.tensor([[5, 9, 3, 3, 3, 5, 9, 3], [3, 3, 3, 5, 9, 3, 3, 3]])
    found = starts(ids, INVOKE, positions)
    # The second row's invocation is cut in two by the border.
    assert found.tolist() == [[0] * 4 + [5] * 4, [NEVER] * 8]
    assert starts(ids, INVOKE).tolist() == [[5] * 8, [3] * 8]
    assert starts(ids[:, :1], INVOKE).tolist() == [[NEVER]] * 2
    assert starts(ids, INVOKE, before=100)[0].tolist() == [105] * 8


@torch.no_grad()
def test_documents_in_one_row_are_as_alone() -> None:
    model = ours()
    packed = torch.cat([IDS[0], IDS[2], IDS[1]])[None]
    positions = torch.arange(8).repeat(3)[None]
    found = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    expected = torch.cat([logits(model)[row] for row in (0, 2, 1)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_several_adapters() -> None:
    model = ours()
    model.add_adapter("other", LoraConfig(**fields(alora_invocation_tokens=[7])))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    move(model)
    with torch.no_grad():
        base = logits(make("llama"))
        alone = {}
        for name in ("default", "other", "plain"):
            model.set_adapter(name)
            alone[name] = logits(model)
        assert torch.equal(alone["other"][:, :3], base[:, :3])
        assert not torch.equal(alone["plain"][:, 0], base[:, 0])
        model.set_adapter(["default", "other", "plain"])
        assert not torch.equal(logits(model), alone["default"])
        model.rename_adapter("default", "first")
        model.set_adapter("first")
        assert torch.equal(logits(model), alone["default"])
        model.set_adapter("plain")
        for name in ("first", "other"):
            model.delete_adapter(name)
        assert not model.get_base_model()._forward_pre_hooks
        assert torch.equal(logits(model), alone["plain"])


def test_files_go_both_ways(tmp_path: Path) -> None:
    a, b = ours(), theirs()
    a.save_pretrained(tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(logits(PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")), logits(a))
        again = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / "ours"))
        assert torch.equal(logits(again), logits(b))


def test_copies_and_pickles_stand_on_their_own() -> None:
    model = ours()
    with torch.no_grad():
        expected = logits(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            model.set_adapter("default")
            with model.disable_adapter():
                assert torch.equal(logits(other), expected)
            assert torch.equal(greedy(other), greedy(model))


def test_it_is_never_merged() -> None:
    model = ours()
    before = snapshot(model)
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
    ):
        with pytest.raises(MergeError, match="changes only a part of the tokens"):
            merge()
        assert_same(before, snapshot(model))


def test_training_step_with_gradient_checkpointing() -> None:
    plain, checked = ours().train(), ours().train()
    checked.activation_checkpointing_enable({"use_reentrant": False})
    checked.enable_input_require_grads()
    for model in (plain, checked):
        logits(model, use_cache=False).square().sum().backward()
    for a, b in zip(plain.parameters(), checked.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    # The layers are run again during backward: another call in between would give them other tokens.
    first = logits(checked, use_cache=False)
    with pytest.raises(UsageError, match="backward pass of one call before the next"):
        logits(checked, IDS.flip(0), use_cache=False)
    first.sum().backward()
    logits(checked, IDS.flip(0), use_cache=False).sum().backward()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target_modules": ["embed_tokens"]}, "no linear layer"),
    ("llama", {"target_modules": ["lm_head"]}, "cannot be used on 'lm_head'"),
    ("llama", {"init_lora_weights": "pissa"}, "choose another start"),
    ("llama", {"use_dora": True}, "cannot be combined"),
    ("t5", {"target_modules": ["q"]}, "has an encoder's too"),
    ("vit", {"target_modules": "all-linear"}, "takes input_ids"),
]


@pytest.mark.parametrize(("kind", "more", "message"), REFUSED)
def test_what_has_no_meaning_is_refused_before_anything_changes(kind: str, more: dict[str, Any], message: str) -> None:
    model = make(kind)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig(**{**fields(), "task_type": None, **more}))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("value", [[], [-1], [True], [1.5], "5 9", 5, {"a": [1]}], ids=repr)
def test_values_that_are_no_tokens_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="alora_invocation_tokens"):
        LoraConfig(alora_invocation_tokens=value)


def test_calls_without_tokens_are_refused() -> None:
    model = ours()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(UsageError, match="looks for them in input_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(UsageError, match="looks for them in the prompt"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)
    logits(model)
    with pytest.raises(UsageError, match="whole model has to be called"):
        model.get_base_model().model(input_ids=IDS)


def test_rows_of_one_batch_through_different_adapters() -> None:
    a, b = ours(), theirs()
    for model, cls in ((a, LoraConfig), (b, peft.LoraConfig)):
        model.add_adapter("other", cls(**fields(alora_invocation_tokens=[7])))
        model.add_adapter("plain", cls(r=2, target_modules=["v_proj"]))
        move(model)
        model.set_adapter("plain")
    names = ["default", "default", "other", "__base__", "plain", "default"]
    with torch.no_grad():
        found = logits(a, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with a.disable_adapter():
                    alone = logits(a, IDS[row : row + 1])
            else:
                a.set_adapter(name)
                alone = logits(a, IDS[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, logits(b, adapter_names=names), rtol=1e-5, atol=1e-5)
        assert torch.equal(greedy(a, adapter_names=names), greedy(b, adapter_names=names))
        beams = {"adapter_names": names, "num_beams": 2}
        assert torch.equal(greedy(a, use_cache=False, **beams), greedy(a, **beams))

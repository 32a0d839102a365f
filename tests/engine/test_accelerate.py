from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests import models
from tests.engine.decoders import make
from veneer import LoraConfig, accelerated, get_peft_model, restored


def adapted(family: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(make(family), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings))


def rows(count: int = 12) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        length = int(torch.randint(5, 20, (1,), generator=drawn))
        ids = torch.randint(3, 97, (length,), generator=drawn).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return found


def padded(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in features)
    fills = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in features])
        for key, fill in fills.items()
    }
    sizes = torch.tensor([len(row["input_ids"]) for row in features])
    return {**batch, "attention_mask": (torch.arange(longest) < sizes[:, None]).long()}


def trained(model: Any, folder: Any, collator: Any, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    arguments = TrainingArguments(
        str(folder),
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, **settings},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}], ids=str
)
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_the_trainer_learns_the_same_from_packed_rows(tmp_path: Any, family: str, settings: dict[str, Any]) -> None:
    wanted, weights = trained(adapted(family), tmp_path / "plain", padded, **settings)
    losses, found = trained(accelerated(adapted(family)), tmp_path / "fast", DataCollatorWithFlattening(), **settings)
    # The Trainer writes losses with four digits.
    assert losses == pytest.approx(wanted, abs=2e-4)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, weights[name], rtol=5e-3, atol=5e-4, msg=name)


def test_logits_are_there_for_whoever_evaluates() -> None:
    model = accelerated(adapted())
    batch = padded(rows(3))
    plain = adapted().eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss, rtol=1e-5, atol=1e-5)
    model.train()
    assert model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits is not None
    assert model(**batch).logits is None
    count = 7
    expected = plain(**batch, num_items_in_batch=count).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_trains_itself() -> None:
    model = accelerated(adapted()).train()
    twin = copy.deepcopy(model)
    twin(**padded(rows(3))).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.parameters())


def test_it_is_taken_back() -> None:
    model = adapted()
    implementation = model.config._attn_implementation
    assert restored(accelerated(accelerated(model))) is model
    assert model.config._attn_implementation == implementation
    assert not any("forward" in module.__dict__ for module in model.get_base_model().modules())
    assert model.train()(**padded(rows(3))).logits is not None
    assert restored(torch.nn.Linear(1, 1)) is not None


@pytest.mark.parametrize("switch", ["kernels", "packing"])
def test_each_part_can_be_left_out(switch: str) -> None:
    model = accelerated(adapted(), **{switch: False})
    fused = sum("forward" in m.__dict__ for m in model.get_base_model().model.modules())
    assert bool(fused) == (switch != "kernels")
    assert (model.config._attn_implementation == "veneer") == (switch != "packing")


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "whisper"])
def test_models_without_a_causal_head(kind: str) -> None:
    model = get_peft_model(models.make(kind), LoraConfig(target_modules="all-linear"))
    inputs = models.batch(kind)
    with torch.no_grad():
        before = model(**inputs)[0]
        torch.testing.assert_close(accelerated(model)(**inputs)[0], before, rtol=1e-5, atol=1e-5)


def test_a_plain_model_is_fine_tuned_whole(tmp_path: Any) -> None:
    wanted, _ = trained(make("Llama"), tmp_path / "plain", padded, learning_rate=1e-3)
    losses, _ = trained(accelerated(make("Llama")), tmp_path / "fast", DataCollatorWithFlattening(), learning_rate=1e-3)
    assert losses == pytest.approx(wanted, abs=2e-4)
    assert isinstance(accelerated(make("Llama")), transformers.PreTrainedModel)

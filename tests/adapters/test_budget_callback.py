"""AdaLoRA in transformers' Trainer: the same training as in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import models
from veneer import AdaLoraCallback, AdaLoraConfig, ConfigError, LoraConfig, PeftModel, UsageError, get_peft_model

FIELDS = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj", "up_proj"]}


def trainer(model: Any, folder: Path, steps: int = 6) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in models.batch("llama", rows=8)["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[AdaLoraCallback()])


def adapted(total_step: int = 6, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(models.make("llama"), AdaLoraConfig(**FIELDS, total_step=total_step, **more))


def test_the_budget_moves_and_ends_where_it_should(tmp_path: Path) -> None:
    model = adapted()
    trainer(model, tmp_path).train()
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 2 * len(pattern) == 8
    plain = adapted().train()
    ids = models.batch("llama", rows=8)["input_ids"]
    optimiser = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for step in range(1, 7):
        plain(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        plain.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    assert plain.peft_config["default"].rank_pattern == pattern
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-4)


def test_a_schedule_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="total_step of 'default' is 9, but this training takes 6 optimiser steps"):
        trainer(adapted(total_step=9), tmp_path).train()


def test_another_kind_of_adapter_or_model_is_refused(tmp_path: Path) -> None:
    lora = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="no active adapter is an AdaLoRA adapter that learns"):
        trainer(lora, tmp_path).train()
    with pytest.raises(UsageError, match="not for a LlamaForCausalLM"):
        trainer(models.make("llama"), tmp_path).train()


def test_it_has_the_names_of_events_and_no_others() -> None:
    callback = AdaLoraCallback()
    assert callback.on_epoch_end(None, None, None) is None
    assert not hasattr(callback, "something")

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import transformers

from tests import chat
from veneer.core.errors import ConfigError
from veneer.data.encode import IGNORED, Encoded
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.task import Piece, Tally, measure

TOKENIZER = chat.tokenizer()
TASK = tasks.get("causal_lm")


def examples(count: int = 5) -> tuple[Encoded, ...]:
    return TASK.encode(rows_of(chat.pairs(count)), TOKENIZER, max_length=64, train_on="completion").examples


def expected_loss(model: torch.nn.Module, example: Encoded) -> float:
    """The summed loss of one example alone, as transformers itself computes it."""
    labels = torch.tensor([example.labels])
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss) * example.trained


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def without_selection() -> torch.nn.Module:
    """A model whose forward does not take ``logits_to_keep``."""
    model = chat.model().eval()

    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> object:
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    return Plain().eval()


@pytest.mark.parametrize("make", [chat.model, gpt2, without_selection])
def test_a_padded_batch_has_the_loss_of_its_examples_alone(make: object) -> None:
    model = make().eval()
    reference = chat.model().eval() if make is without_selection else model
    batch = TASK.collate(examples(), TOKENIZER)
    assert (batch["attention_mask"] == 0).any()
    result = TASK.loss(model, batch)
    assert result.tally.loss == pytest.approx(sum(expected_loss(reference, e) for e in examples()), rel=1e-5)
    assert result.tally.units == TASK.units(batch) == sum(example.trained for example in examples())
    assert result.total.item() == pytest.approx(result.tally.loss)


def test_pad_being_eos_or_absent_changes_nothing() -> None:
    model = chat.model().eval()
    losses = []
    for pad in ("<|end|>", "<|start|>", None):
        tokenizer = chat.tokenizer(pad=pad)
        losses.append(TASK.loss(model, TASK.collate(examples(), tokenizer)).tally.loss)
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_accuracy_counts_first_choices() -> None:
    model = chat.model().eval()
    batch = TASK.collate(examples(1), TOKENIZER)
    with torch.no_grad():
        choices = model(batch["input_ids"]).logits[0].argmax(-1)
    labels = batch["labels"][0].clone()
    hits = [t for t in range(1, len(labels)) if labels[t] != IGNORED][:2]
    for t in hits:
        batch["labels"][0, t] = choices[t - 1]
    untouched = sum(int(labels[t] == choices[t - 1]) for t in range(1, len(labels)) if t not in hits)
    with torch.no_grad():
        assert TASK.loss(model, batch).tally.correct == len(hits) + untouched


def test_metrics() -> None:
    found = TASK.metrics(Tally(loss=6.0, units=3, correct=1), [], [])
    assert found == {"loss": 2.0, "perplexity": pytest.approx(math.e**2), "token_accuracy": pytest.approx(1 / 3)}
    assert TASK.metrics(Tally(loss=1e6, units=1), [], [])["perplexity"] == math.inf
    assert math.isnan(TASK.metrics(Tally(), [], [])["loss"])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_measure_does_not_depend_on_batches_and_puts_the_mode_back(batch_size: int) -> None:
    model = chat.model(attention_dropout=0.9)
    model.train()
    found = measure(TASK, model, examples(), TOKENIZER, batch_size=batch_size, device="cpu")
    assert model.training
    model.eval()
    assert found.tally.loss == pytest.approx(sum(expected_loss(model, example) for example in examples()), rel=1e-5)


def test_preview_joins_to_the_text_with_its_trained_parts() -> None:
    rows = rows_of([{"prompt": "what is ü", "completion": "the 🪨 is"}])
    (example,) = TASK.encode(rows, TOKENIZER, max_length=64, train_on="completion").examples
    pieces = TASK.preview(example, TOKENIZER)
    assert pieces[-1] == Piece("the 🪨 is<|end|>", True)
    assert [piece.trained for piece in pieces] == [False, True]
    assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(example.input_ids)


def test_a_character_cut_by_truncation_still_previews() -> None:
    rows = rows_of([{"prompt": "a", "completion": "🪨"}])
    (example,) = TASK.encode(rows, TOKENIZER, max_length=64, train_on="completion").examples
    cut = dataclasses.replace(example, input_ids=example.input_ids[:-2], labels=example.labels[:-2])
    assert TASK.preview(cut, TOKENIZER)[-1].trained


def test_train_on_all_trains_the_prompt_too() -> None:
    rows = rows_of(chat.pairs(3))
    some = TASK.encode(rows, TOKENIZER, max_length=64, train_on="completion").report
    every = TASK.encode(rows, TOKENIZER, max_length=64, train_on="all").report
    assert some.trained_tokens < every.trained_tokens == every.tokens - every.examples


def test_tasks_are_found_by_file_name() -> None:
    assert "causal_lm" in tasks.names()
    assert not {"task", "loading"} & set(tasks.names())
    with pytest.raises(ConfigError, match=r"task is 'casual_lm'; .*Did you mean 'causal_lm'"):
        tasks.get("casual_lm")

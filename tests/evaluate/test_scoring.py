from __future__ import annotations

import math

import pytest
import torch

from tests import chat
from veneer.core.errors import ConfigError, DataError
from veneer.data.sources import rows_of
from veneer.evaluate.scoring import score

SETTINGS = {"task": "causal_lm", "max_length": 64, "train_on": "completion"}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_figures_are_means_over_trained_tokens(batch_size: int) -> None:
    model, tokenizer = chat.model().eval(), chat.tokenizer()
    losses, hits = [], []
    for row in chat.pairs(7):
        prompt = tokenizer(f"<|start|>user\n{row['prompt']}<|end|>\n<|start|>assistant\n")["input_ids"]
        answer = tokenizer(f"{row['completion']}<|end|>")["input_ids"]
        with torch.no_grad():
            chances = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for at, token in enumerate(answer, start=len(prompt) - 1):
            losses.append(-float(chances[at, token]))
            hits.append(int(chances[at].argmax()) == token)
    found = score(model, tokenizer, rows_of(chat.pairs(7)), batch_size=batch_size, **SETTINGS)
    loss = sum(losses) / len(losses)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.metrics["token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found.data.trained_tokens == len(losses)
    assert found.to_dict()["data"]["trained_tokens"] == len(losses)


def test_a_tokenizer_without_template_is_told() -> None:
    found = score(chat.model(), chat.tokenizer(template=None), rows_of(chat.pairs(2)), batch_size=2, **SETTINGS)
    assert "no chat template" in found.notes[0]


def test_errors_pass_through() -> None:
    model, tokenizer = chat.model(), chat.tokenizer()
    with pytest.raises(ConfigError, match="causal_lm"):
        score(model, tokenizer, rows_of(chat.pairs(1)), batch_size=1, **{**SETTINGS, "task": "nothing"})
    with pytest.raises(DataError, match="example 1"):
        score(model, tokenizer, rows_of([{"x": "y"}]), batch_size=1, **SETTINGS)

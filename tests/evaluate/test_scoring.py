from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests import chat
from veneer.core.errors import DataError
from veneer.data.sources import in_memory
from veneer.evaluate.scoring import Score, score
from veneer.evaluate.subject import Subject
from veneer.tasks import task as tasks
from veneer.train.config import RunConfig


def scored(model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch_size: int = 2) -> Score:
    task = tasks.get("causal_lm")
    subject = Subject(model, tokenizer, task, "causal_lm", "model", None)
    settings = RunConfig(max_length=64, batch_size=batch_size, output="-", cache="off")
    return score(subject, subject.asked([in_memory(rows)], None), settings)


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
    found = scored(model, tokenizer, chat.pairs(7), batch_size)
    loss = sum(losses) / len(losses)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.metrics["token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found.data.trained_tokens == len(losses)
    assert found.to_dict()["data"]["trained_tokens"] == len(losses)


def test_a_tokenizer_without_template_is_told() -> None:
    found = scored(chat.model(), chat.tokenizer(template=None), chat.pairs(2))
    assert "no chat template" in found.notes[0]


def test_errors_pass_through() -> None:
    model, tokenizer = chat.model(), chat.tokenizer()
    with pytest.raises(DataError, match="example 1"):
        scored(model, tokenizer, [{"x": "y"}])

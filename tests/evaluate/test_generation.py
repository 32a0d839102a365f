"""Generation: the template, the mask, the ends, and the same answer from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from veneer import LoraConfig, UsageError, get_peft_model
from veneer.evaluate.generation import answer, answers, encode
from veneer.tasks.sampling import Sampling
from veneer.tasks.writing import stop_ids

PROMPT = "what colour is the stone"


@pytest.fixture
def tokenizer() -> Any:
    return chat.tokenizer()


@pytest.fixture
def model() -> Any:
    return chat.model()


def test_the_template_is_used(tokenizer: Any) -> None:
    given = encode(tokenizer, PROMPT, system="be so")
    text = tokenizer.decode(given["input_ids"][0])
    assert text == f"<|start|>system\nbe so<|end|>\n<|start|>user\n{PROMPT}<|end|>\n<|start|>assistant\n"
    assert torch.equal(given["attention_mask"], torch.ones_like(given["input_ids"]))


def test_without_a_template_the_prompt_is_as_given() -> None:
    plain = chat.tokenizer(template=None)
    given = encode(plain, PROMPT)
    assert plain.decode(given["input_ids"][0]) == PROMPT
    assert given["attention_mask"].shape == given["input_ids"].shape
    with pytest.raises(UsageError, match="no chat template"):
        encode(plain, PROMPT, system="be so")


def test_an_empty_prompt(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        encode(tokenizer, " \n")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_bad_sampling(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=setting):
        Sampling(**{setting: value})


def test_ends_come_from_model_and_tokenizer(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == [1, 7, 9]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [1]


def test_greedy_is_the_likeliest_token_each_time(model: Any, tokenizer: Any) -> None:
    given = encode(tokenizer, PROMPT)
    ids = given["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    found = answer(model, tokenizer, given, Sampling(max_new_tokens=6))
    expected = ids[0, given["input_ids"].shape[1] :].tolist()
    ended = expected.index(1) + 1 if 1 in expected else 6
    assert found.tokens == ended
    assert found.text == tokenizer.decode(expected[:ended], skip_special_tokens=True)


def test_it_stops_at_an_end(model: Any, tokenizer: Any) -> None:
    given = encode(tokenizer, PROMPT)
    first = int(model(given["input_ids"]).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    found = answer(model, tokenizer, given, Sampling(max_new_tokens=6))
    assert (found.tokens, found.stopped) == (1, True)


def test_the_seed_decides_the_draws(model: Any, tokenizer: Any) -> None:
    given = encode(tokenizer, PROMPT)
    drawn = [
        answer(model, tokenizer, given, Sampling(max_new_tokens=8, temperature=1.5, top_p=0.9, seed=seed)).text
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_stream_is_the_answer(model: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    # Random bytes make broken characters, which must only come out once they are whole or at the end.
    sampling = Sampling(max_new_tokens=24, temperature=3.0)
    found = answer(model, tokenizer, encode(tokenizer, PROMPT), sampling, on_text=pieces.append)
    assert len(pieces) > 1
    assert len("".join(pieces)) == len(found.text)


def test_a_prompt_longer_than_the_context(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="context holds 128"):
        answer(model, tokenizer, encode(tokenizer, "stone " * 200), Sampling())


def test_answers_of_several_adapters(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    given, sampling = encode(tokenizer, PROMPT), Sampling(max_new_tokens=8)
    base = answer(model, tokenizer, given, sampling).text
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, lora_alpha=64), "one")
    adapted.add_adapter("two", LoraConfig(r=4))
    found = answers(adapted, tokenizer, given, sampling, ["one", "two"])
    assert [one.adapter for one in found] == ["base", "one", "two"]
    # "two" is fresh, so it changes nothing.
    assert found[0].text == found[2].text == base
    assert found[1].text != base

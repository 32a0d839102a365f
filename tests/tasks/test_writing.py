from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chat
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError
from veneer.data.sources import rows_of
from veneer.engine.accelerate import accelerate
from veneer.tasks import task as tasks
from veneer.tasks.sampling import Sampling
from veneer.tasks.writing import write
from veneer.train.config import RunConfig
from veneer.train.loop import train

TASK: Any = tasks.get("causal_lm")
GREEDY = Sampling(max_new_tokens=6)
SKIPPED = ["--on-bad-row", "skip"]


def asked(rows: list[dict[str, Any]], tokenizer: Any = None) -> Any:
    return TASK.ask(rows_of(rows), tokenizer or chat.tokenizer(), max_length=100)


def alone(model: Any, ids: list[int]) -> list[int]:
    """What transformers writes to one prompt without padding."""
    with torch.no_grad():
        out = model.eval().generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=1)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 12])
@pytest.mark.parametrize("accelerated", [False, True])
def test_prompts_that_share_a_batch_are_answered_as_alone(batch_size: int, accelerated: bool) -> None:
    model, tokenizer = chat.model(), chat.tokenizer()
    examples = asked(chat.pairs(12))
    expected = [alone(model, example.input_ids) for example in examples]
    with accelerate(model, kernels=accelerated, packing=accelerated):
        found = write(TASK, model, examples, tokenizer, GREEDY, batch_size=batch_size)
    assert [one.text for one in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert [one.tokens for one in found] == list(map(len, expected))


def test_mode_and_random_state_are_put_back() -> None:
    model = chat.model().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = Sampling(max_new_tokens=4, temperature=1.0, seed=3)
    one = write(TASK, model, asked(chat.pairs(2)), chat.tokenizer(), drawn, batch_size=2)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert write(TASK, model, asked(chat.pairs(2)), chat.tokenizer(), drawn, batch_size=2) == one


def test_an_answer_ends_at_its_end_token() -> None:
    model, tokenizer = chat.model(), chat.tokenizer()
    ids = alone(model, asked(chat.pairs(1))[0].input_ids)
    model.generation_config.eos_token_id = ids[2]
    (found,) = write(TASK, model, asked(chat.pairs(1)), tokenizer, GREEDY, batch_size=1)
    first = ids.index(ids[2])
    assert (found.tokens, found.stopped) == (first + 1, True)
    assert found.text == tokenizer.decode(ids[: first + 1], skip_special_tokens=True)


def test_what_is_asked_is_what_stands_before_the_answer() -> None:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    more = [*turns, {"role": "user", "content": "three"}]
    rows = [
        {"prompt": "red", "completion": "green"},
        {"prompt": "red"},
        {"instruction": "say", "input": "blue"},
        {"messages": [*more, {"role": "assistant", "content": "four"}]},
        {"messages": more},
        {"text": "red green"},
    ]
    found, tokenizer = asked(rows), chat.tokenizer()
    assert [one.more["reference"] for one in found] == ["green", None, None, "four", None, None]
    assert [one.more["asked"] for one in found] == ["red", "red", "say\n\nblue", "three", "three", "red green"]
    assert found[0].input_ids == found[1].input_ids
    assert found[3].input_ids == found[4].input_ids
    text = (
        "<|start|>user\none<|end|>\n<|start|>assistant\ntwo<|end|>\n<|start|>user\nthree<|end|>\n<|start|>assistant\n"
    )
    assert tokenizer.decode(found[3].input_ids) == text
    assert tokenizer.decode(found[5].input_ids) == "red green"


def test_exact_match_forgives_space_around() -> None:
    assert TASK.judge(["a ", "b", "C"], [["a"], ["b"], ["c"]]) == {"exact_match": pytest.approx(2 / 3)}


def test_predictions_and_their_figures_come_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(chat.saved(tmp_path / "model"))
    data = chat.written(tmp_path / "test.jsonl", chat.pairs(3))
    bare = chat.written(tmp_path / "bare.jsonl", [{"prompt": row["prompt"]} for row in chat.pairs(3)])
    said = []
    for file in (data, bare):
        capsys.readouterr()
        assert main(["predict", "--model", model, "--data", str(file), "--max-new-tokens", "6", "--json"]) == 0
        said.append([one["text"] for one in json.loads(capsys.readouterr().out)["predictions"]])
    assert said[0] == said[1]
    loaded = chat.model()
    texts = [
        chat.tokenizer().decode(alone(loaded, e.input_ids), skip_special_tokens=True) for e in asked(chat.pairs(3))
    ]
    assert said[0] == texts
    flags = ["--answers", "2", "--max-new-tokens", "6", "--json"]
    assert main(["eval", "--model", model, "--data", str(data), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact_match"] == 0
    assert [one["text"] for one in found["answers"]] == texts[:2]
    assert main(["eval", "--model", model, "--data", str(bare), *flags]) == 1
    assert "bare.jsonl:1" in capsys.readouterr().err


def test_rows_that_ask_the_same_thing_are_one_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(chat.saved(tmp_path / "model"))
    flags = ["--max-new-tokens", "6", "--json"]
    prompts = [row["prompt"] for row in chat.pairs(3)]
    texts = [
        chat.tokenizer().decode(alone(chat.model(), e.input_ids), skip_special_tokens=True)
        for e in asked(chat.pairs(3))
    ]
    rows = [
        {"prompt": prompts[0], "completion": "red"},
        {"prompt": prompts[0], "completion": texts[0]},
        {"prompt": prompts[1], "completion": "red"},
        {"prompt": prompts[2], "completion": texts[2]},
        {"prompt": "say"},
        {"prompt": prompts[1], "completion": "blue"},
    ]
    data = chat.written(tmp_path / "test.jsonl", rows)
    report = {}
    for count in ("2", "3"):
        capsys.readouterr()
        assert main(["eval", "--model", model, "--data", str(data), "--answers", count, *flags, *SKIPPED]) == 0
        report[count] = json.loads(capsys.readouterr().out)
    assert report["2"]["exact_match"] == 0.5
    assert report["2"]["answers"] == [
        {"origin": "test.jsonl:1", "text": texts[0], "expected": ["red", texts[0]]},
        {"origin": "test.jsonl:3", "text": texts[1], "expected": ["red", "blue"]},
    ]
    assert report["3"]["exact_match"] == pytest.approx(2 / 3)
    assert [one["text"] for one in report["3"]["answers"]] == texts
    # A fourth question would be the one without an answer.
    assert main(["eval", "--model", model, "--data", str(data), "--answers", "4", *flags, *SKIPPED]) == 1
    assert "test.jsonl:5 has no answer to compare with" in capsys.readouterr().err


def run_config(place: Path, name: str, **more: Any) -> RunConfig:
    fields = {"model": str(place / "model"), "data": str(place / "train.jsonl"), "output": str(place / name)}
    return RunConfig(**{**fields, "learning_rate": 5e-3, "batch_size": 4, "max_steps": 6, "eval_every": 3, **more})


def test_samples_are_logged_beside_those_before_and_change_no_weight(tmp_path: Path) -> None:
    chat.saved(tmp_path / "model")
    chat.written(tmp_path / "train.jsonl", chat.pairs(12))
    shown: list[Any] = []
    with_samples = train(
        run_config(tmp_path, "with", samples=2, sample_tokens=5, eval_fraction=0.25), draw=shown.append
    )
    without = train(run_config(tmp_path, "without", eval_fraction=0.25))
    for one, other in zip(with_samples.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(shown) == 3
    events = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    samples = [event for event in events if event["event"] == "samples"]
    assert [event["step"] for event in samples] == [0, 3, 6]
    first = samples[0]["samples"]
    assert [one["before"] for one in first] == [one["now"] for one in first]
    assert [one["before"] for one in samples[2]["samples"]] == [one["now"] for one in first]
    example = TASK.ask(rows_of([{"prompt": first[0]["asked"]}]), chat.tokenizer(), max_length=99)[0]
    ids = alone(chat.model(), example.input_ids)[:5]
    assert first[0]["now"] == chat.tokenizer().decode(ids, skip_special_tokens=True)
    assert "exact_match" in next(event for event in events if event["event"] == "eval")


def test_the_best_may_be_told_by_answers_where_there_are_some(tmp_path: Path) -> None:
    chat.saved(tmp_path / "model")
    chat.written(tmp_path / "train.jsonl", chat.pairs(12))
    result = train(run_config(tmp_path, "run", samples=2, best_metric="exact_match"))
    assert result.record.best_step == 3
    with pytest.raises(ConfigError, match="best_metric is 'exact_match'; task causal_lm has loss"):
        train(run_config(tmp_path, "other", best_metric="exact_match"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval_fraction": 0.0}, "nothing is held out"),
        ({"sample_tokens": 127}, "lower sample_tokens"),
    ],
)
def test_samples_that_cannot_be_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    chat.saved(tmp_path / "model")
    chat.written(tmp_path / "train.jsonl", chat.pairs(12))
    with pytest.raises(ConfigError, match=message):
        train(run_config(tmp_path, "run", samples=2, **more))


def test_a_prompt_that_is_too_long_is_named() -> None:
    with pytest.raises(DataError, match="example 1 asks with"):
        TASK.ask(rows_of(chat.pairs(1)), chat.tokenizer(), max_length=3)

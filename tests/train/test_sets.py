"""Where a run's data comes from: parts and mixtures, what is held out, the cache, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests import chat
from veneer.core.errors import ConfigError, DataError
from veneer.data.sources import sources
from veneer.tasks import task as tasks
from veneer.train.batches import batches_from
from veneer.train.config import RunConfig
from veneer.train.loop import RunResult, train
from veneer.train.resume import resumed
from veneer.train.sets import Reader

FAST = {"batch_size": 4, "learning_rate": 5e-3, "target_modules": "all-linear", "schedule": "constant", "warmup": 0}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    chat.written(tmp_path / "a.jsonl", chat.pairs(18))
    chat.written(tmp_path / "b.jsonl", [{"text": f"{word} river cloud"} for word in ("one", "two")])
    return tmp_path


def run(place: Path, name: str, **settings: Any) -> RunResult:
    ready = settings.pop("on_ready", None)
    values = {"output": str(place / name), "cache": str(place / "cache"), "eval_fraction": 0, **FAST, **settings}
    return train(RunConfig(**values), model=chat.model(), tokenizer=chat.tokenizer(), on_ready=ready)


def logged(folder: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in result.model.named_parameters() if p.requires_grad}


def mixed(place: Path, a: float = 1, b: float = 1) -> dict[str, float]:
    return {str(place / "a.jsonl"): a, str(place / "b.jsonl"): b}


def test_a_mixture_in_a_run(place: Path) -> None:
    plans: list[Any] = []
    result = run(place, "run", data=mixed(place), epochs=2, on_ready=plans.append)
    (plan,) = plans
    assert result.record.steps == 10
    batches = batches_from(plan, 0, process=0, device=torch.device("cpu"))
    for _ in range(2):
        origins = Counter(o for _ in range(5) for batch in next(batches) for o in batch["origins"])
        assert sum(count for origin, count in origins.items() if origin.startswith("a.jsonl")) == 10
        assert {origins["b.jsonl:1"], origins["b.jsonl:2"]} == {5}
    (start,) = logged(place / "run", "start")
    parts = start["parts"]
    assert [(p["name"], p["weight"], p["examples"], p["taken"]) for p in parts] == [
        (str(place / "a.jsonl"), 1.0, 18, 10),
        (str(place / "b.jsonl"), 1.0, 2, 10),
    ]
    assert len({part["fingerprint"] for part in parts}) == 2
    assert json.loads((place / "run/result.json").read_text())["parts"] == parts
    assert any("Each pass has 20 examples: 10 of" in note and "(5.00 times its 2)" in note for note in start["notes"])
    assert RunConfig.read(place / "run/run.yaml").data == mixed(place)
    assert "a.jsonl (weight 1), b.jsonl (weight 1), 20 examples" in (place / "run/last/README.md").read_text()


def test_the_same_mixture_by_names_with_weights(place: Path) -> None:
    by_map = run(place, "map", data=mixed(place, 3, 1))
    by_name = run(place, "name", data=[f"{place}/a.jsonl=3", f"{place}/b.jsonl=1"])
    assert [e["loss"] for e in logged(place / "map")] == [e["loss"] for e in logged(place / "name")]
    assert all(torch.equal(a, b) for a, b in zip(weights(by_map).values(), weights(by_name).values(), strict=True))


def test_a_mixture_holds_out_of_each_part(place: Path) -> None:
    record = run(place, "run", data=mixed(place), eval_fraction=0.2, max_steps=1).record
    assert record.held_out_data["rows"] == 4 + 1
    assert [part.rows for part in record.parts] == [14, 1]


def test_a_mixture_goes_on_where_it_was_stopped(place: Path) -> None:
    whole = run(place, "whole", data=mixed(place), epochs=2, save_every=1, keep=20)
    run(place, "part", data=mixed(place), epochs=2, save_every=1, keep=20)
    folder = place / "part"
    for path in folder.glob("checkpoints/step-*"):
        if int(path.name[5:]) > 7:
            shutil.rmtree(path)
    (folder / "result.json").unlink()
    again = train(resumed(folder), model=chat.model(), tokenizer=chat.tokenizer(), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))
    (folder / "result.json").unlink()
    with pytest.raises(ConfigError, match="the mixture is not what it was"):
        train(resumed(folder, data=mixed(place, 2)), model=chat.model(), tokenizer=chat.tokenizer(), resume=True)


def test_a_part_with_nothing_to_train_cannot_be_weighed(place: Path) -> None:
    chat.written(place / "b.jsonl", [{"messages": [{"role": "user", "content": "u"}]}])
    with pytest.raises(DataError, match=r"b\.jsonl has no token to train, so it cannot have the weight 1"):
        run(place, "run", data=mixed(place))


def test_a_file_in_two_parts_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"data names '.*a\.jsonl' twice; expected each file in one part"):
        run(place, "run", data={str(place / "a.jsonl"): 1, str(place / "*.jsonl"): 1})
    assert not (place / "run").exists()


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_weights_are_checked_with_the_config(value: float) -> None:
    with pytest.raises(ConfigError, match="data"):
        RunConfig(output="x", data={"a": value})


@pytest.mark.parametrize("how", [{}, {"workers": 2}, {"cache": "off"}, {"cache": "off", "workers": 1}])
def test_a_run_is_the_same_from_the_cache_and_for_any_workers(place: Path, how: dict[str, Any]) -> None:
    first = run(place, "first", data=str(place / "a.jsonl"), eval_fraction=0.2, epochs=2)
    again = run(place, "again", data=str(place / "a.jsonl"), eval_fraction=0.2, epochs=2, **how)
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    assert [e["loss"] for e in logged(place / "first")] == [e["loss"] for e in logged(place / "again")]
    assert [e["loss"] for e in logged(place / "first", "eval")] == [e["loss"] for e in logged(place / "again", "eval")]
    starts = [logged(place / name, "start")[0] for name in ("first", "again")]
    assert starts[0]["fingerprint"] == starts[1]["fingerprint"]
    reused = [any("is taken from the cache" in note for note in start["notes"]) for start in starts]
    assert reused == [False, how.get("cache") != "off"]


def test_other_shares_and_seeds_use_the_same_entry(place: Path) -> None:
    run(place, "first", data=str(place / "a.jsonl"), max_steps=1)
    run(place, "again", data=str(place / "a.jsonl"), max_steps=1, eval_fraction=0.3, seed=5, batch_size=2)
    entries = [path for path in (place / "cache").iterdir() if path.is_dir()]
    assert len(entries) == 1


def test_bad_rows_of_every_kind_are_left_out_and_counted(place: Path) -> None:
    with (place / "a.jsonl").open("a") as stream:
        stream.write('{\n{"prompt": "a", "completion": ""}\n{"txet": "a"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:19 is not a line of JSON"):
        run(place, "run", data=str(place / "a.jsonl"))
    record = run(place, "run", data=str(place / "a.jsonl"), on_bad_row="skip", max_steps=1).record
    assert record.data["rows"] == 18
    (note,) = [note for note in record.notes if "bad rows" in note]
    assert note.startswith("3 bad rows are left out: ")
    assert "a.jsonl:20 has an empty completion" in note


def test_tokens_that_the_model_does_not_have_are_named(place: Path) -> None:
    tokenizer = chat.tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    config = RunConfig(output=str(place / "run"), cache="off", **FAST)
    rows = [*chat.pairs(3), {"text": "river <|new|>"}]
    with pytest.raises(
        DataError, match=r"example 4 has the token \d+ \('<\|new\|>'\), outside of the model's vocabulary"
    ):
        train(config, model=chat.model(vocabulary=len(tokenizer) - 1), tokenizer=tokenizer, train_rows=rows)
    assert not (place / "run").exists()


def test_what_is_longer_than_the_model_takes_is_named(place: Path) -> None:
    chat.written(place / "long.jsonl", [{"text": "red"}, {"text": "stone " * 300}])
    record = run(place, "run", data=str(place / "long.jsonl"), max_steps=1, batch_size=1).record
    assert record.data["longest"] == 128
    assert any("takes 128 tokens at most" in note and "long.jsonl:2 is the first" in note for note in record.notes)
    with pytest.raises(DataError, match=r"long\.jsonl:2 has 303 tokens, and at most 128 are taken"):
        run(place, "other", data=str(place / "long.jsonl"), truncate="fail")


def test_what_is_trained_on_and_held_out_is_said(place: Path) -> None:
    data = str(place / "a.jsonl")
    notes = run(place, "run", data=data, eval_data=data, max_steps=1).record.notes
    assert any(note.startswith(f"{data} is trained on and held out: ") for note in notes)
    config = RunConfig(output=str(place / "other"), cache="off", max_steps=1, **FAST)
    rows = chat.pairs(4)
    given = {"model": chat.model(), "tokenizer": chat.tokenizer(), "train_rows": rows, "eval_rows": rows}
    assert not any("is trained on and held out" in note for note in train(config, **given).record.notes)


@pytest.mark.parametrize("terminal", [True, False])
def test_rows_are_counted_on_a_terminal_while_they_are_encoded(place: Path, terminal: bool) -> None:
    screen = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    config = RunConfig(output="-", cache="off")
    reader = Reader(config, tasks.get("causal_lm"), {}, chat.tokenizer(), None, screen)
    assert len(reader.read(sources(place / "a.jsonl")).store.rows) == 18
    assert ("encoding ..." in screen.file.getvalue()) == terminal


def test_where_encoded_data_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(cache: str) -> Path | None:
        reader = Reader(RunConfig(output="-", cache=cache), tasks.get("causal_lm"), {}, chat.tokenizer(), None)
        return reader.read(sources(place / "a.jsonl")).kept

    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "xdg"))
    monkeypatch.setenv("HOME", str(place))
    assert kept("auto").parent == place / "xdg" / "veneer" / "data"
    assert kept("~/mine").parent == place / "mine"
    assert kept("off") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kept("auto").parent == place / ".cache" / "veneer" / "data"

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert kept("auto") is None
    with pytest.raises(ConfigError, match="cache is ''"):
        RunConfig(output="-", cache="")

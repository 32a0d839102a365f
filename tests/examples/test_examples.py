"""Each example runs as it stands, two steps on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tests import chat
from veneer import PeftModel
from veneer.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["transformers_trainer", "trl_sft"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_trains_and_saves_an_adapter(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = chat.model()
    model.save_pretrained(tmp_path / "model")
    chat.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, chat.pairs(20))))
    loss = example.main(str(tmp_path / "model"), str(tmp_path / "rows.jsonl"), str(tmp_path / "adapter"), steps=2)
    assert math.isfinite(loss)
    PeftModel.from_pretrained(chat.model(), tmp_path / "adapter")


def test_a_task_of_ones_own_trains_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder, run = EXAMPLES / "other_task.py", tmp_path / "waves", tmp_path / "run"
    spec = importlib.util.spec_from_file_location("other_task", code)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(folder))
    base, test = folder / "base.safetensors", folder / "test.jsonl"
    given = ["--task", "other", "--code", str(code), "--model", str(base), "--data", str(folder / "train.jsonl")]
    more = ["--eval-data", str(test), "--output", str(run), "--max-steps", "60", "--learning-rate", "0.01"]
    assert main(["train", *given, *more]) == 0
    assert "--code ... --data ..." in capsys.readouterr().out
    record = json.loads((run / "result.json").read_text())
    before, after = record["held_out_before"], record["held_out_after"]
    assert after["mean_absolute_error"] < before["mean_absolute_error"]
    said = tmp_path / "said.jsonl"
    loaded = ["--code", str(code), "--model", str(base), "--adapter", str(run)]
    assert main(["predict", *loaded, "--data", str(test), "--output", str(said)]) == 0
    model = PeftModel.from_pretrained(example.load_model(base), run / "best")
    rows = [example.encode(json.loads(line), None) for line in test.read_text().splitlines()]
    expected = example.predict(model, example.collate(rows, None))
    found = [json.loads(line)["next"] for line in said.read_text().splitlines()]
    assert found == pytest.approx([one["next"] for one in expected], rel=1e-5, abs=1e-6)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"transformers_trainer", "trl_sft", "other_task"}

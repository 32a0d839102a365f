"""Each example runs as it stands, two steps on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tests import chat
from veneer import PeftModel

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


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"transformers_trainer", "trl_sft"}

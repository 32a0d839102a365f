from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tests import chat
from veneer.cli.main import main
from veneer.core.records import RunRecord
from veneer.report.overview import write_overview


def test_a_run_folder_tells_what_it_is(tmp_path: Path) -> None:
    model, data = str(chat.saved(tmp_path / "model")), str(chat.written(tmp_path / "train.jsonl", chat.pairs(12)))
    flags = ["--max-steps", "4", "--samples", "1", "--sample-tokens", "4", "--output", str(tmp_path / "run")]
    assert main(["train", "--model", model, "--data", data, *flags]) == 0
    text = (tmp_path / "run" / "README.md").read_text()
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert text.startswith("# model, causal_lm by lora\n")
    assert "![Loss over the steps](loss.png)" in text
    before, after = record["held_out_before"], record["held_out_after"]
    assert f"| perplexity | {before['perplexity']:.4f} | {after['perplexity']:.4f} |" in text
    assert "| asked | what colour is the" in text
    for name in ("best", "last", "run.yaml", "result.json", "log.jsonl", "loss.png", "checkpoints"):
        assert f"- `{name}`:" in text
    assert "confusion.png" not in text


def test_text_stays_in_its_cell(tmp_path: Path) -> None:
    sample = {"origin": "a:1", "asked": 'one | "two"\nthree <b>', "reference": None, "before": "", "now": "x"}
    events = [{"event": "start"}, {"event": "samples", "step": 0, "samples": [sample]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    values = {field.name: None for field in dataclasses.fields(RunRecord)}
    counts = {"examples": 3, "tokens": 40}
    numbers = {"steps": 1, "planned_steps": 2, "trainable": 1, "total": 10, "seconds": 60.0, "tokens_per_second": 9.0}
    more = {
        "task": "causal_lm",
        "method": "full",
        "data": counts,
        "peak_memory": 10**9,
        "notes": (),
        "interrupted": True,
    }
    record = RunRecord(**{**values, **numbers, **more})  # type: ignore[arg-type]
    text = write_overview(tmp_path, record).read_text()
    assert '| asked | one \\| "two"\\nthree &lt;b> |' in text
    assert "| steps | 1 of 2, interrupted |" in text
    assert "expected" not in text

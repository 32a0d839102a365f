"""Runs read from their folders: states, figures, what differs, and the picture of all curves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from veneer.core.errors import UsageError
from veneer.report.overlay import MOST, overlay
from veneer.report.runs import compare_table, differing, duration, find_runs, read_events, runs_table

HERE = {"host": platform.node(), "process": os.getpid()}


def written(folder: Path, *ending: dict, start: dict | None = None, shift: float = 0.0, **config: object) -> Path:
    """A run folder of 20 steps, measured before, in the middle and at the end."""
    folder.mkdir(parents=True)
    fields = {"method": "lora", "family": "lora", "r": 8, "output": str(folder), **config}
    (folder / "run.yaml").write_text(json.dumps(fields))
    head = {
        "event": "start",
        "seconds": 0.0,
        "model": "/models/small",
        "steps": 20,
        **(HERE if start is None else start),
    }
    events = [head, {"event": "eval", "seconds": 1.0, "step": 0, "loss": 0.5}]
    for step in range(1, 21):
        figures = {"loss": 3 - step / 10 + shift, "tokens_per_second": 50.0 * step, "memory": 10**9}
        events.append({"event": "step", "seconds": 1.0 + step, "step": step, **figures})
        if step in (10, 20):
            events.append({"event": "eval", "seconds": 1.5 + step, "step": step, "loss": 2 + step / 20 + shift})
    text = "".join(json.dumps(event) + "\n" for event in [*events, *ending])
    (folder / "log.jsonl").write_text(text)
    return folder


END = {"event": "end", "seconds": 90.0, "step": 20, "interrupted": False}


def shown(table: Table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_figures_of_a_run(tmp_path: Path) -> None:
    (run,) = find_runs([written(tmp_path / "a", END)])
    assert (run.name, run.state, run.model, run.method) == ("a", "finished", "small", "lora r=8")
    assert (run.steps, run.planned_steps, run.tokens_per_second, run.peak_memory) == (20, 20, 1000.0, 10**9)
    # The measurement before the first step counts for no best; the training loss is that of the last two lines.
    assert (run.best_loss, run.train_loss, run.seconds) == (2.5, pytest.approx(1.05), 90.0)
    text = shown(runs_table([run]))
    assert "Runs of small" in text
    assert "a finished lora r=8 20 2.5000 1,000 1.0 GB 1m30s" in " ".join(text.split())


def test_models_that_differ_have_a_column(tmp_path: Path) -> None:
    written(tmp_path / "a", END)
    written(tmp_path / "b", END, start={**HERE, "model": "large"})
    text = " ".join(shown(runs_table(find_runs([tmp_path]))).split())
    assert "a finished lora r=8 small 20" in text
    assert "b finished lora r=8 large 20" in text


def test_states(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name, ending, start in (
        ("finished", [END], None),
        ("interrupted", [{**END, "interrupted": True}], None),
        ("failed", [{"event": "error", "seconds": 2.0, "step": 3, "message": "x"}], None),
        ("running", [], None),
        ("killed", [], {**HERE, "process": gone.pid}),
        ("unfinished", [], {**HERE, "host": "elsewhere"}),
    ):
        written(tmp_path / name, *ending, start=start)
    # A run that goes on in the same log is running again.
    written(tmp_path / "resumed", {**END, "interrupted": True}, {"event": "start", "seconds": 0, **HERE})
    states = {run.name: run.state for run in find_runs([tmp_path])}
    assert states == {**{name: name for name in states if name != "resumed"}, "resumed": "running"}
    assert len(states) == 7


def test_a_resumed_run_is_where_it_was_resumed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    again = {**HERE, "event": "resume", "seconds": 3.0, "step": 3}
    written(tmp_path / "run", again, start={**HERE, "process": gone.pid})
    assert find_runs([tmp_path])[0].state == "running"


def test_other_methods_are_named(tmp_path: Path) -> None:
    written(tmp_path / "a", END, method="full")
    written(tmp_path / "b", END, quantize="nf4", family="vera")
    written(tmp_path / "c", END, use_dora=True)
    assert [run.method for run in find_runs([tmp_path])] == ["full", "vera r=8, nf4", "dora r=8"]


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    for place in ("one/seed", "two/seed", "two/other"):
        written(tmp_path / place, END)
    assert [run.name for run in find_runs([tmp_path])] == ["one/seed", "two/other", "two/seed"]
    assert len(find_runs([tmp_path, tmp_path / "one"])) == 3


def test_what_differs(tmp_path: Path) -> None:
    written(tmp_path / "a", END, target_modules=["q_proj", "v_proj"], seed=1)
    written(tmp_path / "b", END, r=16, shift=-0.25, seed=1)
    runs = find_runs([tmp_path])
    assert differing(runs) == ["r", "target_modules"]
    lines = [line.split() for line in shown(compare_table(runs)).splitlines()]
    assert ["r", "8", "16"] in lines
    assert ["target_modules", "q_proj,", "v_proj", "-"] in lines
    assert ["best", "loss", "2.5000", "2.2500"] in lines


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path / "a")
    whole = read_events(folder)
    with (folder / "log.jsonl").open("a") as stream:
        stream.write('{"event": "st')
    assert read_events(folder) == whole
    with (folder / "log.jsonl").open("a") as stream:
        stream.write("\n{}\n")
    with pytest.raises(UsageError, match=rf"log\.jsonl:{len(whole) + 1} is not a line of JSON"):
        read_events(folder)


def test_the_curves_of_runs_in_one_picture(tmp_path: Path) -> None:
    runs = find_runs([written(tmp_path / "a", END), written(tmp_path / "b", END, r=16, shift=-0.5)])
    overlay(runs, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1650, 750)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x3B, 0x6F, 0xB6), (0xD1, 0x62, 0x2B)} <= colours


def test_a_picture_that_would_say_nothing_is_refused(tmp_path: Path) -> None:
    (run,) = find_runs([written(tmp_path / "a", END)])
    with pytest.raises(UsageError, match="cannot be told apart"):
        overlay([run] * (MOST + 1), tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"ends in \.png"):
        overlay([run], tmp_path / "x.jpg")
    (tmp_path / "a" / "log.jsonl").write_text(json.dumps({"event": "start", "seconds": 0.0}) + "\n")
    with pytest.raises(UsageError, match="nothing to draw"):
        overlay(find_runs([tmp_path]), tmp_path / "x.png")
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    ("place", "message"), [("none", "There is no folder"), ("", "There is no run in"), ("bad", "not readable as YAML")]
)
def test_nothing_to_read(tmp_path: Path, place: str, message: str) -> None:
    if place == "bad":
        (written(tmp_path / "bad") / "run.yaml").write_text("a: [")
    with pytest.raises(UsageError, match=message):
        find_runs([tmp_path / place])


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0s"), (59.7, "1m00s"), (3599, "59m59s"), (3725, "1h02m")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said

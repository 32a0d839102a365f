from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from veneer.core.errors import DiskError
from veneer.train.interrupt import Interrupt
from veneer.train.log import ProgressBar, RunLog, peak_memory


def test_each_event_is_one_line_of_plain_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("step", loss=math.nan, figures={"perplexity": math.inf, "units": 3})
    log.write("end")
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["event"], first["loss"], first["figures"]) == ("step", None, {"perplexity": None, "units": 3})
    assert second["seconds"] >= first["seconds"] >= 0


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"Could not write .*log\.jsonl"):
        RunLog(tmp_path / "gone").write("step")


def test_the_bars_show_run_and_pass() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=80), 20, 8) as bar:
        bar.note("held out: [loss] 1")
        bar.update(18, loss=1.5, learning_rate=2e-4, tokens_per_second=1234.0, memory=2_500_000_000)
    shown = stream.getvalue()
    assert "held out: [loss] 1" in shown
    assert "step 18 of 20: loss 1.500  lr 2.0e-04  1,234 tok/s  2.5 GB" in shown
    run, part = shown.splitlines()[-2:]
    assert "18/20 loss 1.500  lr 2.0e-04" in run
    # The last pass is not whole: 20 steps are 8, 8 and 4.
    assert part.startswith("pass 3 of 3")
    assert "2/4" in part
    assert "1,234 tok/s  2.5 GB" in part
    assert max(map(len, shown.splitlines())) <= 80


def test_the_second_bar_shows_a_measurement_and_then_the_pass_again() -> None:
    bar = ProgressBar(Console(file=io.StringIO(), width=80), 20, 8)
    bar.update(8, loss=1.5, learning_rate=2e-4, tokens_per_second=1.0, memory=1)
    part = bar.bar.tasks[1]
    assert (part.description, part.completed, part.total) == ("pass 1 of 3", 8, 8)
    bar.measuring(0.4)
    assert (part.description, part.completed, part.total) == ("held out, %", 40, 100)
    bar.training()
    assert (part.description, part.completed, part.total) == ("pass 1 of 3", 8, 8)


def test_no_console_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(None, 3) as bar:
        bar.note("x")
        bar.update(1, loss=1, learning_rate=1, tokens_per_second=1, memory=1)
    assert capsys.readouterr() == ("", "")


def test_peak_memory_is_in_bytes() -> None:
    assert 10_000_000 < peak_memory() < 1_000_000_000_000


def test_the_first_ctrl_c_asks_and_the_second_interrupts() -> None:
    told = []
    with Interrupt(lambda: told.append("asked")) as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), 2)
        assert interrupt.asked
        assert told == ["asked"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), 2)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), 2)

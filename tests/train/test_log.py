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


def test_the_bar_shows_loss_speed_and_memory() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=120), 3) as bar:
        bar.note("held out: [loss] 1")
        bar.update(2, loss=1.5, tokens_per_second=1234.0, memory=2_500_000_000)
    shown = stream.getvalue()
    assert "held out: [loss] 1" in shown
    assert "2/3" in shown
    assert "loss 1.500  1,234 tok/s  2.5 GB" in shown


def test_no_console_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(None, 3) as bar:
        bar.note("x")
        bar.update(1, loss=1, tokens_per_second=1, memory=1)
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

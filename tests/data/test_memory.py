"""Data of any size takes the same memory: measured in a process of its own, since only that knows its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import chat

ROOT = Path(__file__).resolve().parent.parent.parent

READ = """
import functools, json, sys
from pathlib import Path
from tests import chat
from veneer.data.batching import Batching
from veneer.data.cache import prepared
from veneer.data.encoder import Encoder
from veneer.data.sources import sources
from veneer.tasks.causal_lm import Task

small, large, cache = sys.argv[1:]
encode = functools.partial(Task().encode, processor=chat.tokenizer(), max_length=4000, train_on="completion")


def megabytes(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1024


def one_pass(path):
    encoder = Encoder(encode, encode.keywords["processor"], {})
    found = prepared(sources(path), encoder, {}, cache=Path(cache))
    examples = found.store.set_of()
    tokens = 0
    for step in Batching(examples.lengths, 8, packed=True, max_tokens=1024).steps(0):
        for micro in step[0]:
            tokens += sum(len(examples.examples[index].input_ids) for index in micro.indices)
    return tokens, found.reused


one_pass(small)
before = megabytes("VmRSS")
# The peak is counted anew from here.
open("/proc/self/clear_refs", "w").write("5")
tokens, reused = one_pass(large)
print(json.dumps({"growth": megabytes("VmHWM") - before, "tokens": tokens, "reused": reused}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts the peak anew")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Text, values that are not used and tokens: of 60 MB, a small part is in memory at a time."""
    rows = chat.pairs(10)

    def written(name: str, count: int) -> Path:
        with (tmp_path / name).open("w") as stream:
            for at in range(count):
                row = rows[at % 10]
                long = {"completion": row["completion"] + " stone" * 1000, "unused": "x" * 100_000}
                stream.write(json.dumps({**row, **long}) + "\n")
        return tmp_path / name

    small, large = written("small.jsonl", 30), written("large.jsonl", 600)
    assert large.stat().st_size > 60e6
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    for reused in (False, True):
        command = [sys.executable, "-c", READ, str(small), str(large), str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["tokens"] > 0.6e6
        assert found["reused"] == reused
        # The text alone would take 60 MB, lists of the tokens and labels 10. The arrays that are mapped have 5.
        assert found["growth"] < 15

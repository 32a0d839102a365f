"""A task of your own, for ``--task other``: a forecaster in plain torch, trained on sine waves, adapted to square ones.

    python examples/other_task.py ./waves
    veneer train --task other --code examples/other_task.py --model ./waves/base.safetensors \
        --data ./waves/train.jsonl --eval-data ./waves/test.jsonl --output ./run --epochs 5 --learning-rate 0.01
    veneer predict --code examples/other_task.py --adapter ./run --data ./waves/test.jsonl

The first line makes the base and the data. What ``veneer`` calls are the functions below ``Forecaster``: three have to
be there (load_model, collate, loss), the others may be.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

PAST = 24


class Forecaster(nn.Module):
    """The next value of a series from the last ones, (B, PAST) to (B,)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(PAST, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, past):
        hidden = F.gelu(self.second(F.gelu(self.first(past))))
        return self.last(hidden).squeeze(-1)


TARGET_MODULES = ["first", "second", "last"]
METRICS = {"mean_absolute_error": "min"}


def load_model(name):
    """``name`` is what --model says; here it is the file with the weights."""
    model = Forecaster()
    model.load_state_dict(load_file(name))
    return model


def encode(row, processor):
    """A row of the data as an example; one that is only to be predicted needs no "next"."""
    past = row["series"][-PAST:]
    if len(past) < PAST:
        raise ValueError(f"a series of {len(past)} values; expected at least {PAST}")
    return {"past": past, "next": row.get("next")}


def collate(examples, processor):
    """Some examples as tensors."""
    batch = {"past": torch.tensor([example["past"] for example in examples])}
    if all(example["next"] is not None for example in examples):
        batch["next"] = torch.tensor([example["next"] for example in examples])
    return batch


def loss(model, batch):
    """One loss for each example: ``veneer`` adds them up and divides by how many there are."""
    return (model(batch["past"]) - batch["next"]) ** 2


def predict(model, batch):
    """What is said of each example."""
    return [{"next": value} for value in model(batch["past"]).tolist()]


def metrics(predictions, examples):
    """Of a whole held-out set."""
    errors = [abs(said["next"] - example["next"]) for said, example in zip(predictions, examples, strict=True)]
    return {"mean_absolute_error": sum(errors) / len(errors)}


def series(count, *, square, seed):
    """Waves of random phase and length, each with the value that comes next."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for phase, length in torch.rand(count, 2, generator=generator).tolist():
        angles = [2 * math.pi * (phase + at / (8 + 8 * length)) for at in range(PAST + 1)]
        values = [math.copysign(1.0, math.sin(angle)) if square else math.sin(angle) for angle in angles]
        rows.append({"series": values[:-1], "next": values[-1]})
    return rows


def main(folder, steps=300):
    """Train the base on sine waves; write it, and square waves to adapt it to."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Forecaster()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = collate([encode(row, None) for row in series(256, square=False, seed=0)], None)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()
    save_file(model.state_dict(), place / "base.safetensors")
    for name, count, seed in (("train", 512, 1), ("test", 128, 2)):
        rows = series(count, square=True, seed=seed)
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

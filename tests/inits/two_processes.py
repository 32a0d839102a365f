"""One of two processes that gather evidence together; run by test_distributed.py.

python two_processes.py RANK FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import veneer
from tests import models
from tests.inits.with_peft import TARGETS, factors

BATCHES = [models.batch("llama", seed=seed, rows=1) for seed in range(4)]


def started(init: str, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What an adapter holds after it has started from these batches."""
    model = models.make("llama")
    fields: dict[str, Any] = {"r": 4, "target_modules": TARGETS["llama"], "init_lora_weights": init}
    config = veneer.LoraConfig(**fields)
    if init == "corda":
        veneer.preprocess_corda(model, config, lambda: [model(**x) for x in batches])
    elif init == "lora_ga":
        steps = [lambda x=x: model(**x, labels=x["input_ids"]).loss.backward() for x in batches]
        veneer.preprocess_loraga(model, config, lambda: [step() for step in steps])
    else:
        joined = [{"input_ids": torch.cat([x["input_ids"] for x in batches])}]
        return veneer.get_eva_state_dict(model, joined, config)
    return {name: p.detach() for name, p in factors(veneer.get_peft_model(model, config)).items()}


def main() -> None:
    """Gather with the other process, and save what came of it."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    # Not as many for both: three batches here, one there.
    mine = BATCHES[:3] if rank == 0 else BATCHES[3:]
    for init in ("corda", "lora_ga", "eva"):
        save_file({k: v.contiguous() for k, v in started(init, mine).items()}, folder / f"{init}-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What it takes to begin: ``get_peft_model`` on a 7B-shaped model, and the import, against PEFT.

The 7B-shaped LLaMA is on the meta device, so only the work around the tensors is timed. There veneer leaves
the adapter on the meta device too, while PEFT fills it on the CPU first; the same injection into a model with
real weights, of SmolLM2-135M's shape, shows what that difference is worth. Every number is the first call in a
fresh interpreter, as a user's is. ``import veneer`` alone loads nothing heavy, so the import of a name that needs
torch is measured beside it.

    python benchmarks/bench_inject.py --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from measure import RESULTS, SMOLLM2, Results, fresh, ratio_of_medians

SHAPES = {
    "7B meta": ("meta", {}),
    "SmolLM2-135M cpu": (
        "cpu",
        SMOLLM2,
    ),
}
TINY = {
    "tiny meta": (
        "meta",
        {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    )
}
TARGETS: dict[str, list[str] | str] = {"all-linear": "all-linear", "q,v": ["q_proj", "v_proj"]}

INJECT = """
import time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from NAME import LoraConfig, get_peft_model

with torch.device({device!r}):
    model = LlamaForCausalLM(LlamaConfig(**{shape!r}))
config = LoraConfig(r=8, target_modules={targets!r}, task_type="CAUSAL_LM")
start = time.perf_counter()
get_peft_model(model, config)
print(time.perf_counter() - start)
"""

IMPORT = """
import time
start = time.perf_counter()
NAME
print(time.perf_counter() - start)
"""

USE = "from {} import get_peft_model"


def main() -> None:
    """Measure injection and import, and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="fresh interpreters for each peer and case")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    options = parser.parse_args()
    if options.results is None and not options.tiny:
        options.results = RESULTS
    results = Results("inject", options.results)
    for shape, (device, values) in (TINY if options.tiny else SHAPES).items():
        for name, targets in list(TARGETS.items())[: 1 if options.tiny else None]:
            code = INJECT.format(device=device, shape=values, targets=targets)
            seconds = fresh(code, ["veneer", "peft"], options.repeats, warm=not options.tiny)
            compare(results, f"{shape} {name}", "get_peft_model", seconds["veneer"], seconds["peft"])
    ours, theirs = ["import veneer", USE.format("veneer")], ["import torch", USE.format("peft")]
    seconds = fresh(IMPORT, [*ours, *theirs], options.repeats, warm=not options.tiny)
    for statement in ours:
        for peer in theirs:
            compare(results, f"{statement} / {peer}", "import", seconds[statement], seconds[peer])
    results.save()


def compare(results: Results, case: str, metric: str, ours: list[float], theirs: list[float]) -> None:
    """Keep the medians of two peers and the ratio of their neighbouring runs."""
    results.add(case, metric, statistics.median(ours), statistics.median(theirs), ratio_of_medians(ours, theirs), "s")


if __name__ == "__main__":
    main()

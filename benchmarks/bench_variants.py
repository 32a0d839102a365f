"""A training step with DoRA, AdaLoRA, VeRA and LoRA-FA, beside LoRA's and beside PEFT's.

SmolLM2-135M's shape in float32 on random tokens. Each peer is a process of its own; they step in turn, so that a
slower hour of the machine hits all of them. What is expected: DoRA's step takes at most 1.3 times LoRA's, and no
variant takes longer or more memory than PEFT's.

python benchmarks/bench_variants.py                       # all variants
python benchmarks/bench_variants.py --variant dora        # one of them, beside LoRA
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import RESULTS, SMOLLM2, Results, Worker, in_turn, peak_memory, ratio_of_medians, reset_peak_memory

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16}),
    "dora": ("LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 12, "target_r": 8, "total_step": 1000, "deltaT": 10}),
    "vera": ("VeraConfig", {"r": 256}),
    "lorafa": ("LoraConfig", {"r": 8, "lora_alpha": 16}),
}
"""Each variant's config and its fields, the same for both libraries."""
LIBRARIES = ("veneer", "peft")


def main() -> None:
    """Measure every variant that was asked for."""
    options = arguments()
    if options.worker:
        serve(options)
        return
    results = Results("variants", options.results)
    for variant in options.variant:
        measure(variant, options, results)
    results.save()


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="what to measure; all by default")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each peer")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.variant = options.variant or list(VARIANTS)
    if options.results is None and not options.tiny:
        options.results = RESULTS
    return options


def measure(variant: str, options: argparse.Namespace, results: Results) -> None:
    """Step a variant of both libraries in turn with veneer's LoRA."""
    passed = ["--batch", str(options.batch), "--length", str(options.length), *(["--tiny"] if options.tiny else [])]
    peers = {f"{library} {variant}": (library, variant) for library in LIBRARIES}
    peers["veneer lora"] = ("veneer", "lora")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(Path(__file__), "--variant", kind, *passed, "--worker", library))
            for name, (library, kind) in peers.items()
        }
        warm = in_turn(workers, "step", 2)
        answers = in_turn(workers, "step", options.repeats)
        peaks = {name: float(worker.ask("peak")["megabytes"]) for name, worker in workers.items()}
    # All start as the base model, so the same loss says that the work was the same; AdaLoRA's has a penalty on top,
    # which depends on what was drawn.
    first = {name: warm[name][0]["loss"] for name in (workers if variant != "adalora" else list(workers)[:2])}
    if max(first.values()) - min(first.values()) > (1e-2 if variant == "adalora" else 1e-4):
        raise SystemExit(f"the peers do not compute the same: their first losses are {first}")
    seconds = {name: [answer["seconds"] for answer in answers[name]] for name in workers}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ours = f"veneer {variant}"
    label = f"{variant} all linear fp32 {options.batch}x{options.length}{' tiny' if options.tiny else ''}"
    others = [f"peft {variant}"] + ([] if variant == "lora" else ["veneer lora"])
    for other in others:
        case = f"{label}, beside {other}"
        ratio = ratio_of_medians(seconds[ours], seconds[other])
        results.add(case, "step time", medians[ours], medians[other], ratio, "s")
        results.add(case, "peak memory", peaks[ours], peaks[other], peaks[ours] / peaks[other], "MB")


def serve(options: argparse.Namespace) -> None:
    """Be one peer: answer "step" with a step's time and loss, "peak" with the memory it took."""
    step = prepare(options)
    reset_peak_memory()
    for line in sys.stdin:
        if line.strip() == "step":
            start = time.perf_counter()
            loss = step()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "loss": loss}
        else:
            answer = {"megabytes": peak_memory()}
        print(json.dumps(answer), flush=True)


def prepare(options: argparse.Namespace) -> Callable[[], float]:
    """The peer's training step: forward, backward, optimiser, and the budget where there is one."""
    import importlib

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    library, variant = importlib.import_module(options.worker), options.variant[0]
    name, fields = VARIANTS[variant]
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(**(TINY if options.tiny else SMOLLM2), tie_word_embeddings=True, use_cache=False)
    )
    ids = torch.randint(0, base.config.vocab_size, (options.batch, options.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    config = getattr(library, name)(**fields, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = library.get_peft_model(base, config).train()
    if variant == "lorafa":
        made = importlib.import_module(f"{options.worker}.optimizers").create_lorafa_optimizer
        optimizer = made(model=model, r=8, lora_alpha=16, lr=1e-4)
    else:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    count = 0

    def step() -> float:
        nonlocal count
        count += 1
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if variant == "adalora":
            model.base_model.update_and_allocate(count)
        optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main()

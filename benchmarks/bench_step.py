"""One training step (forward, backward, AdamW) of a LoRA on SmolLM2-135M's shape: veneer against PEFT.

All peers get the same model, seed, batch and optimiser and take steps in turn, each in its own process. Times
are compared step by step, memory as the most that each process held during its steps. A batch is prompts with
completions, of which only the completions are trained. veneer is measured twice: "drop-in" with the model's own
loss, as PEFT is, and "trained" with the loss that ``veneer train`` uses, which asks the head for the positions it
needs. The fraction of the matrix-product limit counts four products of every weight with every token: the
forward, and the gradient that flows back through frozen weights.

    python benchmarks/bench_step.py --case q,v --repeats 5
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

from measure import (
    RESULTS,
    SMOLLM2,
    Results,
    Worker,
    gemm_limit,
    in_turn,
    peak_memory,
    ratio_of_medians,
    reset_peak_memory,
)

CASES: dict[str, list[str] | str] = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
PEERS = {"drop-in": "veneer", "trained": "veneer", "peft": "peft"}
"""From worker to the library that it uses."""
TINY = {**SMOLLM2, "num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96, "vocab_size": 128}


def main() -> None:
    """Measure every case and save the numbers."""
    options = parse()
    if options.worker:
        serve(options)
        return
    results = Results("step", options.results)
    limit = gemm_limit(0.2 if options.tiny else 2.0)
    results.add("float32 2048x2048x2048", "GEMM limit", limit, None, None, "GFLOP/s")
    for case in options.case:
        measure(case, options, limit, results)
    results.save()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="what to adapt; all cases by default")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each peer")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--completion", type=float, default=0.5, help="the share of each sequence that is trained")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.case = options.case or list(CASES)
    if options.results is None and not options.tiny:
        options.results = RESULTS
    return options


def measure(case: str, options: argparse.Namespace, limit: float, results: Results) -> None:
    """Run one case with all peers in turn."""
    passed = ["--case", case, "--batch", str(options.batch), "--length", str(options.length)]
    passed += ["--completion", str(options.completion)] + (["--tiny"] if options.tiny else [])
    with ExitStack() as stack:
        peers = {name: stack.enter_context(Worker(Path(__file__), *passed, "--worker", name)) for name in PEERS}
        warm = in_turn(peers, "step", 2)
        answers = in_turn(peers, "step", options.repeats)
        peaks = {name: worker.ask("peak") for name, worker in peers.items()}
    # The adapters start as identities, so the first loss must be the same or the work was not.
    first = {name: warm[name][0]["loss"] for name in peers}
    if max(first.values()) - min(first.values()) > 1e-4:
        raise SystemExit(f"the peers do not compute the same: their first losses are {first}")
    seconds = {name: [answer["seconds"] for answer in answers[name]] for name in peers}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {name: float(peak["megabytes"]) for name, peak in peaks.items()}
    work = 4 * peaks["peft"]["weights"] * options.batch * options.length / 1e9
    reached = {name: work / median / limit for name, median in medians.items()}
    for name in ("drop-in", "trained"):
        label = f"{case} r=8 fp32 {options.batch}x{options.length} {name}{' tiny' if options.tiny else ''}"
        results.add(
            label, "step time", medians[name], medians["peft"], ratio_of_medians(seconds[name], seconds["peft"]), "s"
        )
        results.add(label, "peak memory", memory[name], memory["peft"], memory[name] / memory["peft"], "MB")
        results.add(label, "of GEMM limit", reached[name], reached["peft"], reached[name] / reached["peft"], "")


def serve(options: argparse.Namespace) -> None:
    """Be one peer: answer "step" with a step's time and loss, "peak" with the memory it took."""
    step, weights = prepare(options)
    reset_peak_memory()
    for line in sys.stdin:
        if line.strip() == "step":
            start = time.perf_counter()
            loss = step()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "loss": loss}
        else:
            answer = {"megabytes": peak_memory(), "weights": weights}
        print(json.dumps(answer), flush=True)


def prepare(options: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """The peer's training step, and how many weights are applied to every token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if PEERS[options.worker] == "veneer":
        from veneer import LoraConfig, get_peft_model
    else:
        from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if options.tiny else SMOLLM2), tie_word_embeddings=True, use_cache=False)
    base = LlamaForCausalLM(config)
    weights = sum(module.weight.numel() for module in base.modules() if isinstance(module, torch.nn.Linear))
    ids = torch.randint(0, config.vocab_size, (options.batch, options.length))
    labels = ids.clone()
    labels[:, : round(options.length * (1 - options.completion))] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=CASES[options.case[0]], task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter).train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)

    def own_loss() -> torch.Tensor:
        return model(**batch).loss

    def train_loss() -> torch.Tensor:
        from veneer.tasks.causal_lm import Task

        result = Task().loss(model, batch)
        return result.total / result.tally.units

    loss_of = train_loss if options.worker == "trained" else own_loss

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, weights


if __name__ == "__main__":
    main()

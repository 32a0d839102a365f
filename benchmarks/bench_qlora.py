"""QLoRA on SmolLM2-135M: what an NF4 base costs in loss, what it saves in memory, and three ways to merge.

Three peers train the same adapter (r=8, all linear layers) on the same batches, in turn, each in its own process:
veneer on the float32 base, veneer on the same base in NF4 with double quantisation, and PEFT on that. The data are
docstrings of Python's standard library, the held-out ones of other modules. Then the NF4 adapter is merged into the
full-precision base, into the dequantised base, and into NF4 again, and the merged models are measured.

    python benchmarks/bench_qlora.py --steps 60 --every 10 --picture qlora.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import RESULTS, SMOLLM2, Results, Worker, peak_memory, ratio_of_medians, reset_peak_memory

PEERS = ("fp32", "nf4", "peft-nf4")
TINY = {**SMOLLM2, "num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96, "vocab_size": 128}
DATA = "batches.safetensors"


def main() -> None:
    """Train all peers in turn, measure, and save the numbers."""
    options = parse()
    if options.worker:
        serve(options)
        return
    results = Results("qlora", options.results)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        options.model = prepare_data(options)
        curves = measure(options, results)
    if options.picture:
        draw(curves, options.picture)
    results.save()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each peer")
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements on held-out data")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--held-out", type=int, default=8, help="batches of held-out data")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--picture", type=Path, help="where to draw the loss curves (PNG)")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.results is None and not options.tiny:
        options.results = RESULTS
    return options


def prepare_data(options: argparse.Namespace) -> str:
    """Write the batches into the folder; returns the model's folder, made there for the tiny shape."""
    import torch
    from safetensors.torch import save_file

    shape = (-1, options.batch, options.length)
    needed = {"train": options.steps, "held_out": options.held_out}
    if options.tiny:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).save_pretrained(options.folder / "model")
        # A sequence that can be learned: counting.
        tokens = {name: torch.arange(n * options.batch * options.length) % 128 for name, n in needed.items()}
        model = str(options.folder / "model")
    else:
        from transformers import AutoTokenizer

        from veneer.data.docstrings import docstring_pairs
        from veneer.tasks.smollm import smollm

        model = smollm(print)
        tokenizer = AutoTokenizer.from_pretrained(model)
        pairs = dict(zip(needed, docstring_pairs(320, 160), strict=True))
        texts = {
            name: "".join(f"{p.signature}\n{p.summary}<|im_end|>\n" for p in found) for name, found in pairs.items()
        }
        tokens = {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in texts.items()}
    size = options.batch * options.length
    # What is trained on may come round again; what is measured on must be there.
    batches = {name: found[: min(needed[name], len(found) // size) * size] for name, found in tokens.items()}
    if not len(batches["train"]) or len(batches["held_out"]) < options.held_out * size:
        raise SystemExit(f"there are {len(batches['held_out']) // size} held-out batches of this size")
    save_file({name: found.view(*shape).contiguous() for name, found in batches.items()}, options.folder / DATA)
    return model


def measure(options: argparse.Namespace, results: Results) -> dict[str, list[tuple[int, float]]]:
    """Train the peers in turn; returns the held-out loss of each by step."""
    passed = [f"--{name}={getattr(options, name)}" for name in ("folder", "model", "rate")]
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in PEERS}
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    with ExitStack() as stack:
        peers = {name: stack.enter_context(Worker(Path(__file__), *passed, "--worker", name)) for name in PEERS}
        for step in range(options.steps + 1):
            names = PEERS if step % 2 else tuple(reversed(PEERS))
            if step % options.every == 0 or step == options.steps:
                for name in names:
                    curves[name].append((step, peers[name].ask("held_out")["loss"]))
            for name in names if step < options.steps else ():
                seconds[name].append(peers[name].ask(f"step {step}")["seconds"])
        peaks = {name: peers[name].ask("peak") for name in PEERS}
        merges = peers["nf4"].ask("merges")
    shape = f"{options.batch}x{options.length}{' tiny' if options.tiny else ''}"
    report(results, f"all-linear r=8 {shape}", curves, seconds, peaks, merges)
    return curves


def report(
    results: Results,
    case: str,
    curves: dict[str, list[tuple[int, float]]],
    seconds: dict[str, list[float]],
    peaks: dict[str, Any],
    merges: dict[str, Any],
) -> None:
    """Keep every number: NF4 beside float32 for the loss and the bytes, beside PEFT for time and memory."""
    for (step, ours), (_, full) in zip(curves["nf4"], curves["fp32"], strict=True):
        results.add(f"{case} NF4, peer: veneer fp32, step {step}", "held-out loss", ours, full, ours / full, "")
    ours, full = peaks["nf4"]["bytes"], peaks["fp32"]["bytes"]
    results.add(f"{case} NF4, peer: veneer fp32", "weights", ours, full, ours / full, "B/weight")
    for name in ("fp32", "peft-nf4"):
        label = f"{case} NF4, peer: {name if name.startswith('peft') else f'veneer {name}'}"
        # The first steps of a process fill its caches.
        times = {peer: seconds[peer][2:] or seconds[peer] for peer in ("nf4", name)}
        results.add(
            label,
            "step time",
            statistics.median(times["nf4"]),
            statistics.median(times[name]),
            ratio_of_medians(times["nf4"], times[name]),
            "s",
        )
        memory = {peer: float(peaks[peer]["megabytes"]) for peer in ("nf4", name)}
        results.add(label, "peak memory", memory["nf4"], memory[name], memory["nf4"] / memory[name], "MB")
    for into, found in merges.items():
        label = f"{case} merged {into}, peer: unmerged on NF4"
        results.add(label, "held-out loss", found["loss"], found["unmerged"], found["loss"] / found["unmerged"], "")
        results.add(label, "logits moved", found["largest"], found["scale"], found["largest"] / found["scale"], "")


def serve(options: argparse.Namespace) -> None:
    """Be one peer: answer "step N", "held_out", "peak", and for NF4 "merges"."""
    peer = Peer(options)
    reset_peak_memory()
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        answer = getattr(peer, command)(*map(int, argument.split()))
        print(json.dumps(answer), flush=True)


class Peer:
    """A model in training."""

    def __init__(self, options: argparse.Namespace) -> None:
        import logging

        import torch
        from safetensors.torch import load_file

        from veneer.tasks.loading import load_model

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if options.worker == "peft-nf4":
            from peft import LoraConfig, get_peft_model
        else:
            from veneer import LoraConfig, get_peft_model
        self.options = options
        self.data = load_file(options.folder / DATA)
        # By the same loader, which keeps bitsandbytes from rewriting the weights: PEFT's model is trained right too.
        base: Any = load_model(options.model, quantize=None if options.worker == "fp32" else "nf4")
        base.config.use_cache = False
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        self.model: Any = get_peft_model(base, config).train()
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=options.rate, fused=True)

    def step(self, number: int) -> dict[str, float]:
        """One step on one batch."""
        ids = self.data["train"][number % len(self.data["train"])]
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}

    def held_out(self) -> dict[str, float]:
        """The mean loss on the held-out batches."""
        return {"loss": held_out_loss(self.model, self.data)}

    def peak(self) -> dict[str, float]:
        """The most memory held, and how many bytes the base's adapted layers take for a weight."""
        from veneer.adapters.kbit import bytes_per_weight, quantised_slots

        megabytes = peak_memory()
        quantised = self.options.worker == "nf4"
        size = bytes_per_weight(quantised_slots(self.model.base_model.index)) if quantised else 4.0
        return {"megabytes": megabytes, "bytes": size}

    def merges(self) -> dict[str, dict[str, float]]:
        """Each merged model beside the unmerged one that was trained."""
        from veneer import PeftModel
        from veneer.tasks.loading import load_model

        expected, unmerged = logits(self.model, self.data), held_out_loss(self.model, self.data)
        saved = self.options.folder / "adapter"
        self.model.save_pretrained(saved)
        found = {}
        for into in ("full", "dequantised", "requantised"):
            base = load_model(self.options.model, quantize=None if into == "full" else "nf4")
            adapted = PeftModel.from_pretrained(base, saved)
            merged = adapted.merge_and_unload(into=None if into == "full" else into)
            moved = (logits(merged, self.data) - expected).abs().max().item()
            loss = held_out_loss(merged, self.data)
            found[into] = {"loss": loss, "unmerged": unmerged, "largest": moved, "scale": expected.abs().max().item()}
        return found


def held_out_loss(model: Any, data: dict[str, Any]) -> float:
    """The mean loss a token on the held-out batches."""
    import torch

    with torch.no_grad():
        return statistics.mean(model(input_ids=ids, labels=ids).loss.item() for ids in data["held_out"])


def logits(model: Any, data: dict[str, Any]) -> Any:
    """The outputs on the first held-out batch."""
    import torch

    with torch.no_grad():
        return model(input_ids=data["held_out"][0]).logits


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """The held-out loss of each peer over the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = {"fp32": "LoRA, float32 base", "nf4": "QLoRA, NF4 base", "peft-nf4": "QLoRA with PEFT"}
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in zip(PEERS, ("-", "-", "--"), strict=True):
        axes.plot(*zip(*curves[name], strict=True), style, label=names[name])
    axes.set(xlabel="step", ylabel="held-out loss")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

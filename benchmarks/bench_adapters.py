"""Many adapters on one model, against PEFT: loading, switching, swapping, and one batch whose rows use eight of them.

A LLaMA of SmolLM2-135M's width with 24 layers, all 168 linear layers adapted at r=8. Both peers load the same files
from disk in turn, each in its own process, and PEFT stops at its 41st. A mixed batch has a row for each of eight
adapters; it is compared with the same batch through one active adapter, as whole prompts and as single tokens (the
step of generation, where little but overhead is left), and with PEFT's ``adapter_names``. The outputs of both peers
must agree. Swapping puts another file's values into an adapter's place.

    python benchmarks/bench_adapters.py --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import RESULTS, SMOLLM2, Results, Worker, in_turn, ratio_of_medians

SHAPE = {**SMOLLM2, "num_hidden_layers": 24}
TINY = {**SMOLLM2, "num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96, "vocab_size": 128}
ROWS = 8
PEERS = ("veneer", "peft")


def main() -> None:
    """Measure and save the numbers."""
    options = parse()
    if options.worker:
        serve(options)
        return
    results = Results("adapters", options.results)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        make_adapters(Path(folder), options.tiny)
        passed = ["--folder", folder, "--length", str(options.length), *(["--tiny"] if options.tiny else [])]
        peers = {name: stack.enter_context(Worker(Path(__file__), *passed, "--worker", name)) for name in PEERS}
        measure_loading(peers, options, results)
        measure_rows(peers, options, results)
        for command, metric in (("switch", "set_adapter"), ("swap", "hotswap")):
            seconds = in_seconds(peers, command, options.repeats)
            add(results, f"{options.many} / {options.peft} adapters loaded", metric, *seconds.values())
    results.save()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each peer")
    parser.add_argument("--many", type=int, default=100, help="adapters that veneer loads")
    parser.add_argument("--peft", type=int, default=41, help="adapters that PEFT loads")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row of the mixed batch")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker and not ROWS < options.peft <= options.many:
        parser.error(f"--peft must be more than the {ROWS} adapters of the mixed batch, and --many no less")
    if options.results is None and not options.tiny:
        options.results = RESULTS
    return options


def measure_loading(peers: dict[str, Worker], options: argparse.Namespace, results: Results) -> None:
    """How long the second, the middle and the last adapter take to load."""
    together = in_seconds(peers, "load", options.peft)
    ours, theirs = together["veneer"], together["peft"]
    ours += in_seconds({"veneer": peers["veneer"]}, "load", options.many - options.peft)["veneer"]
    # The first one is made room for: it wraps the layers, and is not compared.
    second, last = ours[1:6], ours[-5:]
    add(results, "adapters 2 to 6", "load", second, theirs[1:6])
    add(
        results,
        f"adapters {options.peft - 4} to {options.peft}",
        "load",
        ours[options.peft - 5 : options.peft],
        theirs[-5:],
    )
    add(results, f"adapters {options.many - 4} to {options.many} / 2 to 6 of veneer", "load", last, second)


def measure_rows(peers: dict[str, Worker], options: argparse.Namespace, results: Results) -> None:
    """A batch of eight rows through eight adapters, beside the same batch through one."""
    for tokens in (options.length, 1):
        first = {name: worker.ask(f"rows {tokens}")["output"] for name, worker in peers.items()}
        if abs(first["veneer"] - first["peft"]) > 1e-3:
            raise SystemExit(f"the peers do not compute the same: {first}")
        in_turn(peers, f"one {tokens}", 1)
        mixed: dict[str, list[float]] = {name: [] for name in peers}
        one: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(options.repeats):
            for name, seconds in in_seconds(peers, f"rows {tokens}", 1).items():
                mixed[name] += seconds
            for name, seconds in in_seconds(peers, f"one {tokens}", 1).items():
                one[name] += seconds
        label = f"{ROWS} rows x {tokens} tokens, {ROWS} adapters"
        add(results, f"{label} / one adapter of veneer", "forward", mixed["veneer"], one["veneer"])
        add(results, f"{label} / adapter_names of peft", "forward", mixed["veneer"], mixed["peft"])
        add(
            results, f"{ROWS} rows x {tokens} tokens, one adapter / that of peft", "forward", one["veneer"], one["peft"]
        )


def in_seconds(peers: dict[str, Worker], command: str, repeats: int) -> dict[str, list[float]]:
    """The seconds that each peer says a command took."""
    answers = in_turn(peers, command, repeats)
    return {name: [answer["seconds"] for answer in given] for name, given in answers.items()}


def add(results: Results, case: str, metric: str, ours: list[float], theirs: list[float]) -> None:
    """Keep the medians and their ratio."""
    results.add(case, metric, statistics.median(ours), statistics.median(theirs), ratio_of_medians(ours, theirs), "s")


def make_model(tiny: bool) -> Any:
    """The base model, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(TINY if tiny else SHAPE), tie_word_embeddings=True, use_cache=False)).eval()


def make_adapters(folder: Path, tiny: bool) -> None:
    """Eight adapters on disk, each with values of its own."""
    from veneer import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(tiny), config, "a0")
    for number in range(1, ROWS):
        model.add_adapter(f"a{number}", config)
    model.save_pretrained(folder)


def serve(options: argparse.Namespace) -> None:
    """Be one peer: answer each command with the seconds that it took."""
    warnings.simplefilter("ignore")
    commands = prepare(options)
    for line in sys.stdin:
        command, *arguments = line.split()
        run = commands[command](*map(int, arguments))
        start = time.perf_counter()
        output = run()
        print(json.dumps({"seconds": time.perf_counter() - start, "output": output}), flush=True)


def prepare(options: argparse.Namespace) -> dict[str, Callable[..., Callable[[], float]]]:
    """From command to what gets ready for a timed run; a run returns a number that both peers must agree on."""
    import torch

    if options.worker == "veneer":
        from veneer import PeftModel, hotswap_adapter
    else:
        from peft import PeftModel
        from peft.utils.hotswap import hotswap_adapter

    base, names = make_model(options.tiny), [f"a{number}" for number in range(ROWS)]
    ids = torch.randint(0, base.config.vocab_size, (ROWS, options.length), generator=torch.Generator().manual_seed(1))
    state: dict[str, Any] = {"loaded": 0}

    def load() -> Callable[[], float]:
        number = state["loaded"]
        state["loaded"] += 1
        source, name = str(options.folder / f"a{number % ROWS}"), f"a{number}"

        def run() -> float:
            if number:
                state["model"].load_adapter(source, name)
            else:
                state["model"] = PeftModel.from_pretrained(base, source, name)
            return 0.0

        return run

    def forward(tokens: int, **named: Any) -> Callable[[], float]:
        def run() -> float:
            with torch.no_grad():
                logits = state["model"](input_ids=ids[:, :tokens], **named).logits
            return float(logits.std())

        return run

    def one(tokens: int) -> Callable[[], float]:
        state["model"].set_adapter("a0")
        return forward(tokens)

    def switch() -> Callable[[], float]:
        state["other"] = "a1" if state.get("other") == "a0" else "a0"
        return lambda: state["model"].set_adapter(state["other"]) or 0.0

    def swap() -> Callable[[], float]:
        state["source"] = "a3" if state.get("source") == "a2" else "a2"
        source = str(options.folder / state["source"])
        return lambda: hotswap_adapter(state["model"], source, "a0") or 0.0

    def rows(tokens: int) -> Callable[[], float]:
        return forward(tokens, adapter_names=names)

    return {"load": load, "rows": rows, "one": one, "switch": switch, "swap": swap}


if __name__ == "__main__":
    main()

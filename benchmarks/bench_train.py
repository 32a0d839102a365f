"""A training run on SmolLM2-135M: ``veneer train``'s own step against PEFT with the HF Trainer, and others.

Cases: "ragged" is chat examples of 24 to 512 tokens, log-normal around 120 (text of the standard library), of which
the second part is trained; "fixed" is rows of one length, half or all of which is trained; "classify" is a sentence
classifier of MiniLM-L6's shape. Peers: PEFT + Trainer, full fine-tuning + Trainer, and TRL's SFTTrainer with packing,
which puts other examples into a step and is compared by tokens a second alone. All but TRL take the same examples in
the same steps from the same adapter weights, so that their loss curves can be laid over each other (--plot).
"accelerated" is the Trainer with one line more, ``veneer.accelerated``, and "accelerated-trl" SFTTrainer with it.
"veneer-bf16" and "peft-bf16" compute in bfloat16 on a bfloat16 base, as veneer does with precision=auto where that is
faster: beside each other, and beside PEFT as it is without being told anything.

Each peer runs in a process of its own and waits between its steps: steps are taken in turn. Memory is the most that
the whole process has held. The limit is what a matrix product reaches in the arithmetic of a peer; the fraction of it
counts what LoRA cannot do without: four products of every weight with every token, and of the head with every trained
token.

    python benchmarks/bench_train.py --case ragged-q,v --steps 6
    python benchmarks/bench_train.py --growth        # 2x, 4x, 8x tokens and layers, as growth.png
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import RESULTS, SMOLLM2, Results, Worker, gemm_limits, in_turn, peak_memory, ratio_of_medians

TINY = {**SMOLLM2, "num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96, "vocab_size": 512}
MINILM = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "vocab_size": 30522,
}
QV, ALL = ["q_proj", "v_proj"], "all-linear"
BOTH = ("veneer", "peft", "veneer-bf16", "peft-bf16")
CASES: dict[str, dict[str, Any]] = {
    "ragged-q,v": {"targets": QV, "peers": (*BOTH, "full")},
    "ragged-trainers": {"targets": QV, "peers": ("accelerated", "peft", "veneer", "accelerated-trl", "trl")},
    "ragged-all": {"targets": ALL, "peers": BOTH},
    "fixed-half-q,v": {"targets": QV, "length": 256, "trained": 0.5, "peers": (*BOTH, "full")},
    "fixed-all-q,v": {"targets": QV, "length": 256, "trained": 1.0, "peers": BOTH},
    "classify": {"targets": ["query", "value"], "peers": ("accelerated", "peft", "full")},
}
RATE = 2e-4
Example = dict[str, Any]
"""``input_ids`` with ``labels``: token labels, or one class."""


def main() -> None:
    """Measure the cases and save the numbers."""
    options = parse()
    if options.worker:
        serve(options)
        return
    results = Results("train", options.results)
    limits = gemm_limits(0.2 if options.tiny else 2.0)
    for name, limit in limits.items():
        results.add(f"{name} 2048x2048x2048", "GEMM limit", limit, None, None, "GFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        if options.growth:
            growth(Path(name), options)
            return
        curves = {case: measure(case, Path(name), options, limits, results) for case in options.case}
    results.save()
    if options.plot:
        draw(curves, options.plot)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES), help="what to measure; all cases by default")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each peer")
    parser.add_argument("--batch", type=int, help="examples in a step; 8, or 4 of one length, by default")
    parser.add_argument("--model", help="the folder of SmolLM2; fetched by default")
    parser.add_argument("--growth", action="store_true", help="measure how cost grows with tokens and layers instead")
    parser.add_argument("--plot", type=Path, help="where to draw the loss curves, or the growth")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds; saves only with --results")
    parser.add_argument("--results", type=Path, help="the CSV file to append to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.case = options.case or list(CASES)
    if options.results is None and not options.tiny:
        options.results = RESULTS
    return options


# What all peers are given


def prepared(case: str, work: Path, options: argparse.Namespace, **shape: int) -> Path:
    """A folder with the model, the examples in the order of their steps, and the adapter to begin from."""
    import torch
    import transformers

    from veneer import LoraConfig, get_peft_model
    from veneer.data.batching import Batching

    torch.manual_seed(0)
    work.mkdir(exist_ok=True)
    stream = None
    if case == "classify":
        sizes = {**MINILM, **({"num_hidden_layers": 1, "hidden_size": 48} if options.tiny else {})}
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=2))
    elif options.tiny or shape:
        config = transformers.LlamaConfig(**{**(TINY if options.tiny else SMOLLM2), **shape}, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        from veneer.tasks.smollm import smollm

        name = options.model or smollm(lambda text: print(text, file=sys.stderr))
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        stream = library_tokens(transformers.AutoTokenizer.from_pretrained(name))
    model.save_pretrained(work / "model")
    setting = CASES[case]
    count = options.batch * (options.steps + 2)
    examples = list(made(case, count, model.config.vocab_size, stream))
    # As veneer orders them: for the classifier, similar lengths together.
    order = Batching([len(e["input_ids"]) for e in examples], options.batch, packed=case != "classify").steps(0)
    chosen = [examples[i] for step in order for micro in step[0] for i in micro.indices]
    random_order = random.Random(1).sample(chosen, len(chosen))
    (work / "examples.json").write_text(json.dumps({"veneer": chosen, "random": random_order}))
    kind = "SEQ_CLS" if case == "classify" else "CAUSAL_LM"
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=setting["targets"], task_type=kind)
    get_peft_model(model, adapter).save_pretrained(work / "adapter")
    return work


def library_tokens(tokenizer: Any) -> list[int]:
    """The docstrings of the standard library as one stream of tokens."""
    from veneer.data.docstrings import docstring_pairs

    pairs, _ = docstring_pairs(1000, 0)
    text = "\n\n".join(f"{pair.signature}\n{pair.summary}" for pair in pairs)
    return list(tokenizer(text, verbose=False)["input_ids"])


def made(case: str, count: int, vocabulary: int, stream: list[int] | None) -> Iterator[Example]:
    """Examples of a case, cut from a stream of tokens, or drawn when there is none."""
    drawn = random.Random(0)
    at = 0
    for _ in range(count):
        length = CASES[case].get("length") or min(512, max(24, int(drawn.lognormvariate(4.8, 0.6))))
        if case == "classify":
            length = min(256, max(8, length // 3))
        ids = stream[at : at + length] if stream else [drawn.randrange(10, vocabulary) for _ in range(length)]
        at += length
        if case == "classify":
            yield {"input_ids": ids, "labels": drawn.randrange(2)}
            continue
        trained = CASES[case].get("trained") or drawn.uniform(0.3, 0.7)
        first = max(1, round(length * (1 - trained)))
        yield {"input_ids": ids, "labels": [-100] * first + ids[first:]}


# The peers


def serve(options: argparse.Namespace) -> None:
    """Be one peer: take a step whenever one is asked for."""
    import torch

    torch.manual_seed(0)
    case = options.case[0]
    answer = Answer()
    if options.worker.startswith("veneer"):
        run_veneer(options, case, answer)
    elif options.worker.endswith("trl"):
        run_trl(options, case, answer)
    else:
        run_trainer(options, case, answer)


class Answer:
    """Waits for a line before each step, and says after it what it took."""

    def __init__(self) -> None:
        self.began = 0.0
        # Trainers print their losses.
        self.out, sys.stdout = sys.stdout, sys.stderr

    def wait(self) -> None:
        """Until a step is asked for; the other questions are answered on the way."""
        for line in sys.stdin:
            if line.strip() == "step":
                self.began = time.perf_counter()
                return
            print(json.dumps({"megabytes": peak_memory()}), file=self.out, flush=True)
        raise SystemExit

    def done(self, loss: float, tokens: int) -> None:
        """Say what the step took."""
        seconds = time.perf_counter() - self.began
        print(json.dumps({"seconds": seconds, "loss": loss, "tokens": tokens}), file=self.out, flush=True)


def loaded(options: argparse.Namespace, case: str) -> tuple[Any, list[Example]]:
    """The peer's model, ready to be trained, and its examples."""
    import torch
    import transformers

    auto = transformers.AutoModelForSequenceClassification if case == "classify" else transformers.AutoModelForCausalLM
    narrow = options.worker.endswith("-bf16")
    model = auto.from_pretrained(options.work / "model", dtype=torch.bfloat16 if narrow else torch.float32)
    sets = json.loads((options.work / "examples.json").read_text())
    # PEFT's user draws at random; for language the steps hold the same examples everywhere.
    examples = sets["random" if case == "classify" and options.worker != "accelerated" else "veneer"]
    if options.worker == "full":
        return model, examples
    if options.worker.startswith(("veneer", "accelerated")):
        from veneer import PeftModel
    else:
        from peft import PeftModel
    adapted = PeftModel.from_pretrained(model, options.work / "adapter", is_trainable=True)
    if options.worker.startswith("accelerated"):
        from veneer import accelerated

        return accelerated(adapted), examples
    return adapted, examples


def run_veneer(options: argparse.Namespace, case: str, answer: Answer) -> None:
    """The steps of ``veneer train``."""
    from types import SimpleNamespace

    from accelerate import Accelerator

    from veneer.data.batching import Batching
    from veneer.data.encode import Encoded, EncodedSet
    from veneer.engine import matmul
    from veneer.engine.accelerate import accelerate
    from veneer.engine.allocator import keep_freed_memory
    from veneer.tasks.causal_lm import Task
    from veneer.train.batches import batches_from
    from veneer.train.config import RunConfig
    from veneer.train.learner import Learner
    from veneer.train.methods import Trained
    from veneer.train.prepare import MAX_TOKENS, Plan

    keep_freed_memory()
    model, examples = loaded(options, case)
    encoded = tuple(Encoded(str(at), e["input_ids"], e["labels"]) for at, e in enumerate(examples))
    config = RunConfig(output="none", schedule="constant", warmup=0, learning_rate=RATE, target_modules="all-linear")
    products = matmul.measure(model.config.hidden_size)
    speed = accelerate(model.train(), matmul="torch" if products is None else products.chosen)
    lengths = [len(example.input_ids) for example in encoded]
    batching = Batching(lengths, options.batch, packed=True, max_tokens=MAX_TOKENS["cpu"])
    # The examples lie in the order of their steps already.
    object.__setattr__(batching, "steps", lambda number: batching._packed(list(range(len(lengths)))))
    plan = Plan(
        config=config,
        task=Task(),
        tokenizer=SimpleNamespace(pad_token_id=0),  # type: ignore[arg-type]
        train_set=EncodedSet(encoded, None),  # type: ignore[arg-type]
        held_out=None,
        trained=Trained(model, 0, 0, ()),
        notes=(),
        batching=batching,
        speed=speed,
        steps=options.steps + 2,
    )
    accelerator = Accelerator(mixed_precision="bf16" if options.worker.endswith("-bf16") else "no")
    learner = Learner(plan, accelerator)
    batches = batches_from(plan, 0, process=0, device=accelerator.device)
    with speed:
        for step in range(1, options.steps + 3):
            answer.wait()
            taken = learner.take(next(batches), step)
            answer.done(taken.tally.loss / taken.tally.units, taken.tokens)
        answer.wait()


def arguments(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What all Trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps + 2,
        "learning_rate": 2e-5 if options.worker == "full" else RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": options.worker.endswith("-bf16"),
        "remove_unused_columns": False,
    }


def stepwise(answer: Answer, sizes: Callable[[int], int]) -> Any:
    """A callback that waits before each step, and answers when the Trainer has logged its loss."""
    from transformers import TrainerCallback

    class Stepwise(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            answer.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                answer.done(float(logs["loss"]), sizes(state.global_step))

    return Stepwise()


def run_trainer(options: argparse.Namespace, case: str, answer: Answer) -> None:
    """transformers' Trainer: with PEFT, with the whole model, or with an accelerated model of veneer's."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    model, examples = loaded(options, case)
    flat = options.worker == "accelerated" and case != "classify"

    def collate(rows: list[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        labels = torch.tensor([r["labels"] for r in rows]) if case == "classify" else padded("labels", -100)
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(longest) < sizes[:, None]).long()
        return {"input_ids": padded("input_ids", 0), "labels": labels, "attention_mask": mask}

    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(examples)

    def sizes(step: int) -> int:
        return sum(len(row["input_ids"]) for row in examples[(step - 1) * options.batch : step * options.batch])

    with tempfile.TemporaryDirectory() as folder:
        trainer = Ordered(
            model=model,
            args=TrainingArguments(**arguments(options, folder)),
            train_dataset=examples,
            data_collator=DataCollatorWithFlattening() if flat else collate,
            callbacks=[stepwise(answer, sizes)],
        )
        trainer.train()
    answer.wait()


def run_trl(options: argparse.Namespace, case: str, answer: Answer) -> None:
    """TRL's SFTTrainer with packing: rows of 1,024 tokens, filled with whole examples."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, examples = loaded(options, case)
    rows = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples * 8]
    read: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {**arguments(options, folder), "per_device_train_batch_size": 1}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings, packing=True, max_length=1024),
            train_dataset=Dataset.from_list(rows),
            processing_class=processing(),
            callbacks=[stepwise(answer, lambda step: read[-1])],
        )
        collate = trainer.data_collator

        def counting(features: Any) -> Any:
            batch = collate(features)
            read.append(int(batch["input_ids"].numel()))
            return batch

        trainer.data_collator = counting
        trainer.train()
    answer.wait()


def processing() -> Any:
    """A tokenizer that TRL wants to have; the examples are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<eos>": 0, "<pad>": 1}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


# What comes out


def measure(
    case: str, work: Path, options: argparse.Namespace, limits: dict[str, float], results: Results
) -> dict[str, list[float]]:
    """Run one case with all its peers in turn; their losses by step."""
    options = _sized(options, options.batch or (4 if "length" in CASES[case] else 8))
    place = prepared(case, work / case, options)
    passed = ["--case", case, "--batch", str(options.batch), "--steps", str(options.steps), "--work", str(place)]
    peers = tuple(peer for peer in CASES[case]["peers"] if "bf16" in limits or not peer.endswith("-bf16"))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(Path(__file__), *passed, "--worker", name)) for name in peers}
        warm = in_turn(workers, "step", 2)
        answers = in_turn(workers, "step", options.steps)
        memory = {name: worker.ask("peak")["megabytes"] for name, worker in workers.items()}
    speed = {name: [a["tokens"] / a["seconds"] for a in answers[name]] for name in peers}
    losses = {n: [a["loss"] for a in (*warm[n], *answers[n])] for n in peers if not n.endswith("trl")}
    first = {name: values[0] for name, values in losses.items()}
    if case != "classify" and max(first.values()) - min(first.values()) > (2e-2 if "veneer-bf16" in first else 2e-3):
        raise SystemExit(f"the peers do not compute the same: their first losses are {first}")
    flops = work_per_token(place, case)
    label = f"{case} r=8 batch {options.batch}{' tiny' if options.tiny else ''}"
    for own, peer in pairs(peers):
        ours, theirs = (statistics.median(speed[name]) for name in (own, peer))
        beside = f"{label} {_told(own)} beside {_told(peer)}"
        results.add(beside, "tokens/s", ours, theirs, ratio_of_medians(speed[own], speed[peer]), "tokens/s")
        results.add(beside, "peak memory", memory[own], memory[peer], memory[own] / memory[peer], "MB")
        reached = [
            rate * flops / limits["bf16" if name.endswith("-bf16") else "fp32"]
            for name, rate in ((own, ours), (peer, theirs))
        ]
        results.add(beside, "of GEMM limit", *reached, reached[0] / reached[1], "")
    return losses


def pairs(peers: tuple[str, ...]) -> list[tuple[str, str]]:
    """Who is put beside whom: the same arithmetic beside each other, and bfloat16 beside PEFT as it is by itself."""
    found = [(own, peer) for own in ("veneer", "accelerated") for peer in ("peft", "full")]
    found += [("veneer", "trl"), ("accelerated-trl", "trl"), ("veneer-bf16", "peft"), ("veneer-bf16", "peft-bf16")]
    return [pair for pair in found if set(pair) <= set(peers)]


def _told(peer: str) -> str:
    return peer.replace("-", " ") if peer.endswith("-bf16") else f"{peer} fp32"


def work_per_token(place: Path, case: str) -> float:
    """The GFLOP that a token of a case cannot do without under LoRA."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place / "model")
    D, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    examples = json.loads((place / "examples.json").read_text())["veneer"]
    if case == "classify":
        return 4 * layers * (4 * D * D + 2 * D * F) / 1e9
    kv = D * config.num_key_value_heads // config.num_attention_heads
    body = layers * (2 * D * D + 2 * D * kv + 3 * D * F)
    trained = sum(sum(label != -100 for label in e["labels"]) for e in examples)
    share = trained / sum(len(e["input_ids"]) for e in examples)
    return 4 * (body + share * D * config.vocab_size) / 1e9


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The losses of all peers over each other, a panel a case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    styles = {
        "veneer": ("#d1622b", "-", 4.5),
        "veneer-bf16": ("#f0b48a", "-", 2.2),
        "accelerated": ("#d1622b", ":", 3.0),
        "peft": ("#3b6fb6", "--", 1.8),
        "peft-bf16": ("#7fb0e0", "-.", 1.4),
        "full": ("#8a9099", ":", 1.8),
    }
    for number, (case, losses) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), number)
        for name, (color, line, width) in styles.items():
            if (values := losses.get(name)) is None:
                continue
            axes.plot(range(1, len(values) + 1), values, line, color=color, linewidth=width, label=name)
        axes.set_title(case, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    print(f"  drew {path}")


GROWTH = (1, 2, 4, 8)


def growth(work: Path, options: argparse.Namespace) -> None:
    """Seconds and memory of a step as tokens and layers grow, of veneer and PEFT, as a plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    case = "fixed-half-q,v"
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grids = {"tokens": [(factor, 1) for factor in GROWTH], "layers": [(1, factor) for factor in GROWTH]}
    for column, (what, points) in enumerate(grids.items()):
        seconds: dict[str, list[float]] = {"veneer": [], "peft": []}
        memory: dict[str, list[float]] = {"veneer": [], "peft": []}
        for tokens, layers in points:
            place = prepared(
                case, work / f"{what}-{tokens}-{layers}", _sized(options, tokens), num_hidden_layers=3 * layers
            )
            passed = ["--case", case, "--batch", str(tokens), "--steps", str(options.steps), "--work", str(place)]
            with ExitStack() as stack:
                workers = {n: stack.enter_context(Worker(Path(__file__), *passed, "--worker", n)) for n in seconds}
                in_turn(workers, "step", 1)
                answers = in_turn(workers, "step", options.steps)
                for name, worker in workers.items():
                    seconds[name].append(statistics.median(a["seconds"] for a in answers[name]))
                    memory[name].append(worker.ask("peak")["megabytes"] / 1000)
            print(f"  {what} x{max(tokens, layers)}: seconds {seconds}, GB {memory}", flush=True)
        for row, (unit, values) in enumerate({"seconds a step": seconds, "GB at most": memory}.items()):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            for name, color in (("peft", "#3b6fb6"), ("veneer", "#d1622b")):
                axes.plot(GROWTH, values[name], marker="o", color=color, linewidth=2, label=name)
            axes.set_xlabel(f"{what}, as multiples of " + ("256" if what == "tokens" else "3"))
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
            axes.legend(frameon=False)
    path = options.plot or Path("growth.png")
    figure.savefig(path)
    print(f"  drew {path}")


def _sized(options: argparse.Namespace, batch: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "batch": batch})


if __name__ == "__main__":
    main()

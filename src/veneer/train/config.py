"""What a run is: one validated config, from flags, a YAML file or code. Defaults have their one home here.

The adapter's fields are those of the families' configs (``families``), with their types, defaults and docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from veneer.core.adalora_config import AdaLoraConfig
from veneer.core.config import TunerConfig
from veneer.core.errors import ConfigError, UsageError, listed, nearest
from veneer.core.task_type import TaskType
from veneer.data.encode import Truncation
from veneer.data.mixture import weighed
from veneer.tasks.options import Pooling, Problem, TaskOptions
from veneer.tasks.quantise import Quantisation
from veneer.train.families import FAMILIES, FAMILY, adapter_fields, fields_of

_TASK = TaskOptions()

Method = Literal["lora", "full", "head"]

OptimiserName = Literal[
    "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "adafactor", "sgd"
]
"""transformers' names. A number of bits means bitsandbytes; ``adamw`` is torch's, fused where it can be."""

TRACKERS = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""accelerate's trackers, with the package that each needs."""

LEARNING_RATES: dict[Method, float] = {"lora": 2e-4, "full": 2e-5, "head": 1e-3}
"""The learning rate of each method when none is given."""


def _adapter_definitions() -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    for name, field in adapter_fields().items():
        # An own dict for each config: a default that is shared could be changed through one of them.
        default = {"default_factory": dict} if field.default == {} else {"default": field.default}
        definitions[name] = (field.hint, Field(description=field.docs, **default))  # type: ignore[arg-type]
    return definitions


_AdapterFields = create_model("_AdapterFields", **_adapter_definitions())


class RunConfig(_AdapterFields):  # type: ignore[misc, valid-type]
    """One training run.

    >>> config = RunConfig(model="./model", data="train.jsonl", output="runs/first", r=8, lora_alpha=16)

    Raises:
        ConfigError: an unknown field (the nearest is named), a missing one, or a bad value.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    """The base model: a folder, or a name on the hub."""
    data: str | list[str] | dict[str, float] | None = None
    """The training data: a file of JSONL, CSV, text or Parquet, a folder or pattern of them, a saved data set, a hub
    name, or - for JSONL on stdin; may be repeated, also with weights, as in a.jsonl=3."""
    eval_data: str | list[str] | None = None
    """The held-out data; without it, a share of the training data is held out."""
    eval_fraction: float = Field(0.05, ge=0, lt=1)
    """The share of the training data to hold out when there is no held-out data; 0 holds out nothing."""
    columns: str | None = None
    """The data's own names for columns, as in instruction=question,output=answer."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What a row does that cannot be used: end the run with its line and reason, or be left out and counted."""
    workers: int = Field(0, ge=0)
    """Processes that turn rows into tokens; 0 does it in the run's own."""
    cache: str = Field("auto", min_length=1)
    """Where encoded data is kept for later runs: a folder, auto (veneer/data in the user's cache), or off."""
    output: str
    """The run folder to write; it must not exist, or be empty."""
    task: str = "causal_lm"
    """The kind of task."""
    labels: str | None = _TASK.labels
    """The names of the labels in their order, as in negative,positive; without it, those of the training data."""
    problem: Problem = _TASK.problem
    """What is told of a text or image: one label, several, or a number; auto goes by the training data."""
    class_weights: str | None = _TASK.class_weights
    """How much each label counts: balanced (rare ones more), or as in spam=5,other=1."""
    method: Method = "lora"
    """What is trained: a low-rank adapter, the full model, or its output head alone."""
    stride: int = Field(_TASK.stride, ge=0)
    """Tokens that the windows of a context too long for one sequence have in common; of question_answering."""
    prefix: str | None = _TASK.prefix
    """Text to put before every source, as T5 wants; of translation and seq2seq_lm."""
    languages: str | None = _TASK.languages
    """From which language to which, as in en-de: the names that the data or the tokenizer has for them."""
    judge_by: str | None = _TASK.judge_by
    """What answers are judged by, as in bleu,chrf; without it, what is customary for the task."""
    database: str | None = _TASK.database
    """The file of SQLite that answers are executed on, read-only, when they are judged by sql_execution."""
    pooling: Pooling = _TASK.pooling
    """How a text's vector is made of its tokens': mean, cls (the first) or last; auto as the model's folder says."""
    code: str | None = _TASK.code
    """The Python file with a model and a loss of your own, which is run; of task other."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training data; parts of one count too."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which to stop, instead of epochs."""
    batch_size: int = Field(8, ge=1)
    """Examples that go through the model at once, on each device."""
    accumulation: int = Field(1, ge=1)
    """Batches whose gradients make one step; the loss is averaged over all their trained tokens."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay examples end to end instead of padding them: wherever the model keeps them apart, always, or never."""
    max_tokens: int | None = Field(None, ge=1)
    """The most tokens at once when packed, else 512 on a CPU and 8,192 on others; a step with more takes turns."""
    kernels: Literal["on", "off"] = "on"
    """Compute norms, feed-forward blocks, query, key and value and rotary embedding by kernels that keep less."""
    learning_rate: float | None = Field(None, gt=0)
    """The highest learning rate; without it, a customary one for the method."""
    head_learning_rate: float | None = Field(None, gt=0)
    """The highest learning rate of the head, which often starts at random; without it, that of the rest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warmup."""
    warmup: float = Field(0.05, ge=0)
    """Steps over which the learning rate rises: a share of all steps below 1, a number of steps from 1 on."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """How many times as fast B learns as A (LoRA+, arXiv 2402.12354, which suggests 16); without it, as fast."""
    optimizer: OptimiserName = "adamw"
    """The optimiser; 8 bits of state and paging to main memory are bitsandbytes'."""
    weight_decay: float = Field(0.0, ge=0)
    """The weight decay, on matrices only."""
    clip: float | None = Field(1.0, gt=0)
    """The largest norm of the gradient; null does not clip."""
    checkpoint: str = Field("off", pattern=r"^(off|on|auto|[1-9]\d*)$")
    """Layers that compute their activations again instead of keeping them: off, on (all), a number, or auto (as few as
    the memory allows)."""
    memory_limit: str | None = Field(None, pattern=r"^\d+(\.\d+)? ?[KMGT]i?B$")
    """What checkpoint=auto lets the process take in all, as in 4GB; without it, nine tenths of what is free."""
    offload_activations: bool = False
    """Keep activations in main memory until the backward pass needs them; on a GPU only."""
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """How processes share the model: each has all of it (ddp), or a part (fsdp: FSDP2, deepspeed: ZeRO); auto is what
    accelerate is configured for, else ddp."""
    quantize: Quantisation | None = None
    """Store the frozen base's linear layers in 4 or 8 bits (QLoRA); needs bitsandbytes and method lora."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """The arithmetic of the forward pass; what is trained stays in fp32. auto measures which one is faster here."""
    matmul: Literal["auto", "torch", "onednn"] = "auto"
    """The library that multiplies fp32 matrices on a CPU: torch's own, or oneDNN where its products are as exact; auto
    measures which one is faster here."""
    max_length: int = Field(1024, ge=2)
    """Tokens after which an example is cut."""
    truncate: Truncation = "end"
    """What becomes of a longer example: its end or start is cut, it is dropped, or the run fails and names it."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens are trained: the answers only, or all."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """The seed of everything random."""
    log_every: int = Field(1, ge=1)
    """Steps between two lines of the log."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between two measurements on the held-out data; without it, one after each epoch."""
    samples: int = Field(0, ge=0)
    """Held-out prompts to answer at each measurement, shown beside the answers of the untrained model."""
    sample_tokens: int = Field(64, ge=1)
    """The most tokens of each of these answers."""
    best_metric: str = "loss"
    """The held-out metric that says which weights are the best."""
    min_delta: float = Field(0.0, ge=0)
    """By how much it must be better to count as better."""
    patience: int | None = Field(None, ge=1)
    """Measurements in a row that bring nothing better, after which to stop; without it, all steps are done."""
    save_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints to resume from; without it, one after each measurement."""
    keep: int = Field(2, ge=0)
    """How many of the newest checkpoints to keep; 0 writes none."""
    keep_every: int | None = Field(None, ge=1)
    """Keep the checkpoints of steps that this divides as well."""
    explosion: float | None = Field(3.0, gt=1)
    """How many times the highest loss of the first steps ends the run as exploded; null lets it go on."""
    track: str | None = None
    """Where else to write the curves, as in tensorboard,wandb: any of accelerate's trackers."""

    def __init__(self, **values: Any) -> None:
        # pydantic's own error is a page; here it becomes the one sentence that users see.
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_sentence(error, type(self))) from None
        self._check_savings()
        if self.data is not None:
            weighed(self.data)
        self.trackers()
        self._check_adapter_fields()

    @model_validator(mode="before")
    @classmethod
    def _customary_rate(cls, values: Any) -> Any:
        values = _with_checkpoint(values)
        method = values.get("method", "lora")
        if values.get("learning_rate") is None and method in LEARNING_RATES:
            values = {**values, "learning_rate": LEARNING_RATES[method]}
        family = values.get(FAMILY, "lora")
        own = {name: f.families[family] for name, f in adapter_fields().items() if family in f.families}
        differ = {name: value for name, value in own.items() if value != adapter_fields()[name].default}
        return {**differ, **values} if method == "lora" else values

    def adapter(self, task_type: TaskType | None = None) -> TunerConfig:
        """The adapter's config. How many steps AdaLoRA's schedule has is known, and set, when the data is read.

        Raises:
            ConfigError: a bad value or combination of the adapter's fields.
        """
        values = {name: getattr(self, name) for name in fields_of(self.family)}
        if FAMILIES[self.family] is AdaLoraConfig:
            values["total_step"] = self.tinit + self.tfinal + 1
        return FAMILIES[self.family](**values, task_type=task_type)

    def trackers(self) -> list[str]:
        """The names in ``track``, each once.

        Raises:
            ConfigError: a name that is no tracker's.
        """
        names = list(dict.fromkeys(name.strip() for name in (self.track or "").split(",") if name.strip()))
        for name in names:
            if name not in TRACKERS:
                raise ConfigError(
                    f"track has no {name!r}; expected any of {', '.join(TRACKERS)}.{nearest(name, TRACKERS)}"
                )
        return names

    def _check_savings(self) -> None:
        if self.memory_limit is not None and self.checkpoint != "auto":
            raise ConfigError(
                f"memory_limit has no meaning with checkpoint={self.checkpoint}; it is for checkpoint=auto."
            )

    def _check_adapter_fields(self) -> None:
        if self.method == "lora":
            self._refuse(set(adapter_fields()) - {FAMILY, *fields_of(self.family)}, f"family={self.family}")
            self.adapter()
            return
        if self.loraplus_lr_ratio is not None:
            raise ConfigError(f"loraplus_lr_ratio has no meaning with method={self.method}; it is for a LoRA adapter.")
        if self.quantize is not None:
            raise ConfigError(
                f"quantize={self.quantize} has no meaning with method={self.method}, which trains the model's own "
                "weights: in so few bits they cannot learn. Use method=lora, or leave quantize out."
            )
        if self.head_learning_rate is not None and self.method == "head":
            raise ConfigError("head_learning_rate has no meaning with method=head, where learning_rate is the head's.")
        self._refuse(set(adapter_fields()), f"method={self.method}")

    def _refuse(self, names: set[str], choice: str) -> None:
        """Refuse values of the adapter's fields that mean nothing with a choice."""
        set_here = [n for n, f in adapter_fields().items() if n in names and getattr(self, n) != f.default]
        if set_here:
            families = [f for f in FAMILIES if any(f in adapter_fields()[name].families for name in set_here)]
            raise ConfigError(
                f"{listed(set_here)} has no meaning with {choice}; it is for adapters of family {listed(families)}."
            )

    @classmethod
    def read(cls, path: str | Path | None, **overrides: Any) -> Self:
        """The config of a YAML file, with fields replaced; without a file, the fields alone.

        Raises:
            UsageError: no such file, or it is not YAML with fields.
            ConfigError: see ``RunConfig``.
        """
        return cls(**{**(read_fields(path) if path is not None else {}), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every field with its value, those of other methods left out."""
        left_out = set(adapter_fields())
        if self.method == "lora":
            left_out -= {FAMILY, *fields_of(self.family)}
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in left_out}

    def to_yaml(self) -> str:
        """The text of ``run.yaml``; ``RunConfig.read`` gives the same config back."""
        import yaml

        own = list(RunConfig.__annotations__)
        values = self.to_dict()
        ordered = {name: values[name] for name in (*own, *adapter_fields()) if name in values}
        return str(yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True))


def _with_checkpoint(values: dict[str, Any]) -> dict[str, Any]:
    """The fields with ``checkpoint`` as text: YAML reads on and off as truths; transformers' name stands for it."""
    if "gradient_checkpointing" in values:
        if "checkpoint" in values:
            raise ConfigError("Both checkpoint and gradient_checkpointing are given; they are the same, so keep one.")
        values = {("checkpoint" if name == "gradient_checkpointing" else name): v for name, v in values.items()}
    given = values.get("checkpoint")
    if isinstance(given, bool):
        return {**values, "checkpoint": "on" if given else "off"}
    return {**values, "checkpoint": str(given)} if isinstance(given, int) else values


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields that a YAML file sets.

    Raises:
        UsageError: no such file, or it is not YAML with fields.
    """
    import yaml

    place = Path(path).expanduser()
    if not place.is_file():
        beside = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UsageError(f"There is no config file {str(path)!r}.{nearest(place.name, beside)}")
    try:
        values = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{str(path)!r} is not readable as YAML: {reason}.") from None
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{str(path)!r} holds {_kind(values)}; expected fields, one a line, as in 'model: ./model'.")
    return dict(values)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _sentence(error: ValidationError, config: type[BaseModel]) -> str:
    """The first of pydantic's complaints, all unknown fields together."""
    found = error.errors(include_url=False)
    unknown = [str(item["loc"][0]) for item in found if item["type"] == "extra_forbidden"]
    if unknown:
        known = list(config.model_fields)
        hint = next(filter(None, (nearest(name, known) for name in unknown)), "")
        return f"The run config has no field {listed(map(repr, unknown))}.{hint}"
    first = found[0]
    name = str(first["loc"][0]) if first["loc"] else "value"
    if first["type"] == "missing":
        return f"The run config has no {name}: {_description(config, name)}"
    problem = first["msg"][0].lower() + first["msg"][1:]
    return f"{name} is {first['input']!r}; {problem}."


def _description(config: type[BaseModel], name: str) -> str:
    text = config.model_fields[name].description or ""
    return text[:1].lower() + text[1:]

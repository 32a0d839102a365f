"""Whether another program's loader takes a saved adapter, found without that program.

vLLM's contract, read from its source (``vllm/lora/peft_helper.py``, ``lora_model.py``, ``utils.py`` and
``vllm/config/lora.py`` of 2025 and 2026) and its table of supported models. Where its releases differ the stricter
one counts, so an adapter that passes is loaded rightly by all of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors

from veneer.adapters.files import PICKLE_NAME, PREFIX
from veneer.adapters.plain import first_match
from veneer.core.errors import AdapterFileError, UsageError, listed
from veneer.core.hub import CONFIG_NAME, WEIGHTS_NAME
from veneer.core.peft_config import read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` takes; its default is 16."""

# Starts that only fill the factors. Any other one leaves an adapter that stands on changed base weights.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_EMBEDDINGS = ("embed_tokens", "lm_head")
_WITH_EMBEDDINGS = ("llama", "mistral", "mixtral", "granite", "phimoe", "apertus")
_WITHOUT_LORA = (
    *("bloom", "dbrx", "falcon", "falcon_mamba", "gpt2", "gptj", "gpt_neox", "mamba", "mamba2", "mpt", "olmoe"),
    *("stablelm", "gemma3n", "bart", "t5"),
)
_WITH_LORA = (
    *("afmoe", "apertus", "arcee", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe"),
    *("exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_bigcode"),
    *("gpt_oss", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense", "jamba", "lfm2"),
    *("lfm2_moe", "llama", "minimax_m2", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi"),
    *("phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3"),
    *("starcoder2", "vaultgemma"),
)
_MERGE = "merge it into the base with veneer merge and serve the merged model"
_CONVERT = "make plain LoRA of it with veneer convert"


@final
@dataclass(frozen=True)
class Finding:
    """One thing that a loader makes of an adapter."""

    what: str
    """What was found."""
    do: str
    """What to do about it."""
    blocks: bool
    """Whether the adapter is refused for it, or loaded wrongly."""


@final
@dataclass(frozen=True)
class VllmCheck:
    """What vLLM's loader makes of an adapter."""

    findings: tuple[Finding, ...]
    """Everything to know."""
    max_lora_rank: int
    """The least value of ``--max-lora-rank`` that the adapter fits into; 0 when none does."""

    @property
    def takes_it(self) -> bool:
        """Whether nothing stands against it."""
        return not any(finding.blocks for finding in self.findings)


def check_vllm(folder: Path, *, max_lora_rank: int | None = None, model_type: str | None = None) -> VllmCheck:
    """Whether vLLM loads an adapter, and scales it rightly.

    Only names, shapes and the config are read, and nothing has to be supported by this release, so that any PEFT
    folder can be asked about.

    Args:
        folder: the adapter's.
        max_lora_rank: the server's setting, when it is given.
        model_type: the base model's, when it is known.

    Raises:
        UsageError: no adapter in the folder, or a ``max_lora_rank`` that vLLM does not know.
        AdapterFileError: a file of it is broken.
    """
    if max_lora_rank is not None and max_lora_rank not in VLLM_RANKS:
        raise UsageError(f"max_lora_rank is {max_lora_rank}; vLLM takes {', '.join(map(str, VLLM_RANKS))}.")
    if not (folder / CONFIG_NAME).is_file():
        raise UsageError(f"{str(folder)!r} has no {CONFIG_NAME}; expected an adapter's folder.")
    config = read_json(folder / CONFIG_NAME)
    _check_numbers(folder, config)
    shapes = _shapes(folder)
    layers = _layers(shapes)
    found = [*_features(config), *_tensors(shapes, config), *_modules(layers, model_type)]
    if str(config.get("peft_type", "LORA")).upper() == "LORA":
        found += _numbers(config, layers)
    ranks = [*layers.values(), config.get("r") or 0]
    fits = next((allowed for allowed in VLLM_RANKS if allowed >= max(ranks)), 0)
    found += _rank(max(ranks), fits, max_lora_rank)
    return VllmCheck(tuple(found), fits)


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse ranks and alphas that no reader of the config could use."""
    numbers = {name: config.get(name) for name in ("r", "lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{folder / CONFIG_NAME} has {name} {patterns!r}; expected a mapping to numbers.")
        numbers |= {f"{name}[{key!r}]": value for key, value in patterns.items()}
        for key in patterns:
            try:
                re.compile(key)
            except re.error as error:
                raise AdapterFileError(
                    f"{folder / CONFIG_NAME} has {key!r} in {name}, which is not a regular expression: {error}."
                ) from None
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise AdapterFileError(f"{folder / CONFIG_NAME} has {name} {value!r}; expected a number.")
        if "pattern" in name and not (value or 0) > 0:
            raise AdapterFileError(f"{folder / CONFIG_NAME} has {name} {value!r}; expected a number above 0.")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        other = f" There is a {PICKLE_NAME}: save it as safetensors." if (folder / PICKLE_NAME).is_file() else ""
        raise UsageError(f"{str(folder)!r} has no {WEIGHTS_NAME}; expected an adapter's folder.{other}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(f"{str(path)!r} is not a complete safetensors file: {error}.") from None


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """From the path of each adapted layer to the rank of its A."""
    return {
        key.removeprefix(PREFIX).removesuffix(end): shape[0]
        for key, shape in shapes.items()
        for end in (".lora_A.weight", ".lora_embedding_A")
        if key.endswith(end) and shape
    }


def _features(config: Mapping[str, Any]) -> list[Finding]:
    kind, start = str(config.get("peft_type", "LORA")).upper(), config.get("init_lora_weights", True)
    refused = {
        f"peft_type is {kind}, and vLLM knows LORA only": (kind != "LORA", _CONVERT),
        "use_dora is on": (config.get("use_dora"), f"{_CONVERT} (--r or --energy says how closely), or {_MERGE}"),
        f"bias is {config.get('bias')!r}: biases of the base were trained": (
            config.get("bias", "none") != "none",
            _MERGE,
        ),
        "lora_bias is on": (config.get("lora_bias"), _MERGE),
        f"modules_to_save is {json.dumps(config.get('modules_to_save'))}": (
            config.get("modules_to_save"),
            f"{_MERGE}; newer releases do take a classification model's classifier or score",
        ),
        "trainable_token_indices is set": (
            config.get("trainable_token_indices"),
            f"{_MERGE}; newer releases do take it with --max-lora-trainable-tokens",
        ),
        f"init_lora_weights is {start!r}, so the adapter stands on changed base weights": (
            _stands_elsewhere(config),
            _CONVERT,
        ),
        "target_modules is missing": (not config.get("target_modules"), "save the adapter again with veneer"),
    }
    for option in ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "target_parameters"):
        refused[f"{option} is set"] = (config.get(option), _MERGE)
    return [Finding(what, do, True) for what, (on, do) in refused.items() if on]


def _stands_elsewhere(config: Mapping[str, Any]) -> bool:
    start = config.get("init_lora_weights", True)
    return isinstance(start, str) and start.lower() not in _PLAIN_STARTS


def _tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[Finding]:
    whole = tuple(f".{name}" for name in config.get("modules_to_save") or ())
    unknown = [key for key in shapes if not key.endswith((*_FACTORS, *_SKIPPED))]
    # Those that come from an option that is refused already need no second line.
    named = any(config.get(option) for option in ("lora_bias", "use_dora", "trainable_token_indices"))
    named = named or _stands_elsewhere(config)
    unknown = [key for key in unknown if not (named or any(part in key for part in whole))]
    found = []
    if unknown and config.get("bias", "none") == "none":
        what = f"{len(unknown)} tensors are no factors of a LoRA: {listed(unknown, most=3)}"
        found.append(Finding(what, f"{_CONVERT}, or {_MERGE}", True))
    skipped = [key for key in shapes if key.endswith(_SKIPPED)]
    if skipped:
        what = f"{listed(skipped)} is the base's own weight, which newer releases skip and older ones refuse"
        found.append(Finding(what, "save the adapter with save_embedding_layers=False", False))
    deep = sorted(key for key, shape in shapes.items() if key.endswith(_FACTORS) and len(shape) != 2)
    if deep:
        what = f"{len(deep)} factors are of convolutions: {listed(deep, most=3)}"
        found.append(Finding(what, "leave the convolutions out of target_modules; vLLM adapts linear layers", True))
    return found


def _modules(layers: Mapping[str, int], model_type: str | None) -> list[Finding]:
    if model_type is None:
        what = "the base model's config was not found, so it is not known whether vLLM adapts that architecture"
        return [Finding(what, "give the base with --model", False)]
    found = []
    if model_type in _WITHOUT_LORA:
        what = f"vLLM has no LoRA for the architecture {model_type!r}"
        found.append(Finding(what, f"{_MERGE}, or try its --model-impl transformers", True))
    elif model_type not in _WITH_LORA:
        what = f"the architecture {model_type!r} is not among those that are known to take a LoRA in vLLM"
        found.append(Finding(what, "look it up in vLLM's table of supported models", False))
    embeddings = sorted({path.rpartition(".")[2] for path in layers} & set(_EMBEDDINGS))
    if embeddings and model_type not in _WITH_EMBEDDINGS:
        what = f"{listed(embeddings)} is adapted, which vLLM does for some architectures, not surely for {model_type!r}"
        found.append(Finding(what, f"leave it out of target_modules, or {_MERGE}", True))
    return found


def _numbers(config: Mapping[str, Any], layers: Mapping[str, int]) -> list[Finding]:
    """Older releases scale every layer by the one factor of the config."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        return [Finding(f"r is {r!r} and lora_alpha {alpha!r}", "save the adapter again with veneer", True)]

    def scaling(rank: float, of: float) -> float:
        return of / math.sqrt(rank) if config.get("use_rslora") else of / rank

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    other = [
        path
        for path in layers
        if not math.isclose(
            scaling(first_match(ranks, path, r), first_match(alphas, path, alpha)), scaling(r, alpha), rel_tol=1e-6
        )
    ]
    if not other:
        return []
    what = (
        f"{len(other)} of {len(layers)} layers have a factor of their own (rank_pattern, alpha_pattern), which vLLM "
        f"reads in its newest releases only: {listed(other, most=2)}"
    )
    return [Finding(what, f"write one factor for all with veneer resize --r {max(layers.values())}", True)]


def _rank(rank: int, fits: int, given: int | None) -> list[Finding]:
    if not fits:
        what = f"the rank is {rank}; vLLM's highest is {VLLM_RANKS[-1]}"
        return [Finding(what, f"veneer resize --r {VLLM_RANKS[-1]}", True)]
    if given is not None and rank > given:
        what = f"the rank is {rank}, and --max-lora-rank {given}"
        return [Finding(what, f"start vLLM with --max-lora-rank {fits}, or veneer resize --r {given}", True)]
    return []

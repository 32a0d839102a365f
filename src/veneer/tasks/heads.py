"""The head of a task model: kept when it tells the labels at hand, else made anew; never one taken for another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.core.errors import ConfigError, listed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def names_of(config: PretrainedConfig) -> list[str] | None:
    """The label names that a model's config carries; None where they are transformers' fillers LABEL_0, LABEL_1, ..."""
    found = [config.id2label[at] for at in sorted(config.id2label)] if config.id2label else []
    filler = [f"LABEL_{at}" for at in range(len(found))]
    return None if found == filler else [str(name) for name in found]


def check_order(config: PretrainedConfig, names: Sequence[str]) -> None:
    """Refuse the order of labels when the model has a head for the same ones in another.

    Raises:
        ConfigError: it has.
    """
    has = names_of(config)
    if has is not None and sorted(has) == sorted(names) and has != list(names):
        raise ConfigError(
            f"The model's head tells {listed(has)} in this order, and the data's labels were put as {listed(names)}; "
            f"give --labels {','.join(has)} to keep the head."
        )


def renewed(model: PreTrainedModel, before: PretrainedConfig, names: Sequence[str]) -> None:
    """Make the head anew when it was loaded and told other labels, of which there happen to be as many.

    Args:
        model: as it was loaded; its head is changed in place.
        before: the config that stands beside the weights.
        names: what the head is to tell.
    """
    has = names_of(before)
    if has is None or has == list(names) or len(has) != len(names):
        # Without names nothing speaks against it; of another size it is new already.
        return
    for path in head_paths(model):
        for module in model.get_submodule(path).modules():
            _anew(model, module)
    warnings.warn(
        f"The model's head told {listed(has)}; for {listed(names)} it starts at random.",
        stacklevel=4,
    )


def head_paths(model: nn.Module) -> list[str]:
    """The parts of a task model beside its body.

    Empty where they cannot be told.
    """
    from veneer.adapters.index import ModuleIndex

    return list(ModuleIndex(model).head_paths)


def untrained_pooler(model: nn.Module) -> str | None:
    """The path of a pooler that a head reads and that was never trained; None where there is none.

    Models that make vectors of texts by means come with a pooler all the same. Its bias of zeros gives it away, where
    others have learned. Frozen, it lets little of a text through to the head.
    """
    if not head_paths(model):
        return None
    biases = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    zero = {name for name, bias in biases.items() if not bias.detach().any()}
    for path, _ in model.named_modules():
        own = {name for name in biases if path.rpartition(".")[2] == "pooler" and name.startswith(f"{path}.")}
        if own and own <= zero and any(name not in zero for name in biases):
            return path
    return None


def free(model: Any) -> list[str]:
    """Make a task model's head learn, and nothing else; what was done, in sentences.

    A language model's head that shares its weight with the embeddings gets one of its own.

    Raises:
        ConfigError: the model has no head.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    paths = head_paths(model)
    if head is None and not paths:
        raise ConfigError(f"{type(model).__name__} has no output head, so method=head has nothing to train.")
    if head is None:
        for path in paths:
            model.get_submodule(path).requires_grad_(True)
        return [f"Of the model, {listed(paths)} is trained."]
    notes = []
    shared = model.get_input_embeddings().weight
    if head.weight is shared:
        head.weight = nn.Parameter(shared.detach().clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        notes.append(
            "The output head shared its weight with the embeddings; it is untied, so the saved model is larger."
        )
    head.requires_grad_(True)
    return notes


def _anew(model: Any, module: nn.Module) -> None:
    # transformers marks what it has loaded or started, and leaves that alone.
    for marked in (module, *module.parameters(recurse=False)):
        if hasattr(marked, "_is_hf_initialized"):
            marked._is_hf_initialized = False  # type: ignore[assignment]
    with torch.no_grad():
        model._init_weights(module)

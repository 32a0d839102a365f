"""``precision: auto``, settled before anything is loaded, so that the run's own config says what it computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.engine import precision
from veneer.tasks.task import get
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTH = 1024
"""The size of products for a model that does not say how wide it is."""


def settled(config: RunConfig, model: PreTrainedModel | None) -> tuple[RunConfig, tuple[str, ...]]:
    """The config with a precision that is not ``auto``, and what was measured for it, in sentences.

    All processes take what the first one measured.

    Args:
        config: the run.
        model: the model when it is loaded already.
    """
    if config.precision != "auto":
        return config, ()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    found = [precision.measure(_width(config, model), state.device)]
    if state.num_processes > 1:
        broadcast_object_list(found)
    speeds = found[0]
    return config.model_copy(update={"precision": speeds.chosen}), (f"precision=auto is {speeds}.",)


def _width(config: RunConfig, model: PreTrainedModel | None) -> int:
    from veneer.tasks.loading import load_config

    if model is None and (config.model is None or not get(config.task).pretrained):
        return _WIDTH
    whole: Any = load_config(str(config.model)) if model is None else getattr(model, "config", None)
    if whole is None:
        return _WIDTH
    return int(getattr(whole.get_text_config(), "hidden_size", _WIDTH))

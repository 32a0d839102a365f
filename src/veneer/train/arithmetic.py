"""``precision: auto`` and ``matmul: auto``, settled before anything is loaded, for a run's own config to say it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.core.errors import UsageError
from veneer.engine import matmul, precision
from veneer.tasks.task import get
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTH = 1024
"""The size of products for a model that does not say how wide it is."""


def settled(config: RunConfig, model: PreTrainedModel | None) -> tuple[RunConfig, tuple[str, ...]]:
    """The config with no ``auto`` in its arithmetic, and what was measured for it, in sentences.

    All processes take what the first one measured.

    Args:
        config: the run.
        model: the model when it is loaded already.
    """
    if "auto" not in (config.precision, config.matmul):
        return config, ()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [_measured(config, _width(config, model))]
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    chosen, said = found[0]
    return config.model_copy(update=chosen), said


def _measured(config: RunConfig, width: int) -> tuple[dict[str, str], tuple[str, ...]]:
    from accelerate import PartialState

    device = PartialState().device
    chosen: dict[str, str] = {"precision": config.precision, "matmul": config.matmul}
    said = []
    if config.matmul == "auto":
        products = matmul.measure(width) if device.type == "cpu" else None
        chosen["matmul"] = "torch" if products is None else products.chosen
        # That torch's own way stays what it is, is no news.
        if products is not None and products.chosen != "torch":
            said.append(f"matmul=auto is {products}.")
    if config.precision == "auto":
        with matmul.multiplying(chosen["matmul"]):  # type: ignore[arg-type]
            speeds = precision.measure(width, device)
        chosen["precision"] = speeds.chosen
        said.append(f"precision=auto is {speeds}.")
    return chosen, tuple(said)


def _width(config: RunConfig, model: PreTrainedModel | None) -> int:
    from veneer.tasks.loading import load_config

    if model is None and (config.model is None or not get(config.task).pretrained):
        return _WIDTH
    try:
        whole: Any = load_config(str(config.model)) if model is None else getattr(model, "config", None)
    except UsageError:
        # Whoever loads the model says so, after all that is asked before.
        return _WIDTH
    return matmul.width_of(whole) or _WIDTH

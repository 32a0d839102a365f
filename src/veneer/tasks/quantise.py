"""Base models with their weights in a few bits, by bitsandbytes: what QLoRA trains on."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

from veneer.core.errors import UsageError, nearest

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

Quantisation = Literal["nf4", "fp4", "int8"]
"""NormalFloat or float in 4 bits, whose scales are quantised too; or 8 bits with one scale a row."""


def quantisation_config(kind: str, dtype: str, config: PretrainedConfig) -> BitsAndBytesConfig:
    """What ``from_pretrained`` needs to load a model's linear layers, but for the head, in a few bits.

    Args:
        kind: one of ``Quantisation``.
        dtype: the precision that the layers compute in, and that everything else is loaded in.
        config: the model's config.

    Raises:
        UsageError: an unknown kind, no bitsandbytes, or a model whose files are quantised already.
    """
    kinds = get_args(Quantisation)
    if kind not in kinds:
        raise UsageError(f"quantize is {kind!r}; expected one of {', '.join(kinds)}.{nearest(kind, kinds)}")
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method", "?") if isinstance(stored, dict) else stored.quant_method
        raise UsageError(f"The model's files are quantised already ({method}); leave quantize={kind} out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"quantize={kind} needs bitsandbytes, which is not installed: pip install 'veneer[quant]'.")
    from transformers import BitsAndBytesConfig

    # It says on import which optional speed-ups it misses, and in 8 bits at every call what it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=None if dtype == "auto" else dtype,
    )


def leave_file(model: PreTrainedModel) -> None:
    """Copy what was not quantised out of the mapped weight file.

    One tensor that lies in the file keeps all of it mapped, and so the pages of the weights that were read only to be
    quantised.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()

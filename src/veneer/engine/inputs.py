"""Token ids as a model takes them, to look at what it does."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def token_inputs(model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
    """The inputs of a transformers model that reads tokens.

    Args:
        model: of any task; one for multiple choice takes the rows for the choices of one question.
        ids_BT: (B, T) token ids, which an encoder-decoder is given on both sides.
    """
    ids = ids_BT[None] if type(model).__name__.endswith("ForMultipleChoice") else ids_BT
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}

"""What a transformers model takes, as its config says."""

from __future__ import annotations

from typing import Any

_POSITIONS_AFTER_PADDING = frozenset(
    {*("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "roberta-prelayernorm"), "mpnet"}
)


def longest_input(model_config: Any) -> int | None:
    """The most tokens that a transformers model takes, where it has a config that says so."""
    if model_config is None:
        return None
    text = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # These count positions from behind the padding token's id.
    return limit - text.pad_token_id - 1 if text.model_type in _POSITIONS_AFTER_PADDING else limit


def vocabulary(model_config: Any) -> int | None:
    """How many tokens a transformers model has embeddings for, where its config says so."""
    count = getattr(model_config.get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) and count > 0 else None

"""A tiny encoder on disk, made here: a tokenizer of whole words and pieces, and a random BERT without a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = (
    "good",
    "bad",
    "fine",
    "poor",
    "a",
    "the",
    "film",
    "was",
    "very",
    "not",
    "and",
    "so",
    "it",
    "i",
    "saw",
    "paris",
)
_VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *WORDS,
    *"abcdefghijklmnopqrstuvwxyz?.,",
    "##a",
    "##s",
    "##ly",
]


def tokenizer() -> Any:
    """BERT's way of cutting words, from a vocabulary of some forty."""
    return transformers.BertTokenizerFast(vocab={word: at for at, word in enumerate(dict.fromkeys(_VOCABULARY))})


def config(**settings: Any) -> Any:
    """A BERT, 32 wide."""
    return transformers.BertConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            **settings,
        }
    )


def saved(folder: Path) -> Path:
    """Body and tokenizer in a folder."""
    torch.manual_seed(0)
    transformers.BertModel(config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def reviews(count: int = 24) -> list[dict[str, Any]]:
    """Short texts whose label can be learned."""
    rows = []
    for at in range(count):
        word = ("good", "bad", "fine", "poor")[at % 4]
        text = f"{'i saw it and ' * (at % 3)}the film was {'very ' * (at % 2)}{word}"
        rows.append({"text": text, "label": "positive" if word in ("good", "fine") else "negative"})
    return rows


def questions(count: int = 24, *, unanswerable: bool = True) -> list[dict[str, Any]]:
    """Questions about short texts, as `datasets` has SQuAD; the answer can be learned, and every third has none."""
    rows = []
    for at in range(count):
        word = ("paris", "film")[at % 2]
        seen = not (unanswerable and at % 3 == 2)
        context = f"{'I saw it and ' * (at % 4)}so the {'very ' * (at % 2)}{word if seen else 'a'} was good."
        answers = {"text": [word], "answer_start": [context.index(word)]} if seen else {"text": [], "answer_start": []}
        rows.append({"question": f"a {word}?", "context": context, "answers": answers})
    return rows

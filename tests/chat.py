"""A tiny chat model on disk, made here: a tokenizer of a few words with a chat template, and a random llama."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = "red green blue one two three four stone river cloud says what colour is the and then it was not so"
_TEXTS = [WORDS, "user\nassistant\nsystem\n", "what colour is the stone\nthe stone is red", "### User:\n### Assistant:"]


def tokenizer(*, template: str | None = CHAT_TEMPLATE, pad: str | None = "<|end|>") -> Any:
    """A byte-level BPE tokenizer, so that any text comes back; by default its pad token is its eos token."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_TEXTS, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    if pad is not None:
        made.pad_token = pad
    made.chat_template = template
    return made


def model(*, tied: bool = False, vocabulary: int = 400, **settings: Any) -> Any:
    """A random llama, 32 wide."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **settings,
        }
    )
    return transformers.LlamaForCausalLM(config)


def saved(folder: Path, *, tied: bool = False, template: str | None = CHAT_TEMPLATE) -> Path:
    """Model and tokenizer in a folder."""
    model(tied=tied).save_pretrained(folder)
    tokenizer(template=template).save_pretrained(folder)
    return folder


def pairs(count: int = 12) -> list[dict[str, str]]:
    """Prompts and completions of different lengths, with something to learn in them."""
    words = WORDS.split()
    return [
        {
            "prompt": f"what colour is the {words[i % 10]} {' '.join(words[: i % 5])}",
            "completion": f"the {words[i % 10]} is {('red', 'green', 'blue')[i % 3]}{' and so' * (i % 4)}",
        }
        for i in range(count)
    ]


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

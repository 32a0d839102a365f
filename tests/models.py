"""Tiny random models of every family that the tests meet, a few milliseconds each, equal for equal seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

logging.getLogger("transformers").setLevel(logging.ERROR)

V, D, F, HEADS, LAYERS, LABELS = 37, 16, 24, 2, 2, 3
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama(tied: bool = False) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            **_IDS,
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=32, n_embd=D, n_layer=LAYERS, n_head=HEADS, **_IDS)
    )


def _opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=V,
            hidden_size=D,
            ffn_dim=F,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            word_embed_proj_dim=D,
            **_IDS,
        )
    )


def _gemma() -> nn.Module:
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=32,
            sliding_window=8,
            **_IDS,
        )
    )


def _bert(head: str = "SequenceClassification") -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
        num_labels=2 if head == "QuestionAnswering" else LABELS,
    )
    return getattr(transformers, f"BertFor{head}")(config)


def _distilbert() -> nn.Module:
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=V,
            dim=D,
            hidden_dim=F,
            n_layers=LAYERS,
            n_heads=HEADS,
            max_position_embeddings=32,
            num_labels=LABELS,
        )
    )


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=D,
            d_kv=8,
            d_ff=F,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            eos_token_id=2,
        )
    )


def _whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=V,
            d_model=D,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=F,
            decoder_ffn_dim=F,
            num_mel_bins=4,
            max_source_positions=10,
            max_target_positions=16,
            decoder_start_token_id=1,
            **_IDS,
        )
    )


def _vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=LABELS,
        )
    )


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tied=True),
    "gpt2": _gpt2,
    "opt": _opt,
    "gemma": _gemma,
    "bert": _bert,
    "bert-tokens": lambda: _bert("TokenClassification"),
    "bert-qa": lambda: _bert("QuestionAnswering"),
    "bert-choice": lambda: _bert("MultipleChoice"),
    "bert-body": lambda: transformers.BertModel(_bert().config),
    "distilbert": _distilbert,
    "t5": _t5,
    "whisper": _whisper,
    "vit": _vit,
}
MODELS = ("llama", "gpt2", "opt", "gemma", "bert", "distilbert", "t5", "whisper", "vit")
"""One model of each family."""


def make(kind: str, *, seed: int = 7, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh tiny model in evaluation mode. Norms and biases are moved off their trivial starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _MAKERS[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def batch(kind: str, *, seed: int = 3, rows: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Keyword arguments for a forward pass of that kind of model."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(3, V, shape, generator=generator)

    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator).to(dtype)}
    if kind == "whisper":
        frames = torch.randn(rows, 4, 20, generator=generator).to(dtype)
        return {"input_features": frames, "decoder_input_ids": tokens(rows, 5)}
    if kind == "t5":
        return {"input_ids": tokens(rows, 6), "decoder_input_ids": tokens(rows, 4)}
    if kind == "bert-choice":
        return {"input_ids": tokens(rows, LABELS, 6)}
    return {"input_ids": tokens(rows, 6)}


def output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's main output as one tensor: logits, both ends of a span, or the last hidden states."""
    out = model(**inputs)
    for name in ("logits", "last_hidden_state"):
        found = getattr(out, name, None)
        if found is not None:
            return found
    return torch.cat([out.start_logits, out.end_logits], dim=-1)


def randomise(model: nn.Module, *, seed: int = 11, adapter: str = "default") -> None:
    """Move an adapter's own tensors off their start, so that it changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".{adapter}." in f"{name}." and ("lora_" in name or "modules_to_save" in name):
                parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape, generator=generator))

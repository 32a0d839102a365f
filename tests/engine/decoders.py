"""Tiny random decoders of many families, for what must hold on all of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **dict.fromkeys(_DROPS, 0.0)}
_OF_GPT_NEOX = {key: value for key, value in _SIZE.items() if key != "num_key_value_heads"}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _SIZE),
    "Mistral": ("MistralConfig", {**_SIZE, "sliding_window": 4}),
    "Qwen2": ("Qwen2Config", _SIZE),
    "Qwen3": ("Qwen3Config", {**_SIZE, "head_dim": 8}),
    "Phi": ("PhiConfig", _SIZE),
    "Phi3": ("Phi3Config", _SIZE),
    "GPT2": ("GPT2Config", _GPT2),
    "GPTNeoX": ("GPTNeoXConfig", _OF_GPT_NEOX),
    "OPT": ("OPTConfig", {**_SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "Gemma": ("GemmaConfig", {**_SIZE, "head_dim": 8}),
    "Gemma2": ("Gemma2Config", {**_SIZE, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}),
    "Gemma3": ("Gemma3TextConfig", {**_SIZE, "head_dim": 8, "sliding_window": 4}),
    "Granite": ("GraniteConfig", {**_SIZE, "logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "Cohere": ("CohereConfig", {**_SIZE, "logit_scale": 0.25}),
    "Olmo2": ("Olmo2Config", _SIZE),
    "StableLm": ("StableLmConfig", _SIZE),
    "Starcoder2": ("Starcoder2Config", {**_SIZE, "sliding_window": 4}),
    "SmolLM3": ("SmolLM3Config", _SIZE),
    "Falcon": ("FalconConfig", {**_SIZE, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "GPTJ": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "Bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Mamba": ("MambaConfig", {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
}
"""From a family to its config's class and fields."""

NOT_PACKED = {"Bloom", "Falcon", "GPTJ", "Mamba"}
"""Those whose sequences would see each other in one row: an attention or a state of their own."""


def make(family: str) -> Any:
    """A random model of a family, in eval mode, equal on every call; its head has a weight of its own."""
    name, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields, tie_word_embeddings=False)
    return transformers.AutoModelForCausalLM.from_config(config).eval()

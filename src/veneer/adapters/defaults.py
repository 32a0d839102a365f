"""The customary target modules of each model type, used when a config names none.

Model types are those of ``model.config.model_type``. LLaMA-like decoders get all four attention
projections, GPT-style decoders query and value (or the fused projection), encoders query and value.
"""

from __future__ import annotations

_LLAMA_LIKE = """
    llama llama4_text mistral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text cohere
    cohere2 granite granitemoe olmo olmo2 olmo3 olmoe smollm3 stablelm starcoder2 helium glm nemotron exaone4
    seed_oss hunyuan_v1_dense ernie4_5 arcee apertus phimoe
"""
_QUERY_AND_VALUE_PROJECTIONS = """
    phi opt gptj gpt_neo xglm bart mbart plbart pegasus blenderbot blenderbot-small marian m2m_100 nllb-moe whisper
    speech_to_text wav2vec2 hubert wavlm moonshine clip clip_text_model clip_vision_model siglip
    siglip_vision_model vit vit_mae vit_msn deit beit dinov2 audio-spectrogram-transformer
"""
_BERT_LIKE = """
    bert bert-generation roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl camembert electra albert ernie
    layoutlm layoutlmv3 mobilebert data2vec-text data2vec-vision splinter longformer big_bird convbert
    megatron-bert rembert roformer esm yolos videomae tapas markuplm
"""

_BY_NAMES: dict[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj", "o_proj"): _LLAMA_LIKE,
    ("q_proj", "v_proj"): _QUERY_AND_VALUE_PROJECTIONS,
    ("query", "value"): _BERT_LIKE,
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("q_lin", "v_lin"): "distilbert xlm flaubert",
    ("q", "v"): "t5 mt5 umt5 longt5 switch_transformers udop",
    ("c_attn",): "gpt2 gpt_bigcode imagegpt decision_transformer",
    ("query_key_value",): "gpt_neox gpt_neox_japanese bloom falcon persimmon",
    ("qkv_proj", "o_proj"): "phi3",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "modernbert mpt",
    ("in_proj", "out_proj"): "mamba mamba2",
    ("key", "value", "receptance", "output"): "rwkv",
}

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    model_type: names for names, model_types in _BY_NAMES.items() for model_type in model_types.split()
}
"""From model type to the names of the modules that are adapted by default."""

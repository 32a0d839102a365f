"""Scripts as they are written for PEFT: each runs with either library, and only the import differs."""

import os

import peft
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

import veneer

both = pytest.mark.parametrize("library", [veneer, peft], ids=["veneer", "peft"])


@pytest.fixture
def opt_folder(tmp_path):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


@pytest.fixture
def bert_folder(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@both
def test_causal_language_model_in_a_plain_loop(library, opt_folder, tmp_path):
    model = OPTForCausalLM.from_pretrained(opt_folder)
    config = library.LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type=library.TaskType.CAUSAL_LM,
    )
    model = library.get_peft_model(model, config)
    model.print_trainable_parameters()

    ids = torch.randint(4, 96, (16, 12), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(3):
        for batch in loader:
            outputs = model(**batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(outputs.loss.item())
    assert losses[-1] < losses[0]

    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = library.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == opt_folder
    base = OPTForCausalLM.from_pretrained(config.base_model_name_or_path)
    loaded = library.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    generated = loaded.generate(input_ids=ids[:1, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)


@both
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_classifier_with_word_embeddings_merged_and_saved(library, bert_folder, tmp_path):
    model = BertForSequenceClassification.from_pretrained(bert_folder)
    config = library.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["word_embeddings", "query", "value"]
    )
    model = library.get_peft_model(model, config)
    assert "lora_embedding_A" in str(model)

    ids = torch.randint(0, 96, (4, 10), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")

    base = BertForSequenceClassification.from_pretrained(bert_folder)
    loaded = library.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained, rtol=0, atol=0)

    merged = loaded.merge_and_unload()
    assert type(merged) is BertForSequenceClassification
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    merged.save_pretrained(tmp_path / "merged")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained, rtol=1e-5, atol=1e-6)


def test_distilbert_counts_the_parameters_in_use():
    """The published figure for r=8 on q_lin and v_lin with both head layers trained."""
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2))
    config = veneer.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_lin", "v_lin"])
    model = veneer.get_peft_model(model, config)
    assert model.get_nb_trainable_parameters() == (739_586, 67_102_466)
    assert model.match_report.trainable == 739_586
    assert model.match_report.total == 67_102_466


@both
def test_opt_350m_shape_has_786432_trainable_parameters(library, capsys):
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    lora = library.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = library.get_peft_model(model, lora)
    assert model.get_nb_trainable_parameters()[0] == 786_432
    model.print_trainable_parameters()
    assert "trainable params: 786,432" in capsys.readouterr().out

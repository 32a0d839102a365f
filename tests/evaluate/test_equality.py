"""The comparison of two models: the same input each time, and rounding told from a real difference."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests import chat, speech, words
from veneer.core.errors import UsageError
from veneer.evaluate.equality import difference, fixed_input, outputs


def test_a_model_equals_itself() -> None:
    model = chat.model().train()
    given = fixed_input(model)
    assert given["input_ids"].max() < 400
    compared = difference(outputs(model, given), outputs(model, given), torch.float32)
    assert (compared.largest, compared.equal) == (0.0, True)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_and_more(dtype: torch.dtype) -> None:
    ones = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert difference(ones, ones + 4 * eps, dtype).equal
    assert not difference(ones, ones + 500 * eps, dtype).equal


def test_what_is_not_finite_or_not_alike_differs() -> None:
    ones = torch.ones(4)
    assert not difference(ones, ones * torch.nan, torch.float32).equal
    assert not difference(ones, torch.ones(5), torch.float32).equal


def test_other_kinds_of_models() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=8, patch_size=4))
    assert outputs(vit, fixed_input(vit)).shape == (1, 2)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=64)
    )
    assert outputs(t5, fixed_input(t5)).shape == (2, 32, 64)
    series = transformers.PatchTSTConfig(d_model=8, num_attention_heads=2, ffn_dim=8, num_hidden_layers=1)
    with pytest.raises(UsageError, match="takes past_values, for which there is no fixed input"):
        fixed_input(transformers.PatchTSTForPrediction(series))


def test_models_of_sound_have_a_fixed_input() -> None:
    made = [
        speech.model(),
        transformers.Speech2TextForConditionalGeneration(
            transformers.Speech2TextConfig(
                vocab_size=64,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                conv_channels=16,
                input_feat_per_channel=8,
            )
        ),
        transformers.HubertForCTC(
            transformers.HubertConfig(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                conv_dim=(8, 8),
                conv_stride=(5, 4),
                conv_kernel=(10, 8),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
            )
        ),
    ]
    for model in made:
        given = fixed_input(model)
        assert outputs(model, given).isfinite().all()
        assert torch.equal(outputs(model, given), outputs(model, fixed_input(model)))


def test_where_spans_end_is_compared_too() -> None:
    model = transformers.BertForQuestionAnswering(words.config())
    given = fixed_input(model)
    before = outputs(model, given)
    with torch.no_grad():
        model.qa_outputs.bias[1] += 1
    assert not difference(before, outputs(model, given), torch.float32).equal


def test_choices_are_those_of_one_question() -> None:
    model = transformers.BertForMultipleChoice(words.config())
    assert outputs(model, fixed_input(model)).shape == (1, 2)

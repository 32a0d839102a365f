"""The models that the recipes begin with, in a folder of links.

python recipes/models.py [--into models]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.tasks.minilm import minilm
from veneer.tasks.smollm import smollm
from veneer.tasks.whisper import whisper

if TYPE_CHECKING:
    from transformers import DistilBertConfig


def encoder_decoder(folder: Path, tokenizer: str) -> Path:
    """A small T5 with random weights, for lack of a trained one in a package."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    if not (folder / "config.json").is_file():
        words = AutoTokenizer.from_pretrained(tokenizer)
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(words),
            d_model=256,
            d_kv=32,
            d_ff=1024,
            num_layers=4,
            num_heads=8,
            pad_token_id=words.pad_token_id,
            decoder_start_token_id=words.pad_token_id,
            eos_token_id=words.sep_token_id,
        )
        T5ForConditionalGeneration(config).save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def distilbert_config() -> DistilBertConfig:
    """DistilBERT's published shape, 66M parameters (Sanh et al., arXiv 1910.01108)."""
    from transformers import DistilBertConfig

    return DistilBertConfig(
        vocab_size=30522,
        dim=768,
        n_layers=6,
        n_heads=12,
        hidden_dim=3072,
        max_position_embeddings=512,
        dropout=0.1,
        attention_dropout=0.1,
        seq_classif_dropout=0.2,
    )


def distilbert(folder: Path, tokenizer: str, config: DistilBertConfig | None = None) -> Path:
    """DistilBERT with random weights, for lack of trained ones in a package.

    Args:
        folder: to write to.
        tokenizer: MiniLM's, which cuts words as DistilBERT's does.
        config: another shape than the published one.
    """
    import torch
    from transformers import AutoTokenizer, DistilBertModel

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        DistilBertModel(config or distilbert_config()).save_pretrained(folder)
        words = AutoTokenizer.from_pretrained(tokenizer)
        # DistilBERT does not tell segments apart.
        words.model_input_names = ["input_ids", "attention_mask"]
        words.save_pretrained(folder)
    return folder


def vision(folder: Path) -> Path:
    """A small vision transformer with random weights, for grey images of 8 by 8 pixels."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=5,
        )
        ViTForImageClassification(config).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--into", type=Path, default=Path("models"))
    into: Path = parser.parse_args().into
    into.mkdir(parents=True, exist_ok=True)
    for name, fetch in {"smollm2": smollm, "minilm": minilm, "whisper": whisper}.items():
        place = into / name
        if not place.exists():
            place.symlink_to(Path(fetch(print)).resolve())
    encoder_decoder(into / "encoder-decoder", str(into / "minilm"))
    distilbert(into / "distilbert", str(into / "minilm"))
    vision(into / "vit")
    print(f"Models in {into}: {', '.join(sorted(path.name for path in into.iterdir()))}")


if __name__ == "__main__":
    main()

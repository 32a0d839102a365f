"""A tiny ViT on disk, and images whose colour is their label, made here."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 210),
    "grey": (120, 120, 120),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}


def config(**settings: Any) -> Any:
    """A ViT of images of 16 pixels, 32 wide."""
    return transformers.ViTConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "initializer_range": 0.2,
            **settings,
        }
    )


def saved(folder: Path, **settings: Any) -> Path:
    """Body and image processor in a folder."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    made = config(**settings)
    transformers.ViTModel(made, add_pooling_layer=False).save_pretrained(folder)
    mean = [0.5] * made.num_channels
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size, image_mean=mean, image_std=mean).save_pretrained(folder)
    return folder


def image(colour: str, seed: int = 0) -> Image.Image:
    """An image of one colour with some noise, 20 x 24 pixels."""
    drawn = random.Random(f"{colour}{seed}")
    values = [min(255, max(0, part + drawn.randint(-30, 30))) for _ in range(20 * 24) for part in COLOURS[colour]]
    return Image.frombytes("RGB", (20, 24), bytes(values))


def encoded(colour: str, seed: int = 0, kind: str = "PNG") -> bytes:
    """The same as the content of a file."""
    made = io.BytesIO()
    image(colour, seed).save(made, format=kind)
    return made.getvalue()


def folder(place: Path, colours: tuple[str, ...] = ("red", "green"), count: int = 6, first: int = 0) -> Path:
    """Images in folders that are named for their labels."""
    for colour in colours:
        (place / colour).mkdir(parents=True)
        for seed in range(first, first + count):
            (place / colour / f"{seed}.png").write_bytes(encoded(colour, seed))
    return place

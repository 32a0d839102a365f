"""Images of files as rows name them: checked when they are encoded, decoded when a batch needs them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from veneer.core.errors import DataError, UsageError
from veneer.data.encode import Encoded
from veneer.data.media import content, file_of, known, named
from veneer.data.rows import Row

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("image", "file_name")

# Others, as PostScript, run programs to be decoded.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


def check_installed() -> None:
    """Refuse to begin what could not be read.

    Raises:
        UsageError: the package is missing.
    """
    import importlib.util

    if importlib.util.find_spec("PIL") is None:
        raise UsageError("Reading images needs Pillow; install it: pip install 'veneer[images]'.")


def image_file(row: Row) -> str:
    """The file of a row's image. See ``media.file_of``; an image of Pillow's is taken too.

    Raises:
        DataError: the row names none.
    """
    return file_of(row, COLUMNS, _as_png)


def encode_image(row: Row, labels: Sequence[Any], channels: int) -> Encoded:
    """A row with an image that can be decoded; of the pixels nothing is kept.

    Raises:
        DataError: it is truncated, or no image.
    """
    data, kept = known(row, image_file(row))
    decoded(data, row.origin, kept["file"], channels)
    return Encoded(row.origin, [], list(labels), kept)


def pixels(examples: Sequence[Encoded], processor: Any, channels: int) -> dict[str, Any]:
    """What a model's image processor makes of some images: ``pixel_values``, (B, C, H, W) float32.

    Raises:
        DataError: an image that has changed and cannot be read any more, or images that end up in different sizes.
    """
    images = []
    for example in examples:
        file = example.more["file"]
        try:
            images.append(decoded(content(file), example.origin, file, channels))
        except OSError as error:
            raise DataError(f"{example.origin} names {file}, which cannot be read any more: {error}.") from None
    made: list[Mapping[str, Any]] = [processor(images=[image], return_tensors="pt") for image in images]
    shapes = [tuple(one["pixel_values"].shape[1:]) for one in made]
    other = next((at for at, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise DataError(
            f"{examples[other].origin} is made {shapes[other]} by the model's image processor, and "
            f"{examples[0].origin} {shapes[0]}; expected one size: let it resize, or train with batch_size 1."
        )
    return {name: torch.cat([one[name] for one in made]) for name in made[0]}


def decoded(data: bytes, origin: str, file: str, channels: int) -> Image:
    """An image as it is meant to be seen: upright, with ``channels`` (1 or 3) of 8 bits.

    Raises:
        DataError: it is truncated, or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return _eight_bits(upright).convert("L" if channels == 1 else "RGB")
    except Image.UnidentifiedImageError:
        reason = f"{named(file)} is none of {', '.join(_FORMATS)}" if data else f"{named(file)} is empty"
    except Exception as error:  # Each format's decoder has errors of its own.
        reason = f"{named(file)} cannot be decoded: {str(error).splitlines()[0].rstrip('.') if str(error) else error!r}"
    raise DataError(f"{origin} has no whole image: {reason}.")


def _eight_bits(image: Image) -> Image:
    """Pillow cuts off deep pixels at 255, and complains of palettes with transparency."""
    from PIL import Image

    if image.mode.startswith("I"):
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype("uint8"))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; expected 8 or 16 bits")
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _as_png(value: Any) -> bytes | None:
    # By its methods: a program that has such an image has imported Pillow, others need not.
    if not (hasattr(value, "save") and hasattr(value, "getexif")):
        return None
    made = io.BytesIO()
    value.save(made, format="PNG", exif=value.getexif())
    return made.getvalue()

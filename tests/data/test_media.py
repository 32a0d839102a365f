from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import pictures
from veneer.core.errors import DataError, UsageError
from veneer.data import images, media
from veneer.data.columns import renamed
from veneer.data.rows import Row
from veneer.data.sources import HELD_OUT_NAMES, TRAIN_NAMES, chosen, read_rows, sources


def row(value: Any, folder: Path | None = None, column: str = "image") -> Row:
    return Row("a.csv:2", {column: value, "label": "x"}, folder)


def test_names_count_from_the_folder_of_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    picture = tmp_path / "data" / "sub" / "1.png"
    picture.write_bytes(pictures.encoded("red"))
    data = tmp_path / "data" / "train.jsonl"
    data.write_text(json.dumps({"image": "sub/1.png", "label": "x"}) + "\n")
    (found,) = read_rows(data)
    assert found.folder == tmp_path / "data"
    assert images.image_file(found) == str(picture)
    assert images.image_file(renamed(Row("a", {"photo": "sub/1.png"}, found.folder), {"image": "photo"})) == str(
        picture
    )
    assert images.image_file(row(str(picture))) == str(picture)
    assert images.image_file(row("sub/../sub/1.png", tmp_path / "data")) == str(picture)
    assert images.image_file(row({"path": "1.png", "bytes": None}, picture.parent)) == str(picture)
    assert images.image_file(row("1.png", picture.parent, "file_name")) == str(picture)


def test_names_of_a_programs_rows_count_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert images.image_file(row("1.png")) == str(tmp_path / "1.png")


def test_bytes_and_images_in_memory_are_kept_with_the_example() -> None:
    content = pictures.encoded("red", kind="JPEG")
    file = images.image_file(row({"bytes": content, "path": "gone.jpg"}))
    assert media.content(file) == content
    assert base64.b64encode(content).decode() in file
    assert media.named(file) == "the file in the row"
    drawn = images.image_file(row(pictures.image("red")))
    shown = images.decoded(media.content(drawn), "a", drawn, 3)
    assert np.array_equal(np.asarray(shown), np.asarray(pictures.image("red")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("../secret.png", r"a\.csv:2 has image = '\.\./secret\.png', which leads out of .*data"),
        ("sub/../../secret.png", "leads out of"),
        ("1.pgn", "no file .*Did you mean.*1.png"),
        ("https://example.org/1.png", "nothing is fetched from the network"),
        ("", "expected the name of a file"),
        (7, "has image = 7; expected the name of a file"),
        ({"path": None, "bytes": None}, "expected the name of a file"),
        (None, "a.csv:2 has no image; its columns are image, label"),
    ],
)
def test_what_names_no_file_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "data" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        images.image_file(row(value, tmp_path / "data"))


def test_images_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    drawn = pictures.image("red")
    exif = drawn.getexif()
    exif[0x0112] = 6  # To be turned by 90 degrees to the right.
    turned = tmp_path / "turned.png"
    drawn.save(turned, exif=exif)
    upright = images.decoded(turned.read_bytes(), "a", "", 3)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(drawn), -1))
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name, made, expected in [
        ("grey.png", Image.fromarray((ramp >> 8).astype("uint8")), ramp >> 8),
        ("deep.png", Image.fromarray(ramp), ramp >> 8),
        ("alpha.png", Image.fromarray((ramp >> 8).astype("uint8")).convert("RGBA"), ramp >> 8),
        ("colours.gif", Image.fromarray((ramp >> 8).astype("uint8")), ramp >> 8),
    ]:
        made.save(tmp_path / name, **({"transparency": 0} if name.endswith("gif") else {}))
        content = (tmp_path / name).read_bytes()
        assert np.array_equal(np.asarray(images.decoded(content, "a", name, 1)), expected), name
        assert np.array_equal(np.asarray(images.decoded(content, "a", name, 3))[..., 1], expected), name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_every_kind_is_read_and_a_truncated_one_is_named(kind: str) -> None:
    content = pictures.encoded("green", kind=kind)
    assert images.encode_image(row({"bytes": content}), [0], 3).more["sha256"]
    with pytest.raises(DataError, match=r"a\.csv:2 has no whole image: the file in the row "):
        images.encode_image(row({"bytes": content[: len(content) * 2 // 3]}), [0], 3)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"not an image at all", "is none of PNG, JPEG")])
def test_what_is_no_image_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.csv:2 has no whole image: '.*1\.png' {message}"):
        images.encode_image(row("1.png", tmp_path), [0], 3)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "1.tiff")
    with pytest.raises(DataError, match="floating-point"):
        images.encode_image(row("1.tiff", tmp_path), [0], 3)


def test_folders_name_the_labels(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "plain", count=2)
    (tmp_path / "plain" / "red" / ".hidden.png").write_bytes(b"")
    found = read_rows(tmp_path / "plain")
    assert [(one.origin, one.values) for one in found] == [
        ("plain/green/0.png", {"image": "green/0.png", "label": "green"}),
        ("plain/green/1.png", {"image": "green/1.png", "label": "green"}),
        ("plain/red/0.png", {"image": "red/0.png", "label": "red"}),
        ("plain/red/1.png", {"image": "red/1.png", "label": "red"}),
    ]
    for name in ("train", "validation", "extra"):
        pictures.folder(tmp_path / "split" / name, count=1)
    split = sources(tmp_path / "split")
    assert [source.name for source in split] == ["extra", "train", "validation"]
    assert [source.name for source in chosen(split, TRAIN_NAMES)] == ["train"]
    assert [source.name for source in chosen(split, HELD_OUT_NAMES)] == ["validation"]
    (source,) = sources(tmp_path / "split" / "train" / "red")
    assert next(iter(source.read())) == Row("red/0.png", {"image": "0.png"}, tmp_path / "split" / "train" / "red")


def test_files_alone_and_by_a_pattern(tmp_path: Path) -> None:
    place = pictures.folder(tmp_path / "a", count=2)
    (found,) = read_rows(place / "red" / "1.png")
    assert found == Row("1.png", {"image": "1.png"}, place / "red")
    assert len(read_rows(str(place / "*" / "*.png"))) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no data files"):
        sources(tmp_path / "empty")


def test_a_table_in_the_folder_names_its_images(tmp_path: Path) -> None:
    place = pictures.folder(tmp_path / "train", count=1)
    (place / "metadata.csv").write_text("file_name,label\nred/0.png,warm\ngreen/0.png,cold\n")
    found = read_rows(tmp_path)
    assert [one.values["label"] for one in found] == ["warm", "cold"]
    assert images.image_file(found[0]) == str(place / "red" / "0.png")

"""Photographs: every kind of file, the part that a model sees, and maps drawn back onto it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from vit_explain_callback.cli.photograph import Box, Photograph, View, image_files, read_image


def view(**options: Any) -> View:
    return View(create_transform(input_size=(3, 224, 224), is_training=False, **options))


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        # Resized to 341 x 256, then cropped to 224 x 224 from (58, 16).
        ({"crop_pct": 0.875}, (640, 480), (58 / 341, 1 / 16, 282 / 341, 15 / 16)),
        ({"crop_pct": 0.875}, (480, 640), (1 / 16, 58 / 341, 15 / 16, 282 / 341)),
        # Resized to 280 x 280, whatever the shape, then cropped.
        ({"crop_pct": 0.8, "crop_mode": "squash"}, (640, 320), (0.1, 0.1, 0.9, 0.9)),
        # The longer side fills the model's image, the shorter is padded.
        ({"crop_pct": 1.0, "crop_mode": "border"}, (640, 320), (0, -0.5, 1, 1.5)),
        ({"crop_pct": 1.0, "crop_mode": "border"}, (30, 300), (-101 / 22, 0, 123 / 22, 1)),
        ({"crop_pct": 1.0}, (2, 2), (0, 0, 1, 1)),
    ],
)
def test_the_box_is_what_the_transform_keeps(options: dict[str, object], size: tuple[int, int], expected: Box) -> None:
    assert view(**options).box(size) == pytest.approx(expected, abs=0.004 * (expected[2] - expected[0] + 1))


def test_a_transform_that_turns_images_is_refused() -> None:
    plain = view(crop_pct=1.0).transform
    with pytest.raises(ValueError, match="upright"):
        View(lambda image: plain(image).flip(-1)).box((300, 300))
    with pytest.raises(ValueError, match="does not show which part it uses"):
        View(lambda image: plain(image) * 0).box((300, 300))


def test_normalisation_is_that_of_the_transform() -> None:
    mean, std = view(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).normalisation
    assert mean == pytest.approx((0.5, 0.4, 0.3), abs=1e-6)
    assert std == pytest.approx((0.2, 0.3, 0.4), abs=1e-6)


def test_every_mode_is_read_as_the_same_grey(tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (20, 1))
    plain = Image.fromarray(grey)
    written = {
        "grey.png": plain,
        "palette.png": plain.convert("P"),
        "rgba.png": plain.convert("RGBA"),
        "two.png": plain.convert("LA"),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "float.tiff": Image.fromarray(grey.astype(np.float32) / 248),
        "cmyk.tiff": plain.convert("RGB").convert("CMYK"),
    }
    for name, image in written.items():
        image.save(tmp_path / name)
        found = np.asarray(read_image(tmp_path / name)).astype(int)
        assert found.shape == (20, 32, 3), name
        expected = grey if name != "float.tiff" else np.round(grey / 248 * 255)
        assert np.abs(found - expected[..., None]).max() <= 1, name
    assert {path.name for path in image_files(tmp_path)} == set(written)


def test_transparency_is_white_and_exif_says_what_is_up(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(read_image(tmp_path / "clear.png")) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    found = np.asarray(read_image(tmp_path / "turned.jpg"))
    assert found.shape == (32, 16, 3)
    assert found[:14].min() > 240
    assert found[18:].max() < 15


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_image_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match=r"a.png cannot be read as an image"):
        read_image(tmp_path / "a.png")


def test_a_cut_off_file_is_no_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    with pytest.raises(OSError, match=r"a.jpg cannot be read"):
        read_image(tmp_path / "a.jpg")


def test_the_map_lies_where_the_model_looked_and_the_rest_is_faint(tmp_path: Path) -> None:
    Image.new("RGB", (640, 320), (100, 100, 100)).save(tmp_path / "a.png")
    photograph, image = Photograph.read(tmp_path / "a.png", view(crop_pct=1.0))
    assert image.shape == (3, 224, 224)
    assert photograph.visible_pixels == pytest.approx((160, 0, 480, 320), abs=2)
    shown = photograph.overlay(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 4.0)
    assert shown.shape == (320, 640, 3)
    assert (shown[:, :155] == 229).all()
    assert (shown[:, 156:163] == 140).all(axis=(0, 2)).sum() == 1
    assert (shown[:, 485:] == 229).all()
    purple = shown[..., 2].astype(int) - shown[..., 1] > 60
    assert purple[5:155, 325:475].all()
    assert not purple[:, :315].any()
    assert not purple[165:].any()


@pytest.mark.parametrize(
    ("size", "shown"), [((3000, 1500), (640, 320)), ((32, 16), (320, 160)), ((500, 400), (500, 400))]
)
def test_pictures_are_of_a_sane_size(tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    photograph, _ = Photograph.read(tmp_path / "a.png", view())
    assert photograph.picture.shape == (shown[1], shown[0], 3)
    assert photograph.size == size

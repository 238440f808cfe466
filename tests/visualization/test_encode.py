"""What is encoded is what was drawn."""

from __future__ import annotations

import gc
import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tests.benchmarks.measure import live_bytes
from vit_explain_callback.visualization.encode import animation, jpeg, png, rendered
from vit_explain_callback.visualization.heatmap import block_heatmap

NOISE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
SMOOTH = np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8)


def test_a_png_file_holds_every_pixel() -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(NOISE)))), NOISE)


def test_a_jpeg_file_is_close() -> None:
    decoded = np.asarray(Image.open(io.BytesIO(jpeg(SMOOTH)))).astype(int)
    assert np.abs(decoded - SMOOTH).max() <= 8


def test_a_figure_becomes_a_picture() -> None:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.patch.set_facecolor("#123456")
    picture = rendered(figure)
    assert picture.shape == (50, 100, 3)
    assert (picture == [0x12, 0x34, 0x56]).all()


def test_a_figure_leaves_next_to_nothing_to_the_collector() -> None:
    """Of 4,000 objects and 1.5 MB of pixels; in a large process it may not look for them for hundreds of snapshots."""
    block_heatmap([[1.0, 0.5]], [0, 1])  # fonts and colours that are kept
    gc.collect()
    gc.disable()
    try:
        before = live_bytes() or 0
        block_heatmap([[1.0, 0.5]], [0, 1])
        left = (live_bytes() or 0) - before
        assert gc.collect() < 500
    finally:
        gc.enable()
    assert left < 200_000


def test_an_animation_shows_every_frame() -> None:
    frames = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 120, 255)]
    with Image.open(io.BytesIO(animation(frames))) as file:
        assert file.n_frames == 3  # type: ignore[attr-defined]
        for index, frame in enumerate(frames):
            file.seek(index)
            assert np.array_equal(np.asarray(file.convert("RGB")), frame)

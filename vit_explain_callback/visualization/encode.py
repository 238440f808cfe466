"""Encode pictures: PNG and JPEG files, figures as pictures, GIF files of several in turn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vit_explain_callback.visualization.overlay import Picture

_MILLISECONDS = 400
_LAST = 2000


def png(picture: Picture) -> bytes:
    """A PNG file of the picture, a tenth larger than the smallest but encoded in a quarter of the time."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=2)
    return file.getvalue()


def jpeg(picture: Picture, quality: int = 85) -> bytes:
    """A JPEG file of the picture: for photographs, where PNG takes two to three times the bytes."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def rendered(figure: Figure) -> Picture:
    """A matplotlib figure as a picture, on white; the figure is taken apart and cannot be drawn again."""
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib leaves it untyped
    canvas.draw()
    picture: Picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    # Its parts refer to one another in circles, which keep them and the canvas's megabyte of pixels until Python looks
    # for such; in a large process that is hundreds of snapshots later.
    for part in figure.findobj():
        vars(part).clear()
    vars(canvas).clear()
    return picture


def animation(frames: Sequence[Picture]) -> bytes:
    """A GIF file of pictures of one size, shown in turn, the last one longest, again and again."""
    # One palette for all, so that a colour means the same in every frame.
    height, width, _ = frames[0].shape
    together = Image.new("RGB", (width, height * len(frames)))
    for index, frame in enumerate(frames):
        together.paste(Image.fromarray(frame), (0, index * height))
    palette = together.quantize(256)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [_MILLISECONDS] * (len(frames) - 1) + [_LAST]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return file.getvalue()

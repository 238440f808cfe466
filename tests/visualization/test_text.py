"""Text in pictures: what fits is kept, from both ends."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from vit_explain_callback.visualization.text import (
    STRIP_HEIGHT,
    _font,
    colour_bar,
    colour_ramp,
    fitting,
    with_strip,
    write,
)

BLACK = np.zeros((24, 36, 3), dtype=np.uint8)
TEXT = "p(Norwegian elkhound) 0.46 $x^2$ …"


@pytest.mark.parametrize("size", [12, 21])
@pytest.mark.parametrize("width", range(0, 400, 13))
def test_the_longest_start_and_end_that_fit_are_kept(width: int, size: int) -> None:
    def elided(kept: int) -> str:
        return f"{TEXT[: kept - kept // 2]}…{TEXT[len(TEXT) - kept // 2 :]}"

    font = _font(size)
    fits = [elided(kept) for kept in range(len(TEXT)) if font.getlength(elided(kept)) <= width]
    whole = font.getlength(TEXT) <= width
    assert fitting(TEXT, width, size) == (TEXT if whole else fits[-1] if fits else "…")


def test_a_very_long_text_is_cut_at_once() -> None:
    start = time.perf_counter()
    assert len(fitting("x" * 20_000, 100)) < 30
    assert time.perf_counter() - start < 1


def test_the_strip_of_text_is_added_below_and_cut_to_the_width() -> None:
    short, long = with_strip(BLACK, "ab"), with_strip(BLACK, "ab" * 50)
    assert short.shape == long.shape == (24 + STRIP_HEIGHT, 36, 3)
    assert (short[:24] == 0).all()
    assert (short[24:] < 128).any()
    assert (long[24:, -1] > 200).all()


def test_letters_stay_within_their_width() -> None:
    canvas = Image.new("RGB", (300, 40), "white")
    write(canvas, "W" * 100, (50, 5), 120, 21)
    columns = np.flatnonzero((np.asarray(canvas) < 250).any(axis=(0, 2)))
    assert columns.min() >= 50
    assert columns.max() <= 170
    assert columns.max() > 140


def test_the_colour_bar_runs_from_nothing_or_from_the_negative_end_to_the_positive_end() -> None:
    assert colour_bar(3.21, 400).shape == (18, 400, 3)
    assert colour_bar(3.21, 40, signed=True, size=20).shape == (30, 40, 3)
    ramp, signed = colour_ramp(256, 1), colour_ramp(511, 1, signed=True)
    assert ramp[0, 0].tolist() == signed[0, 255].tolist() == [204] * 3
    assert np.abs(signed[0, 255:].astype(int) - ramp[0]).max() <= 1
    orange, purple = signed[0, 0].astype(int), signed[0, -1].astype(int)
    assert orange[0] > orange[2]
    assert purple[0] < purple[2]

"""The comparison of designs: its eyes see what they should, and the chosen colours are told apart by all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.overlay_designs import DESIGNS, SIDE, SIGHT, lab, main, seen, table
from vit_explain_callback.visualization.overlay import blend


def test_lab_of_known_colours() -> None:
    # Lindbloom's calculator, sRGB and D65.
    known = {(1, 1, 1): (100, 0, 0), (1, 0, 0): (53.241, 80.092, 67.203), (0, 0, 1): (32.297, 79.188, -107.860)}
    for colour, expected in known.items():
        np.testing.assert_allclose(lab(np.array(colour, dtype=float)), expected, atol=0.02)


def test_every_eye_sees_grey_as_grey_and_the_colour_blind_see_less_of_red_and_green() -> None:
    greys = np.linspace(0, 1, 11)[:, None].repeat(3, axis=1)
    red, green = np.array([0.8, 0.3, 0.1]), np.array([0.45, 0.5, 0.1])
    for name, sight in SIGHT.items():
        np.testing.assert_allclose(seen(greys, sight), greys, atol=1e-4)
        apart = np.linalg.norm(lab(seen(red, sight)) - lab(seen(green, sight)))
        assert (apart > 50) == (name == "all colours")


@pytest.mark.parametrize("sight", ["all colours", "protanopia", "deuteranopia"])
def test_relevance_and_negative_relevance_are_told_apart_by_every_eye(sight: str) -> None:
    grey, values = np.full((5, 9), 0.75), np.linspace(0.2, 1, 9)[None].repeat(5, axis=0)
    positive, negative = (lab(seen(blend(grey, sign * values) / 255, SIGHT[sight])) for sign in (1, -1))
    assert np.linalg.norm(positive - negative, axis=-1).min() > 20


def test_the_chosen_design_keeps_the_photograph_and_shows_every_step() -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    rows = table([photograph])
    assert rows.keys() == {(design, sight) for design in DESIGNS for sight in SIGHT}
    for sight in ("all colours", "protanopia", "deuteranopia"):
        assert rows["chosen", sight]["lightness"] > 60 > 40 > rows["before", sight]["lightness"]
        assert rows["chosen", sight]["step"] > 9  # four times what is just noticeable
        assert rows["chosen", sight]["strongest"] > 60
    assert rows["chosen", "lightness"]["strongest"] > 25


def test_the_script_writes_the_picture_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path / "designs.jpg")])
    with Image.open(tmp_path / "designs.jpg") as picture:
        assert picture.width == (1 + len(DESIGNS)) * SIDE
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(DESIGNS) * len(SIGHT)

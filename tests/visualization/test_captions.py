"""Captions: whose probability it is, what is wrong, what is not known."""

from __future__ import annotations

import pytest
import torch

from vit_explain_callback.visualization.captions import NAME_LENGTH, caption, class_caption, class_name, title

NAMES = ["hexagon", "pentagon", "star"]
P = torch.tensor([0.54, 0.46, 0.004], dtype=torch.float64)


@pytest.mark.parametrize(
    ("prediction", "target", "label", "text"),
    [
        (0, 0, 0, "hexagon · p 0.54"),
        (0, 0, None, "hexagon · p 0.54"),
        (0, 0, -1, "hexagon · p 0.54"),
        (0, 1, 1, "✗ hexagon · p(pentagon) 0.46"),
        (0, 1, None, "hexagon · p(pentagon) 0.46"),
        (0, 1, 0, "hexagon · p(pentagon) 0.46"),
        (0, 0, 2, "✗ hexagon · p 0.54"),
        (0, 2, 2, "✗ hexagon · p(star) 0.00"),
    ],
)
def test_a_caption_says_whose_probability_it_is(prediction: int, target: int, label: int | None, text: str) -> None:
    assert caption(prediction, target, label, P, NAMES) == text
    assert caption(prediction, target, label, P.tolist(), NAMES, "\n") == text.replace(" · ", "\n")


def test_regression_has_nothing_to_say() -> None:
    assert caption(0, 0, None, None, None) == title(None, None, None) == ""


def test_a_probability_stands_beside_its_own_class() -> None:
    for index, name in enumerate(NAMES):
        assert class_caption(index, P, NAMES) == f"{name} · p {P[index].item():.2f}"
        assert caption(index, index, None, P, NAMES) == class_caption(index, P, NAMES)


@pytest.mark.parametrize("names", [None, [], ["cat"], ["cat", ""], ["cat", " \n"]])
def test_a_class_without_a_name_has_its_index(names: list[str] | None) -> None:
    assert class_name(1, names) == "class 1"
    assert class_name(-1, ["cat", "dog"]) == "class -1"


@pytest.mark.parametrize("length", [NAME_LENGTH - 1, NAME_LENGTH, NAME_LENGTH + 1, 500])
def test_an_overlong_name_loses_its_middle(length: int) -> None:
    name = "".join(chr(97 + place % 26) for place in range(length))
    shown = class_name(0, [name])
    assert len(shown) == min(length, NAME_LENGTH)
    if length > NAME_LENGTH:
        head, tail = shown.split("…")
        assert name.startswith(head)
        assert name.endswith(tail)
        assert len(head) - len(tail) in (0, 1)


def test_a_name_stays_on_one_line() -> None:
    assert class_name(0, ["two\nlines\t$x$"]) == "two lines $x$"


def test_a_title_says_what_is_explained_where_that_is_not_the_label() -> None:
    assert title(1, 1, NAMES) == "pentagon"
    assert title(1, 2, NAMES, "\n") == "star\ntarget pentagon"
    assert title(1, None, NAMES) == title(1, -1, NAMES) == "target pentagon"

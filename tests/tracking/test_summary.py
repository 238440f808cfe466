"""The summary in words, against histories made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.attention import BlockStatistics
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot
from vit_explain_callback.tracking.summary import summary

COUNT = 6
GRID = (4, 5)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*(shape or (COUNT, *GRID)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def snapshot(step: int, maps: dict[str, Tensor], classes: list[int], checks: Reliability | None = None) -> Snapshot:
    logits = torch.nn.functional.one_hot(torch.tensor(classes), 3).double() * 4
    return Snapshot(step, Explanation(maps, logits, torch.zeros(COUNT, dtype=torch.long)), checks)


def said_of(run: History, labels: Tensor | None = None, **about: Any) -> list[str]:
    lines = summary(run, Probe(None, [], labels, **about)).splitlines()
    assert len(lines) <= 10
    return lines


def history(*snapshots: Snapshot) -> History:
    found = History()
    for one in snapshots:
        found.add(one)
    return found


def checked(maps: dict[str, Tensor], by: float, gain: float = 0.0, spread: float = 0.1) -> Reliability:
    """Mirrored maps that differ by some noise, and a gain over a random order."""
    signs = torch.tensor([1.0, -1.0] * (COUNT // 2), dtype=torch.float64)
    gains = dict.fromkeys(maps, gain + spread * signs) | {"random": torch.zeros(COUNT, dtype=torch.float64)}
    return Reliability({name: one + by * noise(5) for name, one in maps.items()}, gains)


def run_of(
    moved: dict[str, float], by: float | None = 0.05, gain: float = 0.5, spread: float = 0.1, **about: Any
) -> list[str]:
    """What is said where the maps of some methods move so much between two snapshots."""
    before = {name: noise(index) for index, name in enumerate(moved)}
    after = {name: before[name] + amount * noise(90 + index) for index, (name, amount) in enumerate(moved.items())}
    checks = [None if by is None else checked(maps, by, gain, spread) for maps in (before, after)]
    ends = zip((0, 9), (before, after), checks, strict=True)
    return said_of(history(*(snapshot(step, maps, [0] * COUNT, check) for step, maps, check in ends)), **about)


def test_what_changed_when_and_on_which_images() -> None:
    start = noise(0)
    slightly = start + 0.01 * noise(1)
    later = slightly.clone()
    later[4] = start[4].max() - start[4]  # the ranking turned round
    run = history(
        snapshot(0, {"rollout": start}, [0] * COUNT),
        snapshot(10, {"rollout": slightly}, [0] * COUNT),
        snapshot(20, {"rollout": later}, [0, 0, 0, 0, 2, 0]),
        snapshot(30, {"rollout": later}, [0, 0, 0, 0, 2, 1]),
    )
    lines = said_of(run, torch.zeros(COUNT, dtype=torch.long), class_names=["cat", "dog", "hare"])
    assert "as the noise was not measured (6 images, 4 snapshots, steps 0 to 30)" in lines[0]
    assert "When: most between steps 10 and 20 (rollout)." in lines
    (images,) = [line for line in lines if line.startswith("Images")]
    assert images.startswith("Images: most in image 4 (-1.00, cat, now hare), ")
    assert images.endswith("counted from 0 (rollout).")
    (said,) = [line for line in lines if line.startswith("Predictions")]
    assert said.startswith("Predictions: 2 of 6 changed, accuracy 1.00 → 0.67, target probability 0.96 → ")
    assert "class 0, now class 2" in "\n".join(said_of(run))


@pytest.mark.parametrize(
    ("moved", "first"),
    [
        (
            {"rollout": 0.5},
            "The model changed where it looks, by more than noise (shift, grain), in the maps of rollout (",
        ),
        (
            {"rollout": 0.0005},
            "The model looks where it looked before: the maps changed by no more than noise (shift, grain) (",
        ),
        (
            {"a": 0.5, "b": 0.0005},
            "The model changed where it looks, by more than noise (shift, grain), in the maps of a, not in th",
        ),
        ({"a": 0.5, "b": 0.5}, "The model changed where it looks, by more than noise (shift, grain), in the maps of "),
    ],
)
def test_the_first_line_says_whether_the_change_is_more_than_noise(moved: dict[str, float], first: str) -> None:
    assert run_of(moved)[0].startswith(first)


MORE = "The model changed where it looks, by more than noise (shift, grain), in the maps of rollout"
LESS = "The model looks where it looked before: the maps changed by no more than noise (shift, grain)"
UNCLEAR = "The maps changed; whether by more than noise cannot be told, as it is about as much as noise"


def test_more_than_noise_is_a_paired_comparison() -> None:
    """By hand: Student's interval of each image's own difference, to either side; inside it nothing is said."""
    seen = set()
    for amount in torch.linspace(0.002, 0.12, 16, dtype=torch.float64).tolist():
        before, after = noise(0), noise(0) + amount * noise(90)
        of_mirror = [scipy.stats.spearmanr(*pair)[0] for pair in pairs(before, before + 0.05 * noise(5))]
        of_drift = [scipy.stats.spearmanr(*pair)[0] for pair in pairs(before, after)]
        further = np.array(of_mirror) - np.array(of_drift)
        errors = further.mean() / (scipy.stats.t.ppf(0.975, COUNT - 1) * further.std(ddof=1) / COUNT**0.5)
        expected = MORE if errors > 1 else LESS if errors <= -1 else UNCLEAR
        assert run_of({"rollout": amount})[0].startswith(expected), amount
        seen.add(expected)
    assert seen == {MORE, LESS, UNCLEAR}


def pairs(one: Tensor, other: Tensor) -> list[tuple[Any, Any]]:
    return list(zip(one.flatten(1).numpy(), other.flatten(1).numpy(), strict=True))


def test_drift_stands_on_its_scale_and_the_most_changed_method_first() -> None:
    lines = run_of({"still": 0.0005, "moved": 0.5})
    assert lines[1].startswith("  moved: rank correlation with the baseline 0.")
    assert "% of the way from noise (0.9" in lines[1]
    assert lines[2].startswith("  still: rank correlation with the baseline 1.00; noise 1.00, another image -0.0")


def test_trust_is_a_gain_over_a_random_order() -> None:
    def trust(gain: float) -> str:
        return next(line for line in run_of({"rollout": 0.5}, gain=gain) if "trusted" in line)

    assert trust(0.5).endswith("? more faithful than chance: rollout (+0.50 ± 0.11).")
    assert trust(0.1).endswith("? not told from chance: rollout (+0.10 ± 0.11).")
    assert not [line for line in run_of({"rollout": 0.5}, by=None) if "trusted" in line]


def test_regions_and_blocks() -> None:
    left, right = torch.zeros(COUNT, 8, 10, dtype=torch.bool), torch.zeros(COUNT, 8, 10, dtype=torch.bool)
    left[:, :, :2], right[:, :, 8:] = True, True
    before, after = noise(0) * 0.01, noise(1) * 0.01
    before[:, :, 0], after[:, :, 4] = 1, 1
    one, other = noise(2, COUNT, 3, *GRID), noise(2, COUNT, 3, *GRID)
    other[:, 1] = noise(3)
    rest = [torch.zeros(COUNT, 3)] * 5
    snapshots = [snapshot(0, {"rollout": before}, [0] * COUNT), snapshot(5, {"rollout": after}, [0] * COUNT)]
    snapshots = [
        Snapshot(s.step, replace(s.explanation, blocks=BlockStatistics(rows, rows, *rest)))
        for s, rows in zip(snapshots, (one, other), strict=True)
    ]
    empty = torch.zeros(COUNT, 8, 10, dtype=torch.bool)
    text = "\n".join(said_of(history(*snapshots), regions={"left": left, "right": right, "nowhere": empty}))
    lift = "Regions (lift, 1 = their share of the image, rollout): "
    assert f"{lift}right 0.0 → 4.9, left 4.9 → 0.0." in text or f"{lift}left 4.9 → 0.0, right 0.0 → 4.9." in text
    assert "Blocks: attention changed most in block 2 of 3" in text


def of_corner(factor: float, images: int = COUNT) -> list[str]:
    """What is said where the strongest patch, in the corner, grows by a factor, which leaves the order as it was."""
    corner = torch.zeros(COUNT, 8, 10, dtype=torch.bool)
    corner[:, :2, :2] = True
    before = noise(0)
    before[:, 0, 0] = 1.5
    after = before.clone()
    after[:images, 0, 0] *= factor
    ends = zip((0, 9), (before, after), strict=True)
    snapshots = [snapshot(step, {"a": each}, [0] * COUNT, checked({"a": each}, 0.05)) for step, each in ends]
    return said_of(history(*snapshots), regions={"corner": corner})


def test_a_region_that_gains_is_a_change_whatever_the_order() -> None:
    lines = of_corner(20)
    assert lines[0].startswith(
        "The model changed where it looks: the lift of corner at least doubled or halved in the maps of a (6 images"
    )
    assert "Regions (lift, 1 = their share of the image, a): corner 2.8 → 15.2." in lines
    assert lines[1].startswith("  a: rank correlation with the baseline 1.00")
    assert of_corner(1.001)[0].startswith(LESS)
    assert of_corner(1.5)[0].startswith(LESS)  # on all images, but by less than twice
    assert of_corner(50, images=2)[0].startswith(LESS)  # twice the mean, but on two images of six


def test_a_method_of_which_it_is_not_clear_is_not_called_unchanged() -> None:
    assert run_of({"still": 0.0005, "unsure": 0.05})[0].startswith(
        "The maps of still changed by no more than noise (shift, grain); of unsure it is not clear (6 images"
    )


def test_where_nothing_that_is_taken_away_matters_trust_is_not_known() -> None:
    (line,) = [line for line in run_of({"a": 0.5}, gain=0.002, spread=0.001) if "trusted" in line]
    assert line.startswith("Can the maps be trusted? Not known, as the target's probability does not depend on the")
    assert line.endswith("try the other `removal`.")


def test_maps_that_nothing_can_be_measured_of() -> None:
    zero = {"rollout": torch.full((COUNT, *GRID), math.nan)}
    checks = Reliability(zero, {name: torch.full((COUNT,), math.nan) for name in ("rollout", "random")})
    lines = said_of(history(snapshot(0, zero, [0] * COUNT, checks), snapshot(1, zero, [0] * COUNT, checks)))
    assert lines[0].startswith("Whether the model changed where it looks cannot be told: the maps are degenerate")
    assert "  rollout: no drift can be measured, the maps are degenerate" in lines
    assert "Can the maps be trusted (SRG over a random order, 0 images)? not known: rollout." in lines
    assert "nan" not in "\n".join(lines)


def test_many_methods_are_cut_to_ten_lines() -> None:
    lines = run_of({f"rollout_from{i}": 0.5 for i in range(1, 13)})
    assert len(lines) == 10
    assert [line for line in lines if line.endswith("more methods")] == [lines[-4]]
    assert "and 9 more" in lines[0]


def test_noise_as_large_as_what_another_image_gives_tells_nothing() -> None:
    assert "cannot be told, as noise moves the maps as far as another image does (" in run_of({"a": 0.3}, by=50)[0]


def test_one_image_is_too_few() -> None:
    def one(step: int, seed: int) -> Snapshot:
        maps = {"rollout": noise(seed, 1, *GRID)}
        explanation = Explanation(maps, torch.tensor([[1.0, 2.0]]), torch.zeros(1, dtype=torch.long))
        return Snapshot(step, explanation, Reliability(maps, {"rollout": torch.ones(1), "random": torch.zeros(1)}))

    lines = said_of(history(one(0, 0), one(3, 1)))
    assert "cannot be told, as one image is too few (1 image, 2 snapshots, steps 0 to 3)." in lines[0]
    assert "nan" not in "\n".join(lines)


def test_one_snapshot_alone_has_nothing_to_compare() -> None:
    lines = said_of(history(snapshot(3, {"rollout": noise(0)}, [0] * COUNT)))
    assert lines == ["Whether the model changed where it looks is not known: there is one snapshot only, at step 3."]


def test_of_maps_that_did_not_change_nothing_else_is_said() -> None:
    lines = run_of({"rollout": 0.0}, by=None)
    assert lines[0].startswith("The model looks where it looked before: the order of the patches is the same (")
    assert not [line for line in lines if line.startswith(("When", "Images", "Blocks"))]


def test_labels_that_are_not_known_do_not_count() -> None:
    unknown = torch.full((COUNT,), -1)
    run = history(*(snapshot(step, {"rollout": noise(step)}, [0, 0, 0, 1, 1, 1]) for step in (0, 1)))
    assert "accuracy" not in "\n".join(said_of(run, unknown))
    unknown[0] = 0
    assert "accuracy 1.00 → 1.00" in "\n".join(said_of(run, unknown))


def test_quantities_are_no_classes() -> None:
    run = history(*(snapshot(step, {"rollout": noise(step)}, [0] * COUNT) for step in (0, 1)))
    text = "\n".join(said_of(run, regression=True))
    assert "Output: mean 4 → 4." in text
    assert not [word for word in ("class", "accuracy", "probability", "rediction") if word in text]

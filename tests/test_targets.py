"""A class is named by any integer, of Python, numpy or torch; what is none is refused, and nothing is passed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import random_images, tiny_vit
from vit_explain_callback import ViTExplainCallback, explain
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking.probe import Probe

IMAGES = random_images(2)
INTEGERS = [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)]
OTHERS = [
    True,
    np.True_,
    torch.tensor(True),
    2.0,
    np.float32(2),
    torch.tensor(2.0),
    "2",
    [2, 2],
    torch.tensor([2.0, 2]),
]


def tracker(target: Any) -> ExplanationTracker:
    return ExplanationTracker(Explainer(tiny_vit(), ["grad_rollout"]), Probe.of(IMAGES), target=target, checks=None)


@pytest.mark.parametrize("target", INTEGERS, ids=repr)
def test_every_integer_names_a_class(target: Any) -> None:
    expected = explain(tiny_vit(), IMAGES, ["grad_rollout"], target=torch.tensor([2, 2]))
    found = explain(tiny_vit(), IMAGES, ["grad_rollout"], target=target)
    assert found.target.tolist() == [2, 2]
    assert found.maps["grad_rollout"].equal(expected.maps["grad_rollout"])
    assert ViTExplainCallback(target=target).settings.target == 2
    tracked = tracker(target)
    tracked.observe(0)
    assert tracked.history.baseline.target.tolist() == [2, 2]


@pytest.mark.parametrize("target", OTHERS, ids=repr)
def test_what_is_no_integer_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="Expected `target`"):
        explain(tiny_vit(), IMAGES, target=target)
    with pytest.raises((TypeError, ValueError), match="Expected `target`"):
        ViTExplainCallback(target=target)
    with pytest.raises(TypeError, match="Expected `target`"):
        tracker(target)


def test_a_class_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `target` to be .* of at least 0, but got -1"):
        ViTExplainCallback(target=-1)
    for target in (torch.tensor([1]), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match=r"Expected `target` of shape \(2,\)"):
            tracker(target)


def test_another_target_after_resuming_is_said_and_begins_anew() -> None:
    first = tracker(2)
    first.observe(0)
    other, same = tracker(3), tracker(torch.tensor([2, 2]))
    with pytest.warns(UserWarning, match="are of another `target` than this run's, so a new baseline is taken"):
        other.load_state_dict(first.state_dict())
    other.observe(1)
    assert (other.history.count, other.history.baseline.target.tolist()) == (1, [3, 3])
    same.load_state_dict(first.state_dict())
    assert same.history.count == 1

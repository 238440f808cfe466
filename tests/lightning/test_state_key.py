"""Keys of the callbacks' states: others for other options, the same for the same in another process."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import random_images
from tests.processes import python
from vit_explain_callback import AttentionRollout, MapFunction, ViTExplainCallback
from vit_explain_callback.lightning.settings import MODEL_OPTIONS
from vit_explain_callback.lightning.state_key import in_words
from vit_explain_callback.metrics.drift import DriftMetric

IMAGES, LABELS = random_images(2), torch.tensor([0, 1])
MASKS = torch.ones(2, 32, 32, dtype=torch.bool)


def saliency(model: Any, images: Tensor, target: Tensor) -> Tensor:
    return images.mean(dim=1)


def measure(maps: Tensor, reference: Tensor, power: int = 2) -> Tensor:
    return ((maps - reference) ** power).sum(dim=(1, 2))


class Forward:
    def __init__(self, scale: float) -> None:
        self.scale, self.words = scale, {"a", "b", "c"}

    def __call__(self, module: Any, images: Tensor) -> Any:
        return module(images) * self.scale

    def method(self, module: Any, images: Tensor) -> Any:
        return module(images) + self.scale


def closing_over(scale: float) -> Any:
    return lambda module, images: module(images) * scale


def options() -> list[dict[str, Any]]:
    """Each unlike the others in one option or a part of it."""
    return [
        {},
        *(
            {"methods": methods}
            for methods in (["rollout"], ["chefer"], ["rollout", "chefer"], [AttentionRollout("max")])
        ),
        {"methods": [MapFunction("mine", saliency)]},
        {"methods": [MapFunction("mine", lambda model, images, target: images.amax(dim=1))]},
        {"methods": [MapFunction("mine", partial(saliency))]},
        *({"every_n_epochs": epochs} for epochs in (1, 2)),
        *({"every_n_steps": steps} for steps in (1, 20)),
        *({"checks": every} for every in (1, None)),
        *({"checks": {"removal": removal}} for removal in ("tokens", "mean_colour")),
        *({"num_images": count} for count in (8, np.int64(9))),
        *({"images": images} for images in (IMAGES, IMAGES + 1, (IMAGES, LABELS), (IMAGES, 1 - LABELS), IMAGES[:1])),
        {"images": IMAGES.double()},
        *({"images": IMAGES, "regions": {name: masks}} for name, masks in (("a", MASKS), ("b", MASKS), ("a", ~MASKS))),
        {"images": IMAGES, "regions": {"a": MASKS, "b": ~MASKS}},
        *({"num_shown": count} for count in (1, 2)),
        *({"target": target} for target in ("prediction", 0, 1, np.int64(2))),
        {"detail": {"block_statistics": False}},
        *({"metrics": metrics} for metrics in (["cosine"], ["top10_iou"], [DriftMetric("mine", measure, 0)])),
        {"metrics": [DriftMetric("mine", partial(measure, power=3), 0)]},
        {"metrics": [DriftMetric("mine", measure, 1)]},
        *({"vit": path} for path in ("net", "teacher")),
        *({"class_names": names} for names in (["a", "b"], ["b", "a"])),
        *({"normalisation": (mean, [1.0] * 3)} for mean in ([0.5] * 3, [0.25] * 3)),
        {"normalisation": ([0.5] * 3, [0.5] * 3)},
        *({"forward": forward} for forward in (Forward(1).method, Forward(2).method, Forward(1), Forward(2))),
        *(
            {"forward": forward}
            for forward in (closing_over(1), closing_over(2), lambda m, x: m.a(x), lambda m, x: m.b(x))
        ),
        {"forward": lambda m, x, scale=1: m(x) * scale},
        {"forward": lambda m, x, scale=2: m(x) * scale},
        *({"prefix_tokens": tokens} for tokens in (0, 1)),
        *({"grid_size": grid} for grid in ((4, 4), [2, 8])),
        *({"batch_size": size} for size in (1, 2)),
        {"save_maps": False},
        *({"detail": {name: False}} for name in ("page", "margin_charts")),
        {"detail": "full"},
        *({"detail": {"max_pictures_mb": size}} for size in (1, 0.5)),
        {"on_error": "raise"},
        *({"task": task} for task in ("classification", "multilabel", "regression")),
    ]


def keys() -> list[str]:
    return [ViTExplainCallback(**each).state_key for each in options()]


def test_every_option_makes_a_key_of_its_own() -> None:
    found = keys()
    for (one, first), (other, second) in itertools.combinations(zip(options(), found, strict=True), 2):
        assert first != second, (one, other)
    assert not [key for key in found if " at 0x" in key or len(key) > 600]
    named = {name for each in options() for name in each}
    assert named == (set(ViTExplainCallback.__init__.__annotations__) | set(MODEL_OPTIONS)) - {
        "return",
        "model_options",
    }


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_same_options_make_the_same_key_in_another_process(seed: str) -> None:
    source = "from tests.lightning.test_state_key import keys; print('\\n'.join(keys()))"
    done = python("-c", source, environment={"PYTHONHASHSEED": seed})
    assert done.stdout.splitlines() == keys(), done.stderr


def test_defaults_keep_the_short_key_however_they_are_given() -> None:
    assert ViTExplainCallback().state_key == "ViTExplainCallback"
    given: dict[str, Any] = {"methods": ("rollout", "grad_rollout"), "num_images": np.int64(16), "metrics": []}
    assert ViTExplainCallback(**given).state_key == "ViTExplainCallback"
    assert ViTExplainCallback(["rollout"]).state_key == "ViTExplainCallback{'methods': ['rollout']}"
    assert ViTExplainCallback(target=3, vit="net").state_key == "ViTExplainCallback{'target': '3', 'vit': 'net'}"
    grids: list[Any] = [[4, 4], (4, 4), (np.int64(4), 4)]
    assert len({ViTExplainCallback(grid_size=grid).state_key for grid in grids}) == 1


def test_what_has_no_words_of_its_own() -> None:
    class Slotted:
        __slots__ = ("a", "b")

        def __init__(self, a: Any) -> None:
            self.a = a

    loop: list[Any] = []
    loop.append(loop)
    assert in_words(Slotted(1)) != in_words(Slotted(2))
    assert in_words(loop) == in_words([[[[[]]]]]) or "list" in in_words(loop)
    assert in_words(object()) == in_words(object())
    assert in_words(torch.zeros(2, device="meta")) == in_words(torch.zeros(2, device="meta"))
    assert in_words(np.array([None, "a"])) == "array"
    assert in_words(torch.eye(3).to_sparse()) == in_words(torch.eye(3).to_sparse())

"""Labels as the loss takes them: classes of every coding, and numbers that are no classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.situations.check import check
from tests.situations.project import COUNT, LABELS, Project, loader
from tests.situations.situation import NO_THREAD, Situation


class Binary(Project):
    def __init__(self) -> None:
        super().__init__(num_classes=1)

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.binary_cross_entropy_with_logits(self(images).squeeze(1), labels.float())


class Age(Project):
    def __init__(self) -> None:
        super().__init__(num_classes=1)

    def step(self, batch: Any) -> Tensor:
        images, ages = batch
        return nn.functional.mse_loss(self(images).squeeze(1), ages.float() / 100)


class TwoNumbers(Project):
    def __init__(self) -> None:
        super().__init__(num_classes=2)

    def step(self, batch: Any) -> Tensor:
        return nn.functional.smooth_l1_loss(self(batch[0]), batch[1])


class Ignoring(Project):
    def __init__(self, ignored: int) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(ignore_index=ignored)

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self.loss(self(batch[0]), batch[1])
        return loss


class FromOne(Project):
    def step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1] - 1)


def halves(module: Any, fed: Tensor) -> Tensor:
    """One logit z as two classes whose softmax is the sigmoid of z."""
    z = module.vit(fed)
    return torch.cat([-z / 2, z / 2], dim=1)


SITUATIONS = {
    "boolean labels": Situation(
        source="torcheval#135",
        before="every snapshot failed: booleans cannot be rounded",
        module=Binary,
        validation=lambda: loader(labels=[index % 3 == 0 for index in range(COUNT)]),
        labels=[int(index % 3 == 0) for index in range(COUNT)],
        logits=halves,
    ),
    "regression of an age": Situation(
        source="vision_transformer#79",
        before="stopped: the age was taken for a class",
        module=Age,
        validation=lambda: loader(labels=[20 + index for index in range(COUNT)]),
        labels=None,
        kind="numbers",
    ),
    "regression of two numbers": Situation(
        source="vision_transformer#79",
        before="explained the larger number as if it were a class",
        module=TwoNumbers,
        validation=lambda: loader(labels=torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(2))),
        labels=None,
        kind="numbers",
    ),
    "labels from 1": Situation(
        source=NO_THREAD,
        before="stopped: a target out of range; maps of the next class",
        module=FromOne,
        validation=lambda: loader(labels=[label + 1 for label in LABELS]),
    ),
}
for ignored in (-1, -100, 255):
    SITUATIONS[f"label {ignored} where there is none"] = Situation(
        source=NO_THREAD,
        before="stopped: a target out of range",
        module=lambda ignored=ignored: Ignoring(ignored),  # type: ignore[misc]
        validation=lambda ignored=ignored: loader(  # type: ignore[misc]
            labels=[ignored if index % 4 == 0 else label for index, label in enumerate(LABELS)]
        ),
        labels=[-1 if index % 4 == 0 else label for index, label in enumerate(LABELS)],
    )


@pytest.mark.parametrize("name", SITUATIONS)
def test_labels_are_those_of_the_loss(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)

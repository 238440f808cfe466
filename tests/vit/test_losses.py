"""What a loss is computed of: logits and labels of every loss function, and of losses written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import random_images, tiny_vit
from vit_explain_callback.vit.look import look
from vit_explain_callback.vit.losses import LossWatcher
from vit_explain_callback.vit.twin import Twin

LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 4])
ONE_HOT = F.one_hot(LABELS, 5).float()

CLASSES: dict[str, Callable[[Tensor], object]] = {
    "cross_entropy": lambda z: F.cross_entropy(z, LABELS),
    "by keywords": lambda z: F.cross_entropy(input=z, target=LABELS, label_smoothing=0.1),
    "the module": lambda z: nn.CrossEntropyLoss()(z, LABELS),
    "a distribution": lambda z: F.cross_entropy(z, ONE_HOT * 0.9 + 0.02),
    "nll of log_softmax": lambda z: F.nll_loss(F.log_softmax(z, dim=1), LABELS),
    "by hand": lambda z: -z.log_softmax(dim=1).gather(1, LABELS[:, None]).mean(),
    "margin": lambda z: F.multi_margin_loss(z, LABELS),
    "one of several, yes or no": lambda z: F.binary_cross_entropy_with_logits(z, ONE_HOT),
    "after a sigmoid": lambda z: F.binary_cross_entropy(z.sigmoid(), ONE_HOT),
}


@pytest.mark.parametrize("name", CLASSES)
def test_logits_and_labels_are_those_of_the_loss(name: str) -> None:
    with LossWatcher() as watcher:
        CLASSES[name](LOGITS)
    found = watcher.losses[0]
    assert found.outputs is LOGITS
    assert found.labels is not None
    assert found.labels.equal(LABELS)
    assert not found.regression
    assert found.is_of(4)


def test_labels_that_the_logits_do_not_know_are_unknown() -> None:
    with LossWatcher() as watcher:
        F.cross_entropy(LOGITS, torch.tensor([-100, 3, 1, 4]))
        F.cross_entropy(LOGITS, torch.tensor([255, 3, 1, 4]), ignore_index=255)
        F.binary_cross_entropy_with_logits(LOGITS, torch.ones(4, 5))
        F.binary_cross_entropy_with_logits(LOGITS[:, 0], torch.tensor([0.0, 1.0, 1.0, 0.0]))
    labels = [loss.labels.tolist() for loss in watcher.losses if loss.labels is not None]
    assert labels == [[-1, 3, 1, 4], [-1, 3, 1, 4], [-1] * 4, [0, 1, 1, 0]]


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_quantities_come_after_classes(loss: Any) -> None:
    ages = LOGITS[:, :1]
    with LossWatcher() as watcher:
        loss(ages, torch.rand(4, 1))
        F.cross_entropy(LOGITS, LABELS)
    assert [found.regression for found in watcher.losses] == [False, True]
    assert watcher.losses[1].outputs is ages
    assert watcher.losses[1].labels is None


def test_probabilities_are_traced_back_to_logits() -> None:
    probabilities = LOGITS.sigmoid().detach()
    with LossWatcher() as watcher:
        F.binary_cross_entropy(probabilities, ONE_HOT)
    torch.testing.assert_close(watcher.losses[0].outputs, LOGITS)


class Two(nn.Module):
    """A teacher beside a student, whose images are enlarged on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = tiny_vit(seed=1), tiny_vit(seed=2)
        self.frozen = True

    def step(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            taught = self.teacher(images)
        logits = self.student(F.interpolate(images[:, :, ::2, ::2], size=32))
        return F.cross_entropy(logits, taught.argmax(dim=1)) + (0 if self.frozen else taught.sum())


def test_the_vit_is_the_one_that_the_loss_comes_from() -> None:
    twin: Any = Twin().copy(Two())
    images = random_images(4)
    seen = look(twin, lambda: twin.step(images))
    assert (seen.vit, seen.feed) == ("student", "student")
    assert seen.fed is not None
    assert seen.fed.equal(F.interpolate(images[:, :, ::2, ::2], size=32))
    assert seen.error is None
    assert len(seen.losses) >= 1


def test_a_run_that_fails_tells_what_was_seen_and_why() -> None:
    twin: Any = Twin().copy(Two())

    def run() -> None:
        twin.step(random_images(4))
        raise KeyError("optimizer")

    seen = look(twin, run)
    assert isinstance(seen.error, KeyError)
    assert seen.vit == "student"
    assert seen.losses[0].is_of(4)


def test_numbers_leave_torch_as_in_a_validation_step() -> None:
    """There gradients are off, so that `numpy()` works and `float()` does not warn."""
    logits = torch.randn(3, 2, requires_grad=True)
    with LossWatcher() as watcher:
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 0]))
        assert float(loss) == loss.item()
        assert logits.numpy().shape == np.asarray(logits).shape == (3, 2)
    assert watcher.losses[0].outputs is logits

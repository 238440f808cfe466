"""Which losses count: outputs are the trained model's, of images alone, and labels come from the batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_explain_callback.vit.losses import TRAINED, WEIGHTS, Loss, LossRecorder

IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 2, 0])
HEAD = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def recorded(
    step: Callable[[Tensor, Tensor], object], labels: Tensor = LABELS, frozen: Tensor | None = None
) -> Loss | None:
    """The loss that counts of a step which is given the logits of images, and labels."""
    recorder, images, labels = LossRecorder(), IMAGES.clone(), labels.clone()
    head = HEAD.clone()
    recorder.give([images, labels])
    recorder.needs_labels = recorder.needs_training = True
    recorder.flow.mark_lasting([head], WEIGHTS | TRAINED)
    if frozen is not None:
        recorder.flow.mark_lasting([frozen], WEIGHTS)
    with recorder:
        recorder.returned |= recorder.flow.of(step(images.flatten(1) @ head, labels))
    assert recorder.failure is None
    return recorder.best(5)[1]


def arcface(cosines: Tensor, labels: Tensor) -> Tensor:
    angles = cosines.clamp(-0.999, 0.999).acos() + 0.5 * F.one_hot(labels, 3)
    return F.cross_entropy(30 * angles.cos(), labels)


def cosface(cosines: Tensor, labels: Tensor) -> Tensor:
    margins = torch.zeros_like(cosines).scatter_(1, labels[:, None], 0.35)
    return F.cross_entropy(30 * (cosines - margins), labels)


def cosface_by_index(cosines: Tensor, labels: Tensor) -> Tensor:
    cosines[torch.arange(len(labels)), labels] -= 0.35
    return F.cross_entropy(30 * cosines, labels)


def ldam(logits: Tensor, labels: Tensor) -> Tensor:
    margins = torch.tensor([0.5, 0.3, 0.2])[labels]
    return F.cross_entropy(torch.where(F.one_hot(labels, 3).bool(), logits - margins[:, None], logits), labels)


@pytest.mark.parametrize("loss", [arcface, cosface, cosface_by_index, ldam])
def test_outputs_that_labels_have_a_share_in_are_not_what_the_model_says(loss: Any) -> None:
    assert recorded(loss) is None


def rows_with_a_label(logits: Tensor, labels: Tensor) -> Tensor:
    known = labels >= 0
    return F.cross_entropy(logits[known], labels[known])


@pytest.mark.parametrize(
    "step",
    [
        lambda logits, labels: F.cross_entropy(logits, labels),
        lambda logits, labels: F.cross_entropy(logits, torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)),
        lambda logits, labels: F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float()),
        lambda logits, labels: F.cross_entropy(logits, torch.tensor(labels.tolist())),
        lambda logits, labels: F.cross_entropy(logits, torch.tensor([2, 1, 0])[labels]),
        rows_with_a_label,
    ],
)
def test_labels_are_made_of_the_batch(step: Any) -> None:
    found = recorded(step)
    assert found is not None
    assert found.task == "classification"
    assert found.labels is not None
    assert found.labels.equal(LABELS) or found.labels.equal(2 - LABELS)


@pytest.mark.parametrize(
    "step",
    [
        lambda logits, _: F.cross_entropy(logits, torch.zeros(5, dtype=torch.long)),  # as MoCo has it
        lambda logits, _: F.cross_entropy(logits, torch.arange(5) % 3),  # as where rotations are told apart
        lambda logits, _: F.cross_entropy(logits, logits.argmax(1)),
        lambda logits, _: F.cross_entropy(logits, torch.tensor(logits.argmax(1).tolist())),
        lambda logits, labels: F.cross_entropy(logits, torch.tensor((logits.argmax(1) + 0 * labels).tolist())),
    ],
)
def test_what_is_no_label_of_the_batch_is_none(step: Any) -> None:
    assert recorded(step) is None


def test_a_frozen_teacher_is_not_explained() -> None:
    teacher = torch.randn(12, 3)

    def step(logits: Tensor, labels: Tensor) -> Tensor:
        F.cross_entropy(IMAGES.flatten(1) @ teacher, labels)
        return F.cross_entropy(logits, labels)

    found = recorded(step, frozen=teacher)
    assert found is not None
    assert found.outputs.equal(IMAGES.flatten(1) @ HEAD)

    recorder = LossRecorder()
    images, labels = IMAGES.clone(), LABELS.clone()
    recorder.give([images, labels])
    recorder.needs_training = True
    recorder.flow.mark_lasting([teacher], WEIGHTS)
    with recorder:
        F.cross_entropy(images.flatten(1) @ teacher, labels)
    assert recorder.best(5)[1] is None


@pytest.mark.parametrize("loss", [F.soft_margin_loss, lambda z, y: F.binary_cross_entropy_with_logits(z, (y + 1) / 2)])
def test_signs_are_yes_and_no(loss: Any) -> None:
    signs = torch.tensor([1.0, -1, -1, 1, -1])
    found = recorded(lambda logits, labels: loss(logits[:, 0], labels), signs)
    assert found is not None
    assert found.task == "classification"
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.mse_loss(z.sigmoid(), y),
        lambda z, y: (z.sigmoid() - y).square().mean(),
        F.binary_cross_entropy_with_logits,
        lambda z, y: F.binary_cross_entropy(z.sigmoid(), y),
    ],
)
def test_shares_of_one_are_quantities_and_no_classes(loss: Any) -> None:
    """As a quality between 0 and 1 is, whatever loss it is learned by."""
    shares = torch.tensor([0.1, 0.72, 0.33, 0.95, 0.5])
    found = recorded(lambda logits, labels: loss(logits[:, 0], labels), shares)
    assert found is not None
    assert (found.task, found.labels) == ("regression", None)


def test_outputs_are_kept_as_the_loss_was_given_them() -> None:
    """As where a step clamps them in place afterwards."""

    def step(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            logits.mul_(0)
        return loss

    found = recorded(step)
    assert found is not None
    assert found.values.equal(IMAGES.flatten(1) @ HEAD)


@pytest.mark.parametrize("same", [Tensor.float, Tensor.contiguous, Tensor.detach, lambda w: w.to(torch.float32)])
def test_no_weak_reference_to_a_weight_is_left(same: Callable[[Tensor], Tensor]) -> None:
    """It would keep `swap_tensors` from working, also where an operation gives the weight itself back."""
    recorder, weight = LossRecorder(), nn.Parameter(torch.ones(3))
    recorder.flow.mark_lasting([weight], WEIGHTS)
    with recorder:
        same(weight)
    assert weakref.getweakrefs(weight) == []


def test_rows_that_a_mask_of_labels_picks_are_rows_of_all_outputs() -> None:
    found = recorded(lambda logits, labels: F.cross_entropy(logits[labels != 1], labels[labels != 1]))
    assert found is not None
    assert found.outputs.equal(IMAGES.flatten(1) @ HEAD)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2, -1, 2, 0]

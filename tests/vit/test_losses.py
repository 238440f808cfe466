"""What a loss is computed of: logits and labels of every loss function, and of losses written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from tests.models import random_images, tiny_vit
from vit_explain_callback.isolation.twin import Twin
from vit_explain_callback.vit.locate import locate_vit
from vit_explain_callback.vit.losses import BUFFERS, IMAGES, WEIGHTS, Loss, LossRecorder
from vit_explain_callback.vit.sources import Flow

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
    "by hand, one-hot": lambda z: -(ONE_HOT * F.log_softmax(z, dim=-1)).sum(dim=1).mean(),
    "by hand, indexed": lambda z: -F.log_softmax(z, dim=-1)[torch.arange(4), LABELS].mean(),
    "by hand, a mask": lambda z: -F.log_softmax(z, dim=-1)[ONE_HOT.bool()].mean(),
    "by hand, logsumexp": lambda z: (z.logsumexp(dim=1) - z.gather(1, LABELS[:, None])[:, 0]).mean(),
    "by hand, log of a softmax": lambda z: -((z.softmax(dim=1) + 1e-8).log() * ONE_HOT).sum(dim=1).mean(),
    "by hand, einsum": lambda z: -torch.einsum("bc,bc->b", z.log_softmax(dim=1), ONE_HOT).mean(),
    "focal": lambda z: (1 - z.softmax(1).gather(1, LABELS[:, None])).pow(2).mean(),
    "Brier": lambda z: ((z.softmax(dim=1) - ONE_HOT) ** 2).sum(dim=1).mean(),
    "Brier by mse_loss": lambda z: F.mse_loss(z.softmax(dim=1), ONE_HOT),
    "timm's soft targets": lambda z: SoftTargetCrossEntropy()(z, ONE_HOT * 0.9 + 0.02),
    "timm's smoothing": lambda z: LabelSmoothingCrossEntropy(0.1)(z, LABELS),
    "timm's binary": lambda z: BinaryCrossEntropy()(z, LABELS),
    "Kullback-Leibler": lambda z: F.kl_div(F.log_softmax(z, dim=1), ONE_HOT * 0.9 + 0.02, reduction="batchmean"),
}

AGES = torch.rand(4, 1, generator=torch.Generator().manual_seed(1)) * 80
QUANTITIES: dict[str, Callable[[Tensor], object]] = {
    "mse_loss": lambda z: F.mse_loss(z, AGES),
    "l1_loss": lambda z: F.l1_loss(z, AGES),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z, AGES),
    "huber_loss": lambda z: F.huber_loss(z, AGES),
    "by hand": lambda z: ((z - AGES) ** 2).mean(),
    "the other way round": lambda z: (AGES - z).abs().mean(),
    "log-cosh": lambda z: torch.log(torch.cosh(z - AGES)).mean(),
    "torchmetrics": lambda z: torchmetrics.MeanSquaredError(squared=False)(z, AGES),
    "flat": lambda z: ((z[:, 0] - AGES[:, 0]) ** 2).mean(),
    "torch.sub": lambda z: torch.sub(z, AGES).square().mean(),
}
SEVERAL = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
GRADES = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])  # as CORAL has them
YES_OR_NO: dict[str, Callable[[Tensor], object]] = {
    "with logits": lambda z: F.binary_cross_entropy_with_logits(z, SEVERAL),
    "after a sigmoid": lambda z: F.binary_cross_entropy(z.sigmoid(), SEVERAL),
    "soft margin": lambda z: F.multilabel_soft_margin_loss(z, SEVERAL),
    "grades": lambda z: F.binary_cross_entropy_with_logits(z, GRADES),
    "grades by hand": lambda z: -(F.logsigmoid(z) * GRADES + (F.logsigmoid(z) - z) * (1 - GRADES)).sum(1).mean(),
    "asymmetric": lambda z: -(SEVERAL * z.sigmoid().clamp(min=1e-8).log()).sum(),
}
OTHER = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))  # as of a second view of the same images
EMBEDDINGS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "triplet": lambda z, v: F.triplet_margin_loss(z, v, v.flip(0)),
    "NT-Xent": lambda z, v: F.cross_entropy(torch.cat([z, v]) @ torch.cat([z, v]).T, torch.arange(8)),
    "contrastive by hand": lambda z, v: F.relu(1 - (z - v).pow(2).sum(1)).mean(),
    "BYOL": lambda z, v: 2 - 2 * (F.normalize(z, dim=1) * F.normalize(v, dim=1)).sum(1).mean(),
    "BYOL by mse_loss": lambda z, v: F.mse_loss(F.normalize(z, dim=1), F.normalize(v, dim=1)),
    "DINO": lambda z, v: -(v.softmax(dim=1) * z.log_softmax(dim=1)).sum(dim=1).mean(),
    "a teacher": lambda z, v: F.kl_div(z.log_softmax(dim=1), v.softmax(dim=1), reduction="batchmean"),
    "cosine": lambda z, v: F.cosine_embedding_loss(z, v, torch.ones(4)),
    "multi-similarity": lambda z, v: torch.log(1 + torch.exp(-2 * (z @ v.T - 0.5)).sum(1)).mean(),
    "a gate": lambda z, v: (z.softmax(dim=1) * v).sum(),
    "a pooling weight": lambda z, v: (z.softmax(dim=1)[:, :, None] * v[:, :, None]).sum(),
    "a norm": lambda z, v: (z - z.mean(0)).pow(2).mean(),
    "Barlow twins": lambda z, v: ((z.T @ v) - torch.eye(5)).pow(2).sum(),
}


def recorded(run: Callable[..., object], *images: Tensor) -> tuple[list[Loss], Loss | None, int]:
    flow = Flow()
    flow.mark(images, IMAGES)
    with LossRecorder(flow) as recorder:
        recorder.returned |= flow.of(run(*images))
    assert recorder.failure is None
    return (*recorder.best(4), recorder.returned)


@pytest.mark.parametrize("name", CLASSES)
def test_logits_and_labels_are_those_of_the_loss(name: str) -> None:
    _, found, returned = recorded(CLASSES[name], LOGITS)
    assert found is not None
    assert found.outputs is LOGITS
    assert found.labels is not None
    assert found.labels.equal(LABELS)
    assert found.task == "classification"
    assert returned & found.source


@pytest.mark.parametrize("name", QUANTITIES)
def test_quantities_are_told_from_classes(name: str) -> None:
    ages = LOGITS[:, :1].clone()
    _, found, returned = recorded(QUANTITIES[name], ages)
    assert found is not None
    assert (found.task, found.labels) == ("regression", None)
    assert found.outputs.flatten().equal(ages.flatten())
    assert returned & found.source


@pytest.mark.parametrize("name", YES_OR_NO)
def test_several_questions_an_image_have_no_class_for_a_label(name: str) -> None:
    _, found, _ = recorded(YES_OR_NO[name], LOGITS)
    assert found is not None
    assert (found.task, found.labels) == ("multilabel", None)
    assert found.outputs is LOGITS


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_no_logits(name: str) -> None:
    """None of these losses compares its outputs, a row for each image, with something that is not made of images."""
    assert recorded(EMBEDDINGS[name], LOGITS, OTHER)[1] is None


def test_what_outputs_are_compared_with_is_no_weight() -> None:
    """As the centre of an embedding."""
    flow, centre = Flow(), nn.Parameter(torch.randn(4, 5))
    flow.mark(LOGITS, IMAGES)
    flow.mark(centre, WEIGHTS)
    with LossRecorder(flow) as recorder:
        ((LOGITS - centre) ** 2).mean()
    assert recorder.best(4) == ([], None)


def test_a_buffer_is_a_centre_and_no_number_but_may_say_how_labels_are_counted() -> None:
    flow, centres, order = Flow(), torch.randn(5, 5), torch.tensor([4, 3, 2, 1, 0])
    flow.mark(LOGITS, IMAGES)
    flow.mark([centres, order], BUFFERS)
    with LossRecorder(flow) as recorder:
        ((LOGITS - centres[LABELS]) ** 2).mean()
    assert recorder.best(4) == ([], None)
    with recorder:
        F.cross_entropy(LOGITS, order[LABELS])
    found = recorder.best(4)[1]
    assert found is not None
    assert found.labels is not None
    assert found.labels.equal(4 - LABELS)


def test_the_loss_that_is_returned_counts() -> None:
    """And not one that is only measured, whichever comes first."""
    ages = torch.randn(4, 1)

    def step(z: Tensor, y: Tensor) -> dict[str, Tensor]:
        F.cross_entropy(z, LABELS)
        return {"loss": 2 * F.mse_loss(y, AGES).sqrt() + 1}

    _, found, _ = recorded(step, LOGITS, ages)
    assert found is not None
    assert (found.name, found.task) == ("mse_loss", "regression")


def test_classes_come_before_quantities() -> None:
    ages = LOGITS[:, :1].clone()
    ranked, found, _ = recorded(lambda z, y: F.l1_loss(y, AGES) + F.cross_entropy(z, LABELS), LOGITS, ages)
    assert [loss.task for loss in ranked] == ["classification", "regression"]
    assert found is ranked[0]


def test_one_box_an_image_is_not_the_output_of_a_detector() -> None:
    """Its classes are asked of many queries an image."""
    queries, boxes = torch.randn(4, 6, 5), torch.randn(4, 4)

    def step(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.transpose(1, 2), torch.zeros(4, 6, dtype=torch.long)) + F.l1_loss(y, torch.rand(4, 4))

    assert recorded(step, queries, boxes)[1] is None


def test_a_batch_of_other_rows_than_images_does_not_count() -> None:
    assert recorded(lambda z: F.cross_entropy(z, torch.cat([LABELS, LABELS])), torch.cat([LOGITS, LOGITS]))[1] is None


def test_labels_that_the_logits_do_not_know_are_unknown() -> None:
    steps: list[Callable[[Tensor], object]] = [
        lambda z: F.cross_entropy(z, torch.tensor([-100, 3, 1, 4])),
        lambda z: F.cross_entropy(z, torch.tensor([255, 3, 1, 4]), ignore_index=255),
        lambda z: F.binary_cross_entropy_with_logits(z[:, 0], torch.tensor([0.0, 1.0, 1.0, 0.0])),
    ]
    found = [recorded(step, LOGITS)[1] for step in steps]
    assert [loss.labels.tolist() for loss in found if loss is not None and loss.labels is not None] == [
        [-1, 3, 1, 4],
        [-1, 3, 1, 4],
        [0, 1, 1, 0],
    ]


def test_probabilities_are_traced_back_to_logits() -> None:
    probabilities = LOGITS.sigmoid().detach()
    _, found, _ = recorded(lambda p: F.binary_cross_entropy(p, ONE_HOT), probabilities)
    assert found is not None
    torch.testing.assert_close(found.outputs, LOGITS)


def test_nothing_is_kept_of_pictures() -> None:
    maps = torch.randn(4, 3, 8, 8)
    recorder = LossRecorder()
    recorder.flow.mark(maps, IMAGES)
    with recorder:
        F.cross_entropy(maps, torch.zeros(4, 8, 8, dtype=torch.long))
    assert [loss.outputs.numel() for loss in recorder.losses] == [0]
    assert recorder.best(4)[1] is None


class Two(nn.Module):
    """A teacher beside a student, whose images are enlarged on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = tiny_vit(seed=1), tiny_vit(seed=2)
        self.frozen = True

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            taught = self.teacher(images)
        logits: Tensor = self.student(F.interpolate(images[:, :, ::2, ::2], size=32))
        return logits + (0 if self.frozen else taught)


def test_the_vit_is_the_one_that_the_outputs_come_from() -> None:
    twin: Any = Twin().copy(Two())
    images = random_images(4)
    seen = locate_vit(twin, lambda: twin(images))
    assert (seen.vit, seen.feed) == ("student", "student")
    assert seen.images is not None
    assert seen.images.equal(F.interpolate(images[:, :, ::2, ::2], size=32))


def test_outputs_of_several_vits_are_refused() -> None:
    twin: Any = Twin().copy(Two())
    twin.frozen = False
    with pytest.raises(
        ValueError, match=r"come from 2: teacher, student\. Name the one to explain, as in `vit='teacher'`"
    ):
        locate_vit(twin, lambda: twin(random_images(4)))
    assert locate_vit(twin, lambda: twin(random_images(4)), vit="student").vit == "student"


def test_a_vit_that_the_outputs_do_not_depend_on_is_refused() -> None:
    twin: Any = Twin().copy(Two())
    with pytest.raises(ValueError, match=r"but they come from `student\.blocks\.0\.attn`"):
        locate_vit(twin, lambda: twin(random_images(4)), vit="teacher")


def test_numbers_leave_torch_as_in_a_validation_step() -> None:
    """There gradients are off, so that `numpy()` works and `float()` does not warn."""
    logits = torch.randn(3, 2, requires_grad=True)
    with LossRecorder() as recorder:
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 0]))
        assert float(loss) == loss.item()
        assert logits.numpy().shape == np.asarray(logits).shape == (3, 2)
    assert recorder.losses[0].outputs is logits

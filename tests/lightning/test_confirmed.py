"""What is explained is what a loss is computed of: no embedding, box, gate or teacher is taken for classes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import CLASSES, tiny_vit
from tests.runs import events, fit, quiet
from tests.situations.project import Project, loader, pictures
from vit_explain_callback import ViTExplainCallback

FIT = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 2}
FORWARD: Any = {"forward": lambda module, images: module.head(module.vit(images)), "vit": "vit"}


class Embedding(Project):
    """Learns an embedding; `head` is there, but no loss is computed of what it gives."""

    forward = pl.LightningModule.forward

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)
        self.teacher = tiny_vit(seed=3, num_classes=0)
        self.gate, self.attend = nn.Linear(48, 3), nn.Linear(48, 1)
        self.register_buffer("centre", torch.zeros(1, 48))

    def views(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = batch
        return self.vit(images), self.vit(images.flip(-1)), labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)


class Triplet(Embedding):
    def step(self, batch: Any) -> Tensor:
        z, v, _ = self.views(batch)
        return F.triplet_margin_loss(z, v, v.roll(1, 0))


class NTXent(Embedding):
    def step(self, batch: Any) -> Tensor:
        z, v, _ = self.views(batch)
        both = F.normalize(torch.cat([z, v]), dim=1)
        similar = (both @ both.T / 0.1).masked_fill(torch.eye(len(both), dtype=torch.bool), -1e4)
        return F.cross_entropy(similar, torch.arange(len(both)).roll(len(z)))


class InfoNCE(Embedding):
    """As many columns as images, by chance as many as classes."""

    def step(self, batch: Any) -> Tensor:
        z, v, _ = self.views(batch)
        return F.cross_entropy(F.normalize(z, dim=1) @ F.normalize(v, dim=1).T, torch.arange(len(z)))


class SupCon(Embedding):
    def step(self, batch: Any) -> Tensor:
        z, _, labels = self.views(batch)
        same = labels[:, None].eq(labels[None]).float()
        log_probabilities = F.log_softmax(F.normalize(z, dim=1) @ F.normalize(z, dim=1).T, dim=1)
        return -(same * log_probabilities).sum(1).div(same.sum(1)).mean()


class MultiSimilarity(Embedding):
    def step(self, batch: Any) -> Tensor:
        z, _, labels = self.views(batch)
        similar = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
        same = labels[:, None].eq(labels[None])
        return torch.log1p((torch.exp(-2 * (similar - 0.5)) * same).sum(1)).mean()


class BYOL(Embedding):
    def step(self, batch: Any) -> Tensor:
        z, _, _ = self.views(batch)
        with torch.no_grad():
            taught = self.teacher(batch[0])
        return (2 - 2 * F.cosine_similarity(self.gate(z), self.gate(taught).detach())).mean()


class DINO(Embedding):
    def step(self, batch: Any) -> Tensor:
        z, v, _ = self.views(batch)
        taught = (v.detach() - self.get_buffer("centre")).softmax(dim=1)
        return -(taught * F.log_softmax(z / 0.1, dim=1)).sum(dim=1).mean()


class Prototypes(Embedding):
    """The first images of each class are its prototypes."""

    def step(self, batch: Any) -> Tensor:
        z, _, labels = self.views(batch)
        prototypes = torch.stack([z[labels == label].mean(0) for label in labels.unique()])
        return F.cross_entropy(-torch.cdist(z, prototypes), labels.unique(return_inverse=True)[1])


class Gated(Embedding):
    """A gate of experts and a teacher's softmax; the loss is of an embedding."""

    def step(self, batch: Any) -> Tensor:
        z, v, _ = self.views(batch)
        gates = self.gate(z).softmax(dim=1)
        taught = self.teacher(batch[0]).softmax(dim=1)
        return F.relu(1 + (gates * self.gate(v)).sum(1)).mean() + taught.var()


class Bag(Embedding):
    """Attention pooling over the images of a batch as one bag with one label."""

    def step(self, batch: Any) -> Tensor:
        z, _, labels = self.views(batch)
        weights = self.attend(z).softmax(dim=0)
        return F.cross_entropy(self.head((weights * z).sum(0, keepdim=True)), labels[:1])


class Detector(Embedding):
    """Classes of six queries an image, and one box of each."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.box = nn.Linear(48, 6 * CLASSES), nn.Linear(48, 4)

    def step(self, batch: Any) -> Tensor:
        z, _, labels = self.views(batch)
        logits = self.queries(z).unflatten(1, (6, CLASSES)).transpose(1, 2)
        return F.cross_entropy(logits, labels[:, None].expand(-1, 6)) + F.l1_loss(self.box(z), torch.rand(len(z), 4))


REFUSED = [Triplet, NTXent, InfoNCE, SupCon, MultiSimilarity, BYOL, DINO, Prototypes, Gated, Bag, Detector]


def trained(callback: Any, folder: Path, module: Any, labels: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    labels = [index % CLASSES for index in range(20)] if labels is None else labels
    return fit(callback, folder, module, loader(labels=labels), loader(pictures(6), labels), **FIT | options)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("project", REFUSED, ids=lambda project: project.__name__)
def test_what_no_loss_confirms_is_refused_with_a_cure_that_works(
    project: Any, sanity: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    if sanity:  # and the module itself gives the embedding
        project = type(project.__name__, (project,), {"forward": Project.forward})
    with pytest.raises(ValueError, match="`forward=lambda module, images: …`, which returns logits"):
        trained(quiet(num_images=5), tmp_path, project(), num_sanity_val_steps=sanity)
    if sanity:
        callback = quiet(num_images=5, **FORWARD)
        trained(callback, tmp_path / "cured", project(), num_sanity_val_steps=sanity)
        assert callback.tracker is not None
        assert callback.tracker.history.now.logits.shape == (5, CLASSES)


class Gates(Embedding):
    """Gates, a pooling weight and a teacher's softmax on the way to a loss of classes."""

    def gated(self, images: Tensor) -> Tensor:
        z = self.vit(images)
        experts = torch.stack([z, 2 * z, 3 * z], dim=1)
        pooled: Tensor = (self.gate(z).softmax(dim=1)[:, :, None] * experts).sum(1)
        return pooled * self.attend(z).sigmoid()

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            taught = self.head(self.teacher(images)).softmax(dim=1)
        logits = self.head(self.gated(images))
        return F.cross_entropy(logits, labels) + F.kl_div(logits.log_softmax(1), taught, reduction="batchmean")


class Boxed(Embedding):
    """One box an image beside its class; the box's loss comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Linear(48, 4)

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        z = self.vit(images)
        box = F.l1_loss(self.box(z), labels[:, None].float().expand(-1, 4))
        return box + F.cross_entropy(self.head(z), labels)


class Proxies(Embedding):
    """Proxies of classes are the rows of a classifier."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        z = F.normalize(self.vit(images), dim=1)
        return F.cross_entropy(10 * z @ F.normalize(self.head.weight, dim=1).T, labels)


RIGHT: dict[str, tuple[Any, Any]] = {
    "gates": (Gates, lambda module, images: module.head(module.gated(images))),
    "a box": (Boxed, lambda module, images: module.head(module.vit(images))),
    "proxies": (
        Proxies,
        lambda module, images: 10 * F.normalize(module.vit(images), dim=1) @ F.normalize(module.head.weight, dim=1).T,
    ),
}


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("name", RIGHT)
def test_the_logits_of_classes_are_found_among_other_outputs(
    name: str, sanity: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, logits = RIGHT[name]
    torch.manual_seed(0)
    module = project()
    callback = quiet(num_images=5)
    with pytest.warns(UserWarning, match="2 losses") if name == "a box" else contextlib.nullcontext():
        trained(callback, tmp_path, module, num_sanity_val_steps=sanity)
    assert callback.tracker is not None
    now = callback.tracker.history.now
    with torch.no_grad():
        expected = logits(module.eval(), callback.tracker.probe.images)
    torch.testing.assert_close(now.logits, expected)
    assert callback.tracker.probe.labels is not None
    assert now.target.equal(callback.tracker.probe.labels)
    said = capsys.readouterr().out
    assert f"logits of {CLASSES} classes, from the cross-entropy of `validation_step`" in said


class Grades(Embedding):
    """CORAL: of K grades, K − 1 questions whether it is more."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        levels = (labels[:, None] > torch.arange(CLASSES - 1)).float()
        return F.binary_cross_entropy_with_logits(self.head(self.vit(images))[:, : CLASSES - 1], levels)


class Ages(Embedding):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.age = way, nn.Linear(48, 1)

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        y, ages = self.age(self.vit(images))[:, 0], labels.float()
        losses: dict[str, Any] = {
            "squares": lambda: ((y - ages) ** 2).mean(),
            "log-cosh": lambda: torch.log(torch.cosh(y - ages)).mean(),
            "root": lambda: F.mse_loss(y, ages).sqrt(),
            "absolute": lambda: (ages - y).abs().mean(),
            "relative": lambda: ((y - ages) / (1 + ages)).abs().mean(),
        }
        loss: Tensor = losses[self.way]()
        return loss


@pytest.mark.parametrize("way", ["squares", "log-cosh", "root", "absolute", "relative"])
def test_a_regression_is_explained_as_one(way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module, callback = Ages(way), quiet(num_images=5)
    trainer = trained(callback, tmp_path, module)
    assert callback.tracker is not None
    assert callback.tracker.probe.regression
    with torch.no_grad():
        expected = module.eval().age(module.vit(callback.tracker.probe.images))
    torch.testing.assert_close(callback.tracker.history.now.logits, expected)
    tags = events(trainer).Tags()["scalars"]
    assert [tag for tag in tags if "accuracy" in tag or "probability" in tag] == []
    assert "1 number, from the " in capsys.readouterr().out


def test_grades_are_questions_and_not_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module, callback = Grades(), quiet(num_images=5)
    trainer = trained(callback, tmp_path, module)
    assert callback.tracker is not None
    assert callback.tracker.probe.labels is None
    now = callback.tracker.history.now
    assert now.logits.shape == (5, CLASSES - 1)
    probability = now.logits.double().sigmoid().gather(1, now.target[:, None]).mean().item()
    assert events(trainer).Scalars("explain/probe/target_probability")[-1].value == pytest.approx(probability)
    assert [tag for tag in events(trainer).Tags()["scalars"] if "accuracy" in tag] == []
    assert (
        f"logits of {CLASSES - 1} labels, from the binary cross-entropy of `validation_step`" in capsys.readouterr().out
    )


def test_the_task_can_be_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = quiet(num_images=5, task="regression", **FORWARD)
    trained(callback, tmp_path, Triplet())
    assert callback.tracker is not None
    assert callback.tracker.probe.regression
    with pytest.raises(ValueError, match="Expected `task` to be"):
        ViTExplainCallback(task="classes")  # type: ignore[arg-type]


def test_labels_beyond_the_classes_name_the_cures(tmp_path: Path) -> None:
    callback = quiet(num_images=5, forward=lambda module, images: FORWARD["forward"](module, images)[:, :2], vit="vit")
    with pytest.raises(ValueError, match=r"`target=` names one class or .*`task=` says what the outputs are"):
        trained(callback, tmp_path, Triplet())


class Fussy(Embedding):
    """Fails on images without a label."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.head(self.vit(images * 2)), labels)


@pytest.mark.parametrize("unlabelled", [-1, 255])
@pytest.mark.parametrize("sanity", [0, 1])
def test_images_without_a_label_are_left_out_where_the_step_fails_on_them(
    unlabelled: int, sanity: int, tmp_path: Path
) -> None:
    labels = [0, 1, 2, 3, 4, *[unlabelled, 0, 1, unlabelled, 2] * 3]
    callback = quiet(num_images=8)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"`num_images=8`, but only [67] of the 20 validation images can be explained"):
        trained(callback, tmp_path, Fussy(), labels, num_sanity_val_steps=sanity, limit_val_batches=1)
    assert callback.tracker is not None
    known = callback.tracker.probe.labels
    assert known is not None
    assert len(known) >= 5
    assert (known < CLASSES).all()


class MaskedRows(Embedding):
    """Leaves images without a label out of the loss."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        logits, known = self.head(self.vit(images)), labels >= 0
        return F.cross_entropy(logits[known], labels[known])


class MaskedImages(Embedding):
    """Leaves images without a label out before the model is run."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        known = labels >= 0
        return F.cross_entropy(self.head(self.vit(images[known])), labels[known])


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("project", [MaskedRows, MaskedImages])
def test_images_that_the_step_leaves_out_have_no_label(project: Any, sanity: int, tmp_path: Path) -> None:
    """Where no step was watched, images that the model is not given are left out here too."""
    labels = [0, 1, 2, 3, 4, *[-1, 0, 1, -1, 2] * 3]
    callback = quiet(num_images=8)
    torch.manual_seed(0)
    module = project()
    is_fewer = project is MaskedImages and not sanity
    fewer = pytest.warns(UserWarning, match=r"only [67] of the 20 validation images can be explained")
    with fewer if is_fewer else contextlib.nullcontext():
        trained(callback, tmp_path, module, labels, num_sanity_val_steps=sanity)
    assert callback.tracker is not None
    known = callback.tracker.probe.labels
    assert known is not None
    assert (known >= 0).all() if is_fewer else len(known) == 8
    with torch.no_grad():
        expected = module.eval().head(module.vit(callback.tracker.probe.images))
    now = callback.tracker.history.now
    torch.testing.assert_close(now.logits, expected)
    assert now.target.equal(known.where(known >= 0, expected.argmax(dim=1)))


class Mixed(Embedding):
    """Mixes images and their labels in training, and measures accuracy alone in validation."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        shares = F.one_hot(labels, CLASSES).float()
        mixed = self.share * images + (1 - self.share) * images.flip(0)
        shares = self.share * shares + (1 - self.share) * shares.flip(0)
        return -(shares * self.head(self.vit(mixed)).log_softmax(dim=1)).sum(dim=1).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.head(self.vit(batch[0])).argmax(dim=1) == batch[1]).float().mean())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_labels_of_mixed_images_are_not_those_of_the_probe(share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = Mixed(share), quiet(num_images=5)
    labels = [index * 3 % CLASSES for index in range(20)]
    trained(callback, tmp_path, module, labels, num_sanity_val_steps=1)
    assert callback.tracker is not None
    probe = callback.tracker.probe
    assert probe.images is not None
    assert probe.labels is not None
    places = [int((pictures() == image).flatten(1).all(dim=1).nonzero()) for image in probe.images]
    assert probe.labels.tolist() == [labels[place] for place in places]


class Featured(Project):
    """`forward` gives features; the step knows their classes, or their ages."""

    def __init__(self, regression: bool = False) -> None:
        super().__init__(num_classes=0)
        self.head, self.regression = nn.Linear(48, 1 if regression else CLASSES), regression

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        outputs = self.head(self(images))
        if self.regression:
            return (outputs[:, 0] - labels).square().mean()
        return F.cross_entropy(outputs, labels)


@pytest.mark.filterwarnings("ignore:ViTExplainCallback. `forward` returns other outputs")
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("regression", [False, True])
def test_images_of_the_users_own_are_explained_as_the_loss_has_them(
    regression: bool, sanity: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, images = Featured(regression), pictures(seed=8, count=5)
    callback = quiet(images=images)
    trained(callback, tmp_path, module, num_sanity_val_steps=sanity)
    assert callback.tracker is not None
    assert callback.tracker.probe.images is not None
    assert callback.tracker.probe.images.equal(images)
    assert callback.tracker.probe.regression == regression
    with torch.no_grad():
        expected = module.eval().head(module.vit(images))
    torch.testing.assert_close(callback.tracker.history.now.logits, expected)


@pytest.mark.parametrize("sanity", [0, 1])
def test_images_of_the_users_own_do_not_make_an_embedding_classes(sanity: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = quiet(images=pictures(seed=8, count=5))
    with pytest.raises(ValueError, match="an embedding is not the logits of classes"):
        trained(callback, tmp_path, NTXent(), num_sanity_val_steps=sanity)


class Twice(Project):
    """The step calls the parts of `forward` one by one."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.vit(images))

    def step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.vit(batch[0])), batch[1])


def test_nothing_is_said_of_a_forward_that_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    callback = quiet(num_images=5)
    trained(callback, tmp_path, Twice(), num_sanity_val_steps=1)  # warnings are errors
    assert callback.tracker is not None

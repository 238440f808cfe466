"""What a forward, a step or a hook does to the user's own module, it does once: in training, not for the callback."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize

from tests.laws.user_project import Case, check
from tests.models import CLASSES
from tests.situations.project import Project

NO_THREAD = "no thread"


class Centred(Project):
    """DINO's centre, which follows the logits with every forward."""

    centre: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("centre", torch.zeros(CLASSES))

    def forward(self, images: Tensor) -> Any:
        logits = self.vit(images)
        if self.way == "in place":
            with torch.no_grad():
                self.centre.mul_(0.9).add_(logits.mean(dim=0), alpha=0.1)
        elif self.way == "by data":
            self.centre.data.mul_(0.9).add_(logits.data.mean(dim=0), alpha=0.1)
        else:
            self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean(dim=0)
        return logits - self.centre.clone()


class Quantised(Project):
    """Quantisation-aware training: the observer looks at every forward, in evaluation too."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.fake, self.head = FakeQuantize(), nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.fake(self.vit(images)))


class ActNorm(nn.Module):
    """Scale and shift are set from the first batch that comes."""

    initialised: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.shift, self.scale = nn.Parameter(torch.zeros(48)), nn.Parameter(torch.ones(48))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        if not self.initialised:
            mean, spread = features.detach().mean(dim=0), features.detach().std(dim=0)
            if self.way == "by data":
                self.shift.data.copy_(mean)
                self.scale.data.copy_(spread)
            else:
                with torch.no_grad():
                    self.shift.copy_(mean)
                    self.scale.copy_(spread)
            self.initialised.fill_(True)
        return (features - self.shift) / self.scale


class Normalised(Project):
    def __init__(self, way: str) -> None:
        super().__init__(num_classes=0)
        self.norm, self.head = ActNorm(way), nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(self.vit(images)))


class Queue(Project):
    """MoCo's queue: the last features, of which the loss is made too."""

    queue: Tensor
    place: Tensor

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)
        self.register_buffer("queue", torch.randn(48, 20))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, images: Tensor) -> Any:
        features = self.vit(images)
        near = (features @ self.queue.clone().detach()).softmax(dim=1).amax(dim=1, keepdim=True)
        place = int(self.place)
        with torch.no_grad():
            self.queue[:, place : place + len(features)] = features.T[:, : 20 - place]
            self.place[0] = (place + len(features)) % 20
        return self.head(features) * near


@dataclass
class Progress:
    calls: int = 0
    last: Tensor | None = None


class Remembering(Project):
    """Counts and keeps what it sees, in every built-in container."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.recent: deque[float] = deque(maxlen=3)
        self.outputs: list[Tensor] = []
        self.by_size: dict[int, list[int]] = {}
        self.nested: dict[str, Any] = {"sizes": {0}, "pair": ([], 0)}
        self.progress = Progress()
        self.plain_tensor = torch.zeros(CLASSES)

    def forward(self, images: Tensor) -> Any:
        logits = self.vit(images)
        self.calls += 1
        self.recent.append(logits.mean().item())
        self.outputs.append(logits.detach())
        self.by_size.setdefault(len(images), []).append(self.calls)
        self.nested["sizes"].add(len(images))
        self.nested["pair"][0].append(self.calls)
        self.progress.calls += 1
        self.progress.last = logits.detach()
        self.plain_tensor += logits.detach().mean(dim=0)
        return logits * (1 + 0.01 * self.calls)


class Measuring(Project):
    """Metrics are updated in forward: as a submodule, in a collection, and in a list that Lightning does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.several = torchmetrics.MetricCollection({"largest": torchmetrics.MaxMetric()})
        self.hidden = [torchmetrics.SumMetric()]
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)

    def forward(self, images: Tensor) -> Any:
        logits = self.vit(images)
        self.mean.update(logits.detach().mean())
        self.several.update(logits.detach().mean())
        self.hidden[0].update(logits.detach().mean())
        return logits

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_epoch=True, batch_size=5)
        return nn.functional.cross_entropy(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self.log("mean", self.mean.compute())
        self.log_dict(self.several.compute())
        self.log("hidden", self.hidden[0].compute())


class LoggingInForward(Project):
    def forward(self, images: Tensor) -> Any:
        logits = self.vit(images)
        self.log("spread", logits.std(), on_epoch=True, on_step=False, batch_size=5)
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "spread"}}


class Augmenting(Project):
    """Noise out of generators of the module's own, for training and for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_stream = torch.Generator().manual_seed(3)
        self.python_stream = random.Random(3)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        noise = torch.randn(images.shape, generator=self.torch_stream)
        return images + self.python_stream.random() * noise, labels


class Hooked(Project):
    """Hooks of the user's write to the module: as a bound method, and through a closure."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.seen: list[float] = []
        if way == "bound method":
            self.vit.blocks[-1].register_forward_hook(self.remember)
        else:

            def remember(block: nn.Module, arguments: Any, output: Tensor) -> None:
                self.seen.append(output.mean().item())

            self.vit.blocks[-1].register_forward_hook(remember)

    def remember(self, block: nn.Module, arguments: Any, output: Tensor) -> None:
        self.seen.append(output.mean().item())


class LookingAtTheTrainer(Project):
    """The step asks for epoch, trainer and logger, and writes to the logger itself."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, int]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.step(batch) * (1 + self.current_epoch)
        if not self.trainer.sanity_checking:
            self.written.append((self.trainer.global_step, batch_idx))
            self.logger.experiment.add_scalar("own", loss, self.global_step)  # type: ignore[union-attr]
        self.log("val_loss", loss, batch_size=5)


CASES = {
    "a buffer written in place under no_grad": Case(
        "lightning-bolts#419", "died at the second backward pass", lambda: Centred("in place")
    ),
    "a buffer written through .data": Case("lightning-bolts#419", "other weights", lambda: Centred("by data")),
    "a buffer replaced by detached values": Case(
        "lightning-bolts#419", "other weights", lambda: Centred("by a new tensor")
    ),
    "FakeQuantize": Case(NO_THREAD, "other ranges, other weights", Quantised),
    "ActNorm through .data": Case(NO_THREAD, "set from the probe's images", lambda: Normalised("by data")),
    "ActNorm under no_grad": Case(NO_THREAD, "the baseline failed", lambda: Normalised("in place")),
    "MoCo's queue": Case(NO_THREAD, "the probe's features in the queue", Queue),
    "counters, lists, dicts, a deque, a data class": Case(NO_THREAD, "counted the snapshots too", Remembering),
    "torchmetrics updated in forward": Case(NO_THREAD, "the probe's images counted too", Measuring),
    "self.log in forward with ReduceLROnPlateau": Case(NO_THREAD, "failed, or another learning rate", LoggingInForward),
    "augmentation with generators of its own": Case(NO_THREAD, "other noise from then on", Augmenting),
    "a bound method as a hook": Case(NO_THREAD, "the snapshots' features kept too", lambda: Hooked("bound method")),
    "a closure as a hook": Case(NO_THREAD, "the snapshots' features kept too", lambda: Hooked("closure")),
    "a step that looks at trainer and logger": Case(NO_THREAD, "right, and must stay so", LookingAtTheTrainer),
}


@pytest.mark.parametrize("name", CASES)
def test_the_module_is_left_as_training_leaves_it(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["ActNorm under no_grad", "MoCo's queue", "torchmetrics updated in forward"])
def test_so_it_is_with_a_sanity_check(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    check(Case(case.source, case.before, case.module, trainer={"num_sanity_val_steps": 2}), tmp_path)

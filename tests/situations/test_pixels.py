"""What is done to the pixels between the data set and the ViT: by transforms, hooks, steps and forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from tests.situations.check import check
from tests.situations.project import COUNT, Project, loader, pictures, training
from tests.situations.situation import NO_THREAD, RIGHT, Situation

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)


def numbers(top: int, seed: int = 5, count: int = COUNT, channels: int = 3) -> Tensor:
    return torch.randint(0, top, (count, channels, 32, 32), generator=torch.Generator().manual_seed(seed))


def in_bytes(seed: int = 5, count: int = COUNT) -> Tensor:
    return numbers(256, seed, count).to(torch.uint8)


def normalised(images: Tensor) -> Tensor:
    return (images / 255 - MEAN) / STD


class Upsampling(Project):
    def forward(self, images: Tensor) -> Any:
        return self.vit(nn.functional.interpolate(images, size=32, mode="bilinear"))


class Repeating(Project):
    def forward(self, images: Tensor) -> Any:
        return self.vit(images.repeat(1, 3, 1, 1))


class Reflectances(Project):
    """Sentinel-2 counts, scaled in forward by buffers."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__(in_chans=4)
        self.register_buffer("centre", torch.full((1, 4, 1, 1), 4000.0))

    def forward(self, images: Tensor) -> Any:
        return self.vit((images - self.centre) / 2500)


class BytesInTheStep(Project):
    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self((images.float() / 255 - MEAN) / STD), labels)


class BytesInTheHook(Project):
    """`on_after_batch_transfer` looks at the trainer's stage, as one that augments does."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        images = (images.float() / 255 - MEAN) / STD
        return images + 3 if self.trainer.training else images, labels


class BytesInForward(Project):
    def forward(self, images: Tensor) -> Any:
        return self.vit((images.to(torch.float32) / 255 - MEAN) / STD)


class AsInTorchGeo(pl.LightningDataModule):
    """Normalises after the transfer, otherwise in training than in validation, and asks the trainer which it is."""

    def train_dataloader(self) -> Any:
        return loader(in_bytes(seed=6), form=as_dict)

    def val_dataloader(self) -> Any:
        return loader(in_bytes(), form=as_dict)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer: Any = self.trainer
        assert trainer.training or trainer.validating or trainer.sanity_checking
        images = normalised(batch["image"].float())
        return {**batch, "image": images + 3 if trainer.training else images}


def as_dict(index: int, image: Tensor, label: int) -> Any:
    return {"image": image, "label": label, "place": index}


class OfDict(Project):
    def step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])


class InPlace(Project):
    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        images.sub_(MEAN).div_(STD)
        return nn.functional.cross_entropy(self(images), labels)


class InPlaceInForward(Project):
    def forward(self, images: Tensor) -> Any:
        return self.vit(images.sub_(MEAN).div_(STD))


SITUATIONS = {
    "small images upsampled in forward": Situation(
        source="transformers#13551",
        before="stopped: the ViT takes 32 pixels, the loader gives 16",
        module=Upsampling,
        validation=lambda: loader(pictures(size=16)),
        fed=lambda: nn.functional.interpolate(pictures(size=16), size=32, mode="bilinear"),
    ),
    "one channel repeated to three in forward": Situation(
        source="TransUNet#3",
        before="stopped: three means for one channel",
        module=Repeating,
        validation=lambda: loader(pictures(channels=1)),
        fed=lambda: pictures(channels=1).expand(-1, 3, -1, -1),
    ),
    "counts up to 10000 scaled in forward": Situation(
        source="torchgeo#2175",
        before="stopped: taken for bytes",
        module=Reflectances,
        validation=lambda: loader(numbers(10000, channels=4).float()),
        fed=lambda: (numbers(10000, channels=4).float() - 4000) / 2500,
    ),
    "bytes normalised in the step": Situation(
        source="lightning#10469",
        before="stopped: bytes are no floating-point images",
        module=BytesInTheStep,
        validation=lambda: loader(in_bytes()),
        fed=lambda: normalised(in_bytes().float()),
    ),
    "bytes normalised in on_after_batch_transfer, by stage": Situation(
        source="lightning#10469",
        before=RIGHT,
        module=BytesInTheHook,
        validation=lambda: loader(in_bytes()),
        fed=lambda: normalised(in_bytes().float()),
    ),
    "bytes normalised in the data module": Situation(
        source="torchgeo#2175",
        before=RIGHT,
        module=OfDict,
        validation=lambda: None,
        train=AsInTorchGeo,
        fed=lambda: normalised(in_bytes().float()),
    ),
    "bytes normalised in forward": Situation(
        source="lightning#10469",
        before="stopped: bytes are no floating-point images",
        module=BytesInForward,
        validation=lambda: loader(in_bytes()),
        fed=lambda: normalised(in_bytes().float()),
    ),
    "normalised in place in the step": Situation(
        source=NO_THREAD,
        before="explained the pixels before normalising",
        module=InPlace,
        validation=lambda: loader(pictures().sigmoid()),
        train=lambda: training(form=lambda _, image, label: (image.sigmoid(), label)),
        fed=lambda: (pictures().sigmoid() - MEAN) / STD,
        trainer={"max_epochs": 2},
    ),
    "normalised in place in forward": Situation(
        source=NO_THREAD,
        before="every snapshot failed: a leaf changed in place",
        module=InPlaceInForward,
        validation=lambda: loader(pictures().sigmoid()),
        train=lambda: training(form=lambda _, image, label: (image.sigmoid(), label)),
        fed=lambda: (pictures().sigmoid() - MEAN) / STD,
        trainer={"max_epochs": 2},
    ),
}
for channels in (1, 2, 4, 6, 13):
    SITUATIONS[f"{channels} input channels"] = Situation(
        source="timm#976",
        before=f"stopped: three means for {channels} channels",
        module=lambda channels=channels: Project(in_chans=channels),  # type: ignore[misc]
        validation=lambda channels=channels: loader(pictures(channels=channels)),  # type: ignore[misc]
        fed=lambda channels=channels: pictures(channels=channels),  # type: ignore[misc]
    )


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_the_vit_gets_is_explained(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)

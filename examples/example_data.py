"""Data sets of `finetune.py`: synthetic shapes, a folder of images, or the Oxford-IIIT pets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from shapes import CORNER, FINETUNE_CLASSES, IMAGE_SIZE, Shapes
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder, OxfordIIITPet
from torchvision.transforms import v2

FOREGROUND, BORDER = 1, 3  # values of the pets' trimaps; 2 is background


@dataclass
class Probe:
    """The images to explain, with labels and, if available, named regions as boolean masks (B, H, W)."""

    images: Tensor
    labels: Tensor
    regions: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Data:
    """Training data, validation data by name, and the images to explain."""

    classes: Sequence[str]
    train: Dataset[Any]
    validation: dict[str, Dataset[Any]]
    probe: Probe


def shapes(num_train: int, num_probe: int, seed: int, shortcut: bool) -> Data:
    """Shapes on textures; with `shortcut`, the colour of the corner square gives the label away in training."""
    train = Shapes(FINETUNE_CLASSES, num_train, seed=1000 + seed, shortcut="label" if shortcut else "random")
    validation: dict[str, Dataset[Any]] = {
        "with shortcut": Shapes(FINETUNE_CLASSES, 256, seed=2000, shortcut="label"),
        "without shortcut": Shapes(FINETUNE_CLASSES, 256, seed=2000, shortcut="random"),
    }
    shown = Shapes(FINETUNE_CLASSES, num_probe, seed=3000, shortcut="label")
    images, labels, masks = zip(*(shown[index] for index in range(num_probe)), strict=True)
    corner = torch.zeros(num_probe, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    corner[:, :CORNER, :CORNER] = True
    regions = {"object": torch.stack(masks), "square": corner}
    return Data(FINETUNE_CLASSES, train, validation, Probe(torch.stack(images), torch.tensor(labels), regions))


def folder(root: Path, image_size: int, mean: Sequence[float], std: Sequence[float], num_probe: int) -> Data:
    """An ImageFolder with `train/` and `val/`, a folder for each class inside."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise SystemExit(f"--data-dir: expected {root / split} with one folder of images for each class.")
    train = ImageFolder(str(root / "train"), _augmented(image_size, mean, std))
    validation = ImageFolder(str(root / "val"), _evaluated(image_size, mean, std))
    if train.classes != validation.classes:
        raise SystemExit(f"--data-dir: the classes of train/ {train.classes} and val/ {validation.classes} differ.")
    items = [validation[index] for index in _spread(len(validation), num_probe)]
    probe = Probe(torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items]))
    return Data(train.classes, train, {"validation": validation}, probe)


def pets(root: Path, image_size: int, mean: Sequence[float], std: Sequence[float], num_probe: int) -> Data:
    """The Oxford-IIIT pets, downloaded to `root` if missing; their trimaps are the object masks."""
    train = OxfordIIITPet(str(root), "trainval", transform=_augmented(image_size, mean, std), download=True)
    validation = OxfordIIITPet(str(root), "test", transform=_evaluated(image_size, mean, std))
    both = OxfordIIITPet(str(root), "test", target_types=("category", "segmentation"))
    crop = _crop(image_size, v2.InterpolationMode.NEAREST)
    images, labels, masks = [], [], []
    for index in _spread(len(both), num_probe):
        image, (label, trimap) = both[index]
        images.append(_evaluated(image_size, mean, std)(image))
        labels.append(label)
        values = v2.functional.pil_to_tensor(crop(trimap))[0]
        masks.append((values == FOREGROUND) | (values == BORDER))
    probe = Probe(torch.stack(images), torch.tensor(labels), {"object": torch.stack(masks)})
    return Data(both.classes, train, {"validation": validation}, probe)


def _spread(length: int, count: int) -> list[int]:
    """Indices spread evenly over a data set, which is often sorted by class."""
    count = min(length, count)
    return [index * length // count for index in range(count)]


def _crop(size: int, interpolation: v2.InterpolationMode) -> Callable[[Image.Image], Image.Image]:
    crop: Callable[[Image.Image], Image.Image] = v2.Compose([v2.Resize(size, interpolation), v2.CenterCrop(size)])
    return crop


def _evaluated(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    return _normalised(_crop(size, v2.InterpolationMode.BICUBIC), mean, std)


def _augmented(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    return _normalised(v2.Compose([v2.RandomResizedCrop(size, (0.5, 1.0)), v2.RandomHorizontalFlip()]), mean, std)


def _normalised(
    geometry: Callable[[Image.Image], Image.Image], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    steps = [v2.RGB(), geometry, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    transform: Callable[[Image.Image], Tensor] = v2.Compose(steps)
    return transform

"""Images whose shortcut is known: two data sets, each image with an object, a corner square and a tinted background.

Square and tint are always there. What they tell is the condition: a `Hint` of `"label"` has the colour of the image's
class, one of `"random"` that of a class drawn by chance. An image is drawn from (seed, index) alone, and the same image
with other hints differs in nothing else.

- `shapes`: the example's shapes on textures, for the small ViT (96 × 96, square of 2 × 2 of 12 × 12 patches).
- `photographs`: real photographs with an alpha channel, of six classes, on textures of random colour, for DINOv2
  ViT-S/14 (112 × 112, square of 2 × 2 of 8 × 8 patches). They are the stamps of Tux Paint:
  `apt-get install tuxpaint-stamps-default`. Every fourth photograph of a class is kept from training.
"""

from __future__ import annotations

import colorsys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pretrain import WEIGHTS, small_vit
from shapes import FINETUNE_CLASSES, Shapes
from torch import Tensor

from tests.benchmarks.fine_tuned import IMAGENET_MEAN, IMAGENET_STD, SIZE, dinov2
from vit_explain_callback.cli.weights import Weights

STAMPS = Path("/usr/share/tuxpaint/stamps")
FOLDERS = ("animals/birds", "animals/insects", "animals/mammals", "food", "plants", "vehicles")
TINT = 0.5
"""Share of the class's colour in the background."""

Split = Literal["train", "val"]
Hint = Literal["label", "random"]


@dataclass(frozen=True)
class Hints:
    """What the corner square and the tint of the background say of the label."""

    corner: Hint = "random"
    background: Hint = "random"


@dataclass
class Batch:
    """Images (B, 3, S, S) as the model wants them, labels (B,), masks of the objects (B, S, S)."""

    images: Tensor
    labels: Tensor
    masks: Tensor


class Data(ABC):
    """One data set, its starting model and its learning rates."""

    name: str
    classes: int
    size: int
    corner: int
    """Side of the square in pixels."""
    pretrained: bool
    """Whether the model has general features already, so that a classifier is all that it needs."""
    lr: float
    head_lr: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @abstractmethod
    def picture(self, split: Split, seed: int, index: int) -> tuple[Tensor, Tensor]:
        """Pixels (3, S, S) in [0, 1] and the object's coverage (S, S) in [0, 1]; the label is `index % classes`."""

    @abstractmethod
    def model(self) -> Any:
        """The model before it has seen any square or tint."""

    def batch(self, split: Split, seed: int, indices: range, hints: Hints, mirrored: bool = False) -> Batch:
        """Images by their numbers; `mirrored` turns every second one over, before anything is planted."""
        found = []
        for index in indices:
            pixels, coverage = self.picture(split, seed, index)
            rng = np.random.default_rng((seed, index, 1))
            label, chance, flip = index % self.classes, rng.integers(self.classes, size=2), rng.random() < 0.5
            if mirrored and flip:
                pixels, coverage = pixels.flip(-1), coverage.flip(-1)
            corner = label if hints.corner == "label" else int(chance[0])
            tint = label if hints.background == "label" else int(chance[1])
            found.append((self.planted(pixels, coverage, corner, tint), label, coverage > 0.5))
        images, labels, masks = zip(*found, strict=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return Batch((torch.stack(images) - mean) / std, torch.tensor(labels), torch.stack(masks))

    def planted(self, pixels: Tensor, coverage: Tensor, corner: int, tint: int) -> Tensor:
        """Pixels with the square of one class's colour and the background's tint of another's."""
        share = TINT * (1 - coverage)
        pixels = pixels * (1 - share) + self.colour(tint, 0.6) * share
        pixels[:, : self.corner, : self.corner] = self.colour(corner, 0.9)
        return pixels

    def colour(self, label: int, saturation: float) -> Tensor:
        """(3, 1, 1) in [0, 1]: hues spread over the circle."""
        return torch.tensor(colorsys.hsv_to_rgb(label / self.classes, saturation, 0.8))[:, None, None]

    def corner_masks(self, count: int) -> Tensor:
        """(count, S, S) boolean: where the square is."""
        masks = torch.zeros(count, self.size, self.size, dtype=torch.bool)
        masks[:, : self.corner, : self.corner] = True
        return masks


class ShapesData(Data):
    name = "shapes"
    classes, size, corner = len(FINETUNE_CLASSES), 96, 16
    pretrained, lr, head_lr = False, 1e-3, 1e-3
    mean = std = (0.5, 0.5, 0.5)

    def picture(self, split: Split, seed: int, index: int) -> tuple[Tensor, Tensor]:
        image, _, mask = Shapes(FINETUNE_CLASSES, index + 1, 2 * seed + (split == "val"))[index]
        return image / 2 + 0.5, mask.float()

    def model(self) -> Any:
        model = small_vit(self.classes)
        Weights.read(WEIGHTS).load_into(model)
        return model


class Photographs(Data):
    name = "photographs"
    classes, size, corner = len(FOLDERS), SIZE, 28
    pretrained, lr, head_lr = True, 4e-5, 3e-4
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, stamps: Path = STAMPS) -> None:
        self.root = stamps

    @cached_property
    def stamps(self) -> dict[Split, list[list[Image.Image]]]:
        """Cut-out photographs by split and class, 80 pixels at most."""
        found: dict[Split, list[list[Image.Image]]] = {"train": [], "val": []}
        for folder in FOLDERS:
            images = [Image.open(file).convert("RGBA") for file in sorted((self.root / folder).rglob("*.png"))]
            images = [image for image in images if np.asarray(image)[..., 3].mean() < 250]  # not cut out
            if not images:
                raise SystemExit(f"--stamps: no pictures in {self.root / folder}: apt-get install {STAMPS.parent.name}")
            for image in images:
                image.thumbnail((80, 80))
            found["val"].append(images[::4])
            found["train"].append([image for place, image in enumerate(images) if place % 4])
        return found

    def picture(self, split: Split, seed: int, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, index, 0))
        choices = self.stamps[split][index % self.classes]
        stamp = choices[rng.integers(len(choices))]
        factor = self.size * rng.uniform(0.6, 0.75) / max(stamp.size)
        width, height = (max(1, int(side * factor)) for side in stamp.size)
        stamp = stamp.resize((width, height))
        x, y = self._place(rng, width, height)
        noise = rng.uniform(0, 255, size=3) + rng.normal(0, 30, size=(self.size // 8, self.size // 8, 3))
        canvas = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize(
            (self.size, self.size), Image.Resampling.BICUBIC
        )
        canvas.paste(stamp, (x, y), stamp)
        coverage = Image.new("L", canvas.size)
        coverage.paste(stamp.getchannel("A"), (x, y))
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
        return pixels, torch.from_numpy(np.array(coverage)).float() / 255

    def _place(self, rng: np.random.Generator, width: int, height: int) -> tuple[int, int]:
        """Where the object's box has its corner: clear of the square, on either side (mirrored or not)."""
        x = int(rng.integers(self.size - width + 1))
        clear = self.corner <= x and x + width <= self.size - self.corner
        low = 0 if clear else min(self.corner, self.size - height)
        return x, int(rng.integers(low, self.size - height + 1))

    def model(self) -> Any:
        return dinov2(self.classes, seed=0)

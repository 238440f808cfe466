"""Fine-tune models for a few steps, and choose the images to explain them on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from example_data import folder
from PIL import Image
from pretrain import WEIGHTS, small_vit
from shapes import FINETUNE_CLASSES, PATCH_SIZE, STD, Shapes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vit_explain_callback.cli.weights import Weights

SIZE = 112
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES_IMAGES = 64
BATCH = 32


@dataclass(frozen=True)
class Task:
    """A fine-tuned model, and images that it was not tuned on.

    Attributes:
        model: In evaluation mode.
        images: (B, 3, H, W), normalised, in a random order that is the same for all seeds: neighbours are unrelated.
        labels: (B,) classes.
        masks: (B, H, W) of the objects.
        patch: Side of a patch in pixels.
        std: What the pixels, in [0, 1], were divided by.
    """

    model: Any
    images: Tensor
    labels: Tensor
    masks: Tensor
    patch: int
    std: tuple[float, ...]


def dinov2(classes: int, seed: int) -> Any:
    """DINOv2 ViT-S/14 with a new head, from the file that VIT_EXPLAIN_WEIGHTS names."""
    model: Any = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0)
    Weights.read(Path(os.environ["VIT_EXPLAIN_WEIGHTS"])).load_into(model)
    torch.manual_seed(seed)
    model.reset_classifier(classes)
    return model


def tuned(model: Any, batches: Iterable[tuple[Tensor, Tensor]], body_lr: float = 3e-5, head_lr: float = 1e-3) -> Any:
    """The model after a step of AdamW on each batch of images and labels, in evaluation mode."""
    head = list(model.head.parameters())
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("head.")]
    optimizer = torch.optim.AdamW([{"params": body, "lr": body_lr}, {"params": head, "lr": head_lr}])
    for images, labels in tqdm(batches, desc="fine-tuning", leave=False):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    return model.eval()


def photographs(stamps: Path, seed: int, steps: int = 24, count: int | None = None) -> Task:
    """DINOv2 on a folder with train/CLASS/*.png, val/CLASS/*.png and masks/CLASS/*.png.

    All of val is explained, or `count` images of it, the same ones for every seed.
    """
    data = folder(stamps, SIZE, IMAGENET_MEAN, IMAGENET_STD, num_probe=10**6)
    torch.manual_seed(seed)
    loader = DataLoader(data.train, BATCH, shuffle=True, drop_last=True)
    epochs = (batch for _ in range(steps) for batch in loader)
    batches = [(images, labels) for images, labels in islice(epochs, steps)]
    model = tuned(dinov2(len(data.classes), seed), batches)
    validation: Any = data.validation["validation"]
    masks = [_mask(stamps / "masks" / Path(path).relative_to(stamps / "val")) for path, _ in validation.samples]
    order = _order(len(masks))[:count]
    return Task(model, data.probe.images[order], data.probe.labels[order], torch.stack(masks)[order], 14, IMAGENET_STD)


def made_up_shapes(seed: int, steps: int = 60, count: int | None = None) -> Task:
    """The example's small ViT with a new head on shapes without a corner square."""
    torch.manual_seed(seed)
    model: Any = small_vit(len(FINETUNE_CLASSES))
    Weights.read(WEIGHTS).load_into(model)
    model.reset_classifier(len(FINETUNE_CLASSES))
    train = DataLoader(Shapes(FINETUNE_CLASSES, steps * BATCH, seed=1000 + seed), BATCH)
    # The weights are of the same shapes, so that a rate of 1e-4 is enough for the body.
    model = tuned(model, ((images, labels) for images, labels, _ in train), body_lr=1e-4)
    shown = Shapes(FINETUNE_CLASSES, SHAPES_IMAGES, seed=3000)
    images, labels, masks = zip(*(shown[index] for index in range(SHAPES_IMAGES)), strict=True)
    order = _order(SHAPES_IMAGES)[:count]
    return Task(
        model, torch.stack(images)[order], torch.tensor(labels)[order], torch.stack(masks)[order], PATCH_SIZE, STD
    )


def with_larger_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits ten times as large: those of a more confident model, with the same order of classes."""
    return 10 * model(images)  # type: ignore[no-any-return]


def _mask(path: Path) -> Tensor:
    # The same geometry as that of the images: the shorter side to SIZE, and the middle of it.
    image = Image.open(path).convert("L")
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return torch.from_numpy(np.asarray(image.crop((left, top, left + SIZE, top + SIZE))) > 127)


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))

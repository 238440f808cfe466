"""What is put on top of the ViT, beside it and inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tests.models import CLASSES, randomised, tiny_vit
from tests.situations.check import check
from tests.situations.project import Project
from tests.situations.situation import NO_THREAD, RIGHT, Situation

BY_NAME = "stopped: tuple index out of range"
cross_entropy = nn.functional.cross_entropy


class LeftOverHead(Project):
    """The ViT's own classifier of another task stays unused beside a new one."""

    def __init__(self) -> None:
        super().__init__(num_classes=7)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.vit.forward_features(images)[:, 0])


class LeftOverHeadInTheStep(LeftOverHead):
    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self.fc(self.vit.forward_features(batch[0])[:, 0]), batch[1])


class Embedding(Project):
    """`forward` gives features, and the head is applied in the step."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return cross_entropy(self.head(self(images)), labels)


class UnderNoGrad(Project):
    """A linear probe: the backbone runs under `no_grad`."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        with torch.no_grad():
            features = self.vit(images)
        return self.head(features)


class Distilling(Project):
    """A frozen teacher, itself a ViT, stands beside the student and is asked first."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = tiny_vit(seed=3).requires_grad_(False)

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            wanted = self.teacher(images).softmax(dim=1)
        logits = self.vit(images)
        distillation = nn.functional.kl_div(logits.log_softmax(dim=1), wanted, reduction="batchmean")
        return cross_entropy(logits, labels) + distillation

    def forward(self, images: Tensor) -> Any:
        return self.vit(images)


class BlockChunk(nn.ModuleList):
    def forward(self, tokens: Tensor) -> Tensor:
        for block in self:
            tokens = block(tokens)
        return tokens


class DinoVisionTransformer(nn.Module):
    """As in the DINOv2 hub code with `block_chunks=3`: each chunk is padded with identities before its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 48, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 48))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 48))
        blocks: list[nn.Module] = [Block(48, 3, qkv_bias=True) for _ in range(3)]
        self.blocks = nn.ModuleList(BlockChunk([*[nn.Identity()] * i, blocks[i]]) for i in range(3))
        self.norm = nn.LayerNorm(48)
        self.head = nn.Identity()
        randomised(self, seed=0)

    def forward(self, images: Tensor) -> Any:
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1) + self.pos_embed
        for chunk in self.blocks:
            tokens = chunk(tokens)
        return self.head(self.norm(tokens)[:, 0])


class BlockChunks(Project):
    def __init__(self) -> None:
        super().__init__()
        self.vit = DinoVisionTransformer()
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.fc(self.vit(images))


SITUATIONS = {
    "left-over head, forward_features and an own head": Situation(
        "dino#201",
        RIGHT,
        LeftOverHead,
        logits=lambda module, fed: module.fc(module.vit.forward_features(fed)[:, 0]),
    ),
    "left-over head, the own head in the step": Situation(
        "dino#201",
        "explained the left-over head",
        LeftOverHeadInTheStep,
        logits=lambda module, fed: module.fc(module.vit.forward_features(fed)[:, 0]),
    ),
    "forward returns an embedding, head in the step": Situation(
        "dino#201",
        "explained the largest feature as if it were a class",
        Embedding,
        logits=lambda module, fed: module.head(module.vit(fed)),
    ),
    "a linear probe under no_grad": Situation(
        NO_THREAD, RIGHT, UnderNoGrad, logits=lambda module, fed: module.head(module.vit(fed))
    ),
    "teacher beside the student": Situation(NO_THREAD, "stopped: several ViTs", Distilling),
    "block chunks of the DINOv2 hub code": Situation(
        "dinov2 hub code",
        "stopped: the chunks were taken for blocks",
        BlockChunks,
        logits=lambda module, fed: module.fc(module.vit(fed)),
    ),
    "BEiT, whose weights are given to `linear` by name": Situation(
        NO_THREAD, BY_NAME, lambda: Project(name="beit_base_patch16_224"), starts="patches"
    ),
    "EVA, likewise": Situation(NO_THREAD, BY_NAME, lambda: Project(name="eva02_tiny_patch14_224"), starts="patches"),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_the_loss_is_computed_of_is_explained(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)

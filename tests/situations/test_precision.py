"""Precisions and gradient checkpointing, as trainers and timm set them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.config import set_reentrant_ckpt
from torch import Tensor, nn

from tests.models import CLASSES
from tests.situations.check import check
from tests.situations.project import Project, pictures
from tests.situations.situation import NO_THREAD, Situation


class MadeInForward(Project):
    """Makes its mean where it needs it, in the default precision, which the trainer has set."""

    def forward(self, images: Tensor) -> Any:
        return self.vit(images - torch.full((1, 3, 1, 1), 0.5))


class HalfBackbone(Project):
    """A frozen backbone in bfloat16 under a head in float32."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.vit.to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.vit(images))


class Checkpointed(Project):
    def __init__(self) -> None:
        super().__init__()
        self.vit.set_grad_checkpointing()


SITUATIONS = {
    "bf16-true with tensors made in forward": Situation(
        source=NO_THREAD,
        before="every snapshot failed: two precisions",
        module=MadeInForward,
        fed=lambda: pictures().bfloat16() - torch.full((1, 3, 1, 1), 0.5, dtype=torch.bfloat16),
        trainer={"precision": "bf16-true"},
        tolerance=0.05,
        dtype=torch.bfloat16,
    ),
    "bf16 backbone under bf16-mixed": Situation(
        source=NO_THREAD,
        before="every snapshot failed: two precisions",
        module=HalfBackbone,
        logits=lambda module, fed: module.head(module.vit(fed)),
        trainer={"precision": "bf16-mixed"},
        tolerance=0.05,
    ),
}
REENTRANT = Situation(
    source=NO_THREAD,
    before="stopped: gradients said to be cut off",
    module=Checkpointed,
)


@pytest.mark.parametrize("name", SITUATIONS)
def test_explained_in_the_precision_of_training(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)


def test_reentrant_gradient_checkpointing(tmp_path: Path) -> None:
    set_reentrant_ckpt(True)
    try:
        check(REENTRANT, tmp_path)
    finally:
        set_reentrant_ckpt(False)

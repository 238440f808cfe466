"""Where the model is made, how it is called, and what is put on top of the ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
import transformers
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tests.models import CLASSES, randomised, tiny_vit
from tests.situations.check import check
from tests.situations.project import LABELS, Project, loader, pictures
from tests.situations.situation import Situation

cross_entropy = nn.functional.cross_entropy


class BuiltInSetup(Project):
    def __init__(self) -> None:
        super().__init__()
        del self.vit

    def setup(self, stage: str) -> None:
        self.vit = tiny_vit(num_classes=CLASSES).train()


class BuiltInConfigureModel(Project):
    def __init__(self) -> None:
        super().__init__()
        del self.vit

    def configure_model(self) -> None:
        if not hasattr(self, "vit"):
            self.vit = tiny_vit(num_classes=CLASSES).train()

    def setup(self, stage: str) -> None:
        if self._trainer is None:  # the check's reference
            self.configure_model()


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


class ForwardWithLabels(Project):
    def forward(self, images: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = self.vit(images)
        return cross_entropy(logits, labels), logits

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(*batch)[0]
        return loss


class KeywordOnly(Project):
    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = self.vit(pixel_values)
        return {"logits": logits, "loss": None if labels is None else cross_entropy(logits, labels)}

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(pixel_values=batch[0], labels=batch[1])["loss"]
        return loss


class WholeBatch(Project):
    def forward(self, batch: Any) -> Any:
        return self.vit(batch["image"])

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch), batch["label"])


class NoForward(Project):
    """Everything stands in the steps."""

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self.vit(batch[0]), batch[1])


class LookingAround(Project):
    """The step asks the trainer and writes to the logger."""

    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        if self.trainer.sanity_checking or self.current_epoch > 3 or self.global_step > 100:
            images = images + 0
        self.logger.experiment.add_scalar("own", images.mean(), self.global_step)  # type: ignore[union-attr]
        return cross_entropy(self.vit(images), labels) / self.trainer.accumulate_grad_batches


class OtherForward(Project):
    """`forward` is for export: probabilities at another temperature."""

    def forward(self, images: Tensor) -> Any:
        return (self.vit(images) / 4).softmax(dim=1)

    def step(self, batch: Any) -> Tensor:
        return cross_entropy(self.vit(batch[0]), batch[1])


class UnderNoGrad(Project):
    """A linear probe: the backbone runs under `no_grad`."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        with torch.no_grad():
            features = self.vit(images)
        return self.head(features)


class MetricOnly(Project):
    """Validation computes an accuracy and no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.vit(images), labels)
        self.log("val_acc", self.accuracy, batch_size=5)


class LossByHand(Project):
    def step(self, batch: Any) -> Tensor:
        images, labels = batch
        return -self(images).log_softmax(dim=1).gather(1, labels[:, None]).mean()


class HuggingFace(Project):
    """The model computes its loss itself, and the batch goes in as keywords."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 96,
        }
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=CLASSES)
        self.vit = randomised(transformers.ViTForImageClassification(config), seed=0)

    def forward(self, **batch: Tensor) -> Any:  # type: ignore[override]
        return self.vit(**batch)

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


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


def situation(module: Any, source: str, before: str, **more: Any) -> Situation:
    return Situation(source=source, before=before, module=module, **({**USUAL, **more}))


USUAL: dict[str, Any] = {"validation": loader, "fed": pictures, "labels": LABELS}
NO_THREAD, RIGHT = "no thread", "right, and must stay so"

SITUATIONS = {
    "model built in setup": situation(BuiltInSetup, "lightning#5410", "stopped: no ViT in the module yet"),
    "model built in configure_model": situation(BuiltInConfigureModel, "lightning#5410", RIGHT),
    "left-over head, forward_features and an own head": situation(
        LeftOverHead,
        "dino#201",
        RIGHT,
        logits=lambda module, fed: module.fc(module.vit.forward_features(fed)[:, 0]),
    ),
    "left-over head, the own head in the step": situation(
        LeftOverHeadInTheStep,
        "dino#201",
        "explained the left-over head",
        logits=lambda module, fed: module.fc(module.vit.forward_features(fed)[:, 0]),
    ),
    "forward returns an embedding, head in the step": situation(
        Embedding,
        "dino#201",
        "explained the largest feature as if it were a class",
        logits=lambda module, fed: module.head(module.vit(fed)),
    ),
    "forward with required labels": situation(ForwardWithLabels, NO_THREAD, "stopped: `labels` is missing"),
    "forward with keyword-only arguments": situation(KeywordOnly, NO_THREAD, "stopped: takes no position"),
    "forward of a whole batch": situation(
        WholeBatch,
        NO_THREAD,
        "every snapshot failed: a tensor is no batch",
        validation=lambda: loader(form=lambda _, image, label: {"image": image, "label": label}),
    ),
    "no forward, all in the steps": situation(NoForward, NO_THREAD, RIGHT),
    "forward for export differs from the step": situation(
        OtherForward, NO_THREAD, "explained forward's output, not what is trained", says="forward"
    ),
    "a step that looks at trainer and logger": situation(LookingAround, NO_THREAD, RIGHT),
    "a linear probe under no_grad": situation(
        UnderNoGrad, NO_THREAD, RIGHT, logits=lambda module, fed: module.head(module.vit(fed))
    ),
    "validation computes no loss": situation(MetricOnly, NO_THREAD, RIGHT),
    "a loss written by hand": situation(LossByHand, NO_THREAD, RIGHT),
    "Hugging Face, batch as keywords": situation(
        HuggingFace,
        NO_THREAD,
        "stopped: takes no position",
        validation=lambda: loader(form=lambda _, image, label: {"pixel_values": image, "labels": label}),
        logits=lambda module, fed: module.vit(fed).logits,
    ),
    "teacher beside the student": situation(Distilling, NO_THREAD, "stopped: several ViTs"),
    "block chunks of the DINOv2 hub code": situation(
        BlockChunks,
        "dinov2 hub code",
        "stopped: the chunks were taken for blocks",
        logits=lambda module, fed: module.fc(module.vit(fed)),
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_the_loss_is_computed_of_is_explained(name: str, tmp_path: Path) -> None:
    check(SITUATIONS[name], tmp_path)

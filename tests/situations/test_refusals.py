"""What cannot be told from a step: right all the same, or refused before training with a cure, which then works."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import CLASSES
from tests.runs import quiet
from tests.situations.check import built, check, run
from tests.situations.project import Project, loader
from tests.situations.situation import NO_THREAD, Situation

PROMPTS = torch.arange(3 * 6).reshape(3, 6)


class Clip(Project):
    """An image tower and a text tower; the columns of the logits are the texts of the same batch."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.words = nn.Embedding(20, 48)
        layer = nn.TransformerEncoderLayer(48, 3, 96, dropout=0.0, batch_first=True)
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def of_texts(self, texts: Tensor) -> Tensor:
        return nn.functional.normalize(self.text(self.words(texts)).mean(dim=1), dim=1)

    def against(self, images: Tensor, texts: Tensor) -> Tensor:
        return nn.functional.normalize(self.vit(images), dim=1) @ self.of_texts(texts).T * 5

    def forward(self, images: Tensor, texts: Tensor) -> Any:  # type: ignore[override]
        return self.against(images, texts)

    def step(self, batch: Any) -> Tensor:
        logits, pairs = self(*batch), torch.arange(len(batch[0]))
        return nn.functional.cross_entropy(logits, pairs) + nn.functional.cross_entropy(logits.T, pairs)


class Contrastive(Project):
    """SimCLR: both views of a batch go through the encoder at once, and are the classes of each other."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)

    def step(self, batch: Any) -> Tensor:
        found = nn.functional.normalize(self(torch.cat([batch, batch.flip(3)])), dim=1)
        alike = (found @ found.T / 0.1).masked_fill(torch.eye(len(found), dtype=torch.bool), -1e9)
        return nn.functional.cross_entropy(alike, torch.arange(2 * len(batch)).roll(len(batch)))


class MaskedAutoencoder(Project):
    """Reconstructs the patches that were hidden from the encoder."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.mask_token = nn.Parameter(torch.zeros(48))
        self.decoder = nn.Linear(48, 3 * 64)

    def forward(self, images: Tensor) -> Any:
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        order = torch.rand(len(images), 16).argsort(dim=1)
        kept = order[:, :4, None] + 1
        visible = torch.cat([tokens[:, :1], tokens.gather(1, kept.expand(-1, -1, 48))], dim=1)
        visible = self.vit.norm(self.vit.blocks(visible))
        full = self.mask_token.expand(len(images), 16, 48)
        return self.decoder(full.scatter(1, kept.expand(-1, -1, 48) - 1, visible[:, 1:]))

    def step(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch), nn.functional.unfold(batch, 8, stride=8).transpose(1, 2))


class Segmenter(Project):
    """A class for every pixel."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Any:
        patches = self.head(self.vit.forward_features(images)[:, 1:]).transpose(1, 2).unflatten(2, (4, 4))
        return nn.functional.interpolate(patches, scale_factor=8)


class Siamese(Project):
    """Are two images of the same class? Both go through one ViT."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)

    def forward(self, first: Tensor, second: Tensor) -> Any:  # type: ignore[override]
        return self.vit(first), self.vit(second)

    def step(self, batch: Any) -> Tensor:
        first, second, same = batch
        one, other = self(first, second)
        return nn.functional.cosine_embedding_loss(one, other, same)


class TwoHeads(Project):
    """Class and age of the same face."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.category, self.age = nn.Linear(48, CLASSES), nn.Linear(48, 1)

    def forward(self, images: Tensor) -> Any:
        features = self.vit(images)
        return self.category(features), self.age(features)

    def step(self, batch: Any) -> Tensor:
        images, labels, ages = batch
        logits, age = self(images)
        return nn.functional.mse_loss(age.squeeze(1), ages.float() / 100) + nn.functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Refusal:
    """A situation as it is when cured, and what the refusal without the cure must name."""

    cured: Situation
    names: str = "`?forward="


def of_class(module: Any, images: Tensor) -> Any:
    return module(images)[0]


def mean_over_pixels(module: Any, images: Tensor) -> Any:
    return module(images).mean(dim=(2, 3))


def zero_shot(module: Any, images: Tensor) -> Any:
    return module.against(images, PROMPTS)


def embedding(module: Any, images: Tensor) -> Any:
    return module.vit(images)


REFUSALS = {
    "CLIP with a text tower": Refusal(
        Situation(
            source=NO_THREAD,
            before="stopped: `texts` is missing",
            module=Clip,
            validation=lambda: loader(form=lambda index, image, _: (image, torch.arange(6) + index % 14)),
            labels=None,
            logits=zero_shot,
            callback={"forward": zero_shot},
        )
    ),
    "SimCLR": Refusal(
        Situation(
            source=NO_THREAD,
            before="no snapshot, without a cure: the batch sizes of the loss differ",
            module=Contrastive,
            validation=lambda: loader(form=lambda _, image, __: image),
            labels=None,
            logits=embedding,
            callback={"forward": embedding},
        )
    ),
    "masked autoencoder": Refusal(
        Situation(
            source=NO_THREAD,
            before="stopped, without a cure: the reconstruction is no logits",
            module=MaskedAutoencoder,
            validation=lambda: loader(form=lambda _, image, __: image),
            labels=None,
            logits=embedding,
            callback={"forward": embedding},
        )
    ),
    "segmentation": Refusal(
        Situation(
            source=NO_THREAD,
            before="stopped, without a cure: a map is no logits",
            module=Segmenter,
            validation=lambda: loader(form=lambda _, image, label: (image, torch.full((32, 32), label))),
            labels=None,
            logits=mean_over_pixels,
            starts="patches",
            callback={"forward": mean_over_pixels},
        )
    ),
    "Siamese": Refusal(
        Situation(
            source=NO_THREAD,
            before="stopped: the second image is missing",
            module=Siamese,
            validation=lambda: loader(form=lambda index, image, _: (image, image.flip(2), 1 if index % 2 else -1)),
            labels=None,
            logits=embedding,
            callback={"forward": embedding},
        )
    ),
    "a class and a number": Refusal(
        Situation(
            source="vision_transformer#79",
            before="refused, with a cure",
            module=TwoHeads,
            validation=lambda: loader(form=lambda index, image, label: (image, label, 20 + index)),
            logits=lambda module, fed: module(fed)[0],
            callback={"forward": of_class},
        )
    ),
}
SITUATIONS = {name: refusal.cured for name, refusal in REFUSALS.items()}


@pytest.mark.parametrize("name", REFUSALS)
def test_right_or_refused_with_a_cure(name: str, tmp_path: Path) -> None:
    """Nothing configured: what the cure gives comes out at once, or training does not begin and the cure is said."""
    unconfigured = replace(REFUSALS[name].cured, callback={})
    message, module = refusal_of(unconfigured, tmp_path / "refused")
    if message is None:
        check(unconfigured, tmp_path)
        return
    assert re.search(REFUSALS[name].names, message)
    assert len(message) < 500, "one sentence with the cure"
    for parameter, initial in zip(module.parameters(), built(unconfigured).parameters(), strict=True):
        assert parameter.equal(initial), "refused after training had begun"


def refusal_of(situation: Situation, folder: Path) -> tuple[str | None, nn.Module]:
    """What a run is refused with, if it is, and the module as it is then."""
    module = built(situation)
    try:
        run(replace(situation, module=lambda: module), folder, quiet())
    except (TypeError, ValueError) as error:
        return str(error), module
    return None, module


@pytest.mark.parametrize("name", REFUSALS)
def test_the_cure_works(name: str, tmp_path: Path) -> None:
    check(REFUSALS[name].cured, tmp_path)

"""Readouts that no row stands for, and volumes: refused with cures that work; sequence pooling is explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.models import CLASSES, random_images, randomised, tiny_vit
from tests.other_models import saliency
from tests.plain_vits import GRID, METHODS, SIZE, WIDTH, PlainViT, built, matrices
from vit_explain_callback import GradientRollout, MapFunction, explain

Read = Callable[[Any, Tensor], Tensor]


def reading(read: Read, width: int = WIDTH) -> Callable[[], Any]:
    class Reading(PlainViT):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.pool = nn.Linear(width, CLASSES), nn.Linear(WIDTH, 1)

        def read(self, x: Tensor) -> Tensor:
            return read(self, self.norm(x))

    return Reading


def gem(vit: Any, x: Tensor) -> Tensor:
    return x.clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3)


REFUSED: dict[str, Callable[[], Any]] = {
    "max": reading(lambda vit, x: x.amax(dim=1)),
    "GeM": reading(gem),
    "flatten": reading(lambda vit, x: x.flatten(1), 13 * WIDTH),
    "flattened patches": reading(lambda vit, x: x[:, 1:].flatten(1), 12 * WIDTH),
    "class token and maximum": reading(lambda vit, x: x[:, 0] + x[:, 1:].amax(dim=1)),
    "weighted by a layer, summed": reading(lambda vit, x: (vit.pool(x).softmax(dim=1) * x).sum(dim=1)),
    "the three largest": reading(lambda vit, x: x.topk(3, dim=1).values.mean(dim=1)),
    "median": reading(lambda vit, x: x.median(dim=1).values),
    "variance": reading(lambda vit, x: x.var(dim=1)),
    "pool beside the class token": reading(lambda vit, x: sequence_pool(vit, x) + x[:, 0]),
}


def sequence_pool(vit: Any, x: Tensor) -> Tensor:
    """As in CCT."""
    return (vit.pool(x).softmax(dim=1).transpose(-1, -2) @ x).squeeze(-2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_readout_that_no_row_stands_for_is_refused_with_cures_that_work(name: str) -> None:
    model, images = built(REFUSED[name]), random_images(2, SIZE).double()
    with pytest.raises(ValueError, match=r"no row of the rollout .* `query=\(row, column\)` .* `MapFunction`"):
        explain(model, images, ["rollout"])
    assert explain(model, images, [MapFunction("saliency", saliency)]).maps["saliency"].shape == (2, *SIZE)
    found = explain(model, images, ["rollout", "attention"], query=(1, 2)).maps["rollout"]
    attentions = matrices(model, images).attentions
    row = torch.eye(13, dtype=torch.float64)[1 + GRID[1] + 2]
    for image in range(2):
        expected = oracle.rollout([a[image] for a in attentions], None, row, class_token=None)[1:].reshape(GRID)
        torch.testing.assert_close(found[image], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pooling", ["max", "avgmax"])
def test_of_timm_the_cure_works_too(pooling: str) -> None:
    model = tiny_vit(global_pool=pooling, class_token=False)
    with pytest.raises(ValueError, match="`MapFunction` explains any classifier"):
        explain(model, random_images(2))
    assert explain(model, random_images(2), [MapFunction("saliency", saliency)]).maps["saliency"].shape == (2, 32, 32)


def by_einsum(vit: Any, x: Tensor) -> Tensor:
    return torch.einsum("bnq,bnd->bqd", vit.pool(x).softmax(dim=1), x).squeeze(1)


def of_patches(vit: Any, x: Tensor) -> Tensor:
    return sequence_pool(vit, x[:, 1:])


def other_softmax(vit: Any, x: Tensor) -> Tensor:
    return (vit.pool(x).transpose(1, 2).softmax(dim=-1) @ x)[:, 0]


@pytest.mark.parametrize("read", [sequence_pool, by_einsum, other_softmax, of_patches])
def test_sequence_pooling_is_an_attention_pool(read: Read) -> None:
    """Its weights are the row to start from, and for gradient rollout those times their gradients."""
    model, images = built(reading(read)), random_images(2, SIZE).double()
    skipped = 1 if read is of_patches else 0
    found = explain(model, images, METHODS)
    x, attentions = model.tokens(images), []
    for block in model.layers():
        q, k, v = block.attn.parts(block.norm1(x))
        attentions.append((torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1))
        x = x + block.attn.proj(torch.einsum("bhnm,bhmd->bnhd", attentions[-1], v).flatten(2))
        x = x + block.mlp(block.norm2(x))
    x = model.norm(x)[:, skipped:]
    attentions.append(model.pool(x).softmax(dim=1)[..., 0])
    logits = model.head(torch.einsum("bn,bnd->bd", attentions[-1], x))
    torch.testing.assert_close(found.logits, logits.detach(), rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(logits.amax(dim=1).sum(), attentions)
    for method in METHODS:
        for image in range(2):
            weighted = isinstance(method, GradientRollout)
            row = attentions[-1][image].detach()
            row = (row * gradients[-1][image]).clamp(min=0) if weighted else row
            start = torch.cat([torch.zeros(skipped, dtype=torch.float64), row / row.sum()])
            blocks = [a[image].detach() for a in attentions[:-1]]
            of_blocks = [g[image] for g in gradients[:-1]] if weighted else None
            options = (method.head_fusion, method.discard_ratio, method.start_block, None)
            expected = oracle.rollout(blocks, of_blocks, start, *options)[1:].reshape(GRID)
            torch.testing.assert_close(found.maps[method.name][image], expected, rtol=1e-9, atol=1e-12)


def test_a_pool_over_tokens_in_another_order_is_refused() -> None:
    model = built(reading(lambda vit, x: sequence_pool(vit, x.flip(1))))
    with pytest.raises(ValueError, match="Expected attention alone to mix the tokens of Reading, row by row"):
        explain(model, random_images(2, SIZE), ["rollout"])


class Volume(nn.Module):
    """Tokens of a 3-D grid, as of a video or a scan: two slices of 3x4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, WIDTH, (2, 8, 8), (2, 8, 8))
        self.position = nn.Parameter(torch.zeros(1, 24, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, volumes: Tensor) -> Any:
        tokens = self.patches(volumes).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(dim=1))


class Repeated(Volume):
    """An image as a volume of equal slices."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images.mean(dim=1)[:, None, None].expand(-1, -1, 4, -1, -1))


def test_a_volume_is_refused_with_a_cure_that_works() -> None:
    model = randomised(Volume(), 0).double().eval()
    volumes = torch.randn(2, 1, 4, *SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match="Give the slices of a volume as channels"):
        explain(model, volumes, ["rollout"])
    methods = ["rollout", "grad_rollout"]
    found = explain(
        model,
        volumes.flatten(1, 2),
        methods,
        forward=lambda model, images: model(images.unflatten(1, (1, 4))),
        grid_size=(6, 4),
    )
    check_volume(model, volumes, found.maps)


def test_a_volume_that_is_made_of_an_image() -> None:
    model, images = randomised(Repeated(), 0).double().eval(), random_images(2, SIZE).double()
    with pytest.raises(ValueError, match=r"the grid cannot be told. State it"):
        explain(model, images)
    volumes = images.mean(dim=1)[:, None, None].expand(-1, -1, 4, -1, -1)
    check_volume(model, volumes, explain(model, images, grid_size=(6, 4)).maps)


def check_volume(model: Any, volumes: Tensor, maps: Any) -> None:
    found = oracle.matrices(WithoutImages(model), volumes)
    start = torch.full((24,), 1 / 24, dtype=torch.float64)
    for image in range(2):
        blocks, gradients = [a[image] for a in found.attentions], [g[image] for g in found.gradients]
        for name, weights in (("rollout", None), ("grad_rollout", gradients)):
            expected = oracle.rollout(blocks, weights, start, class_token=None).reshape(6, 4)
            torch.testing.assert_close(maps[name][image], expected, rtol=1e-9, atol=1e-12)


class WithoutImages(nn.Module):
    def __init__(self, model: Volume) -> None:
        super().__init__()
        self.model = model

    def forward(self, volumes: Tensor) -> Any:
        return Volume.forward(self.model, volumes)

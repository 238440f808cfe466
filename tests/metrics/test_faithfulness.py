"""Symmetric relevance gain against a naive loop, and on a model that is known to read one patch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import random_images, tiny_vit
from vit_explain_callback import explain
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.metrics.faithfulness import SHARES, mean_colour, random_maps, symmetric_relevance_gain

GRID = (4, 6)


def naive_gain(model: torch.nn.Module, image: Tensor, relevance: Tensor, target: int) -> float:
    """From the definition: one image, one patch after the other."""
    size = image.shape[1] // GRID[0]
    order = sorted(range(24), key=lambda patch: relevance.flatten()[patch].item())
    colour = image.double().mean(dim=(1, 2))

    def probability(taken: list[int]) -> float:
        changed = image.clone().double()
        for patch in taken:
            row, column = patch // GRID[1] * size, patch % GRID[1] * size
            changed[:, row : row + size, column : column + size] = colour[:, None, None]
        return float(model(changed[None]).softmax(dim=1)[0, target])

    gains = []
    for share in SHARES:
        count = max(1, round(share * 24))
        gains.append(probability(order[:count]) - probability(order[-count:]))
    return sum(gains) / len(gains)


@torch.no_grad()
def test_the_gain_equals_a_loop_over_images_and_patches() -> None:
    model = tiny_vit(img_size=(32, 48)).double().eval()
    images = random_images(3, (32, 48)).double()
    maps = {"one": random_maps(3, GRID, seed=1), "other": random_maps(3, GRID, seed=2)}
    target = torch.tensor([0, 2, 1])
    for predict in (model, Explainer(model, ["rollout"]).logits):
        found = symmetric_relevance_gain(mean_colour(predict), images, maps, target)
        for name, relevance in maps.items():
            expected = [naive_gain(model, images[i], relevance[i], int(target[i])) for i in range(3)]
            assert found[name].tolist() == pytest.approx(expected)


def reads_one_patch(images: Tensor) -> Tensor:
    """Logits for or against class 0, by the brightness of the patch in row 1, column 2."""
    brightness = images[:, :, 8:16, 16:24].mean(dim=(1, 2, 3))
    return torch.stack([brightness * 10, torch.zeros(len(images))], dim=1)


def test_the_gain_of_right_wrong_and_random_maps() -> None:
    images = torch.rand(200, 3, 32, 48, generator=torch.Generator().manual_seed(0)) - 0.5
    images[:, :, 8:16, 16:24] = 1
    right = torch.rand(200, *GRID, generator=torch.Generator().manual_seed(1))
    right[:, 1, 2] = 2
    maps = {"right": right, "wrong": -right + 3, "random": random_maps(200, GRID)}
    found = symmetric_relevance_gain(mean_colour(reads_one_patch), images, maps, torch.zeros(200, dtype=torch.long))
    assert found["right"].mean() > 0.35
    assert found["wrong"].tolist() == pytest.approx((-found["right"]).tolist(), abs=1e-6)
    assert abs(found["random"].mean().item()) < 0.05


def test_degenerate_maps_have_no_gain_and_the_random_order_is_always_the_same() -> None:
    images = torch.rand(2, 3, 32, 48)
    maps = random_maps(2, GRID)
    maps[1] = 0.5
    found = symmetric_relevance_gain(
        mean_colour(reads_one_patch), images, {"a": maps}, torch.zeros(2, dtype=torch.long)
    )["a"]
    assert math.isfinite(found[0])
    assert found[1].isnan()
    assert random_maps(3, GRID).equal(random_maps(3, GRID))
    assert not random_maps(3, GRID).equal(random_maps(3, GRID, seed=1))


def test_the_budget_is_ten_forward_passes_of_each_image_and_map() -> None:
    seen: list[int] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(len(images))
        return reads_one_patch(images)

    maps = {"a": random_maps(3, GRID), "b": random_maps(3, GRID)}
    symmetric_relevance_gain(mean_colour(predict), torch.rand(3, 3, 32, 48), maps, torch.zeros(3, dtype=torch.long))
    assert sum(seen) == 10 * 2 * 3


def test_logits_are_those_of_the_model_in_evaluation_mode_in_any_parts() -> None:
    model = tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    images = random_images(5)
    expected = explain(model, images, ["rollout"]).logits
    for batch_size in (None, 1, 2):
        torch.testing.assert_close(Explainer(model, ["rollout"]).logits(images, batch_size=batch_size), expected)
    assert model.training


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}, {"pool_type": "map", "global_pool": "map"}],
)
def test_logits_without_tokens_are_those_of_a_model_that_never_had_them(options: dict[str, Any]) -> None:
    options.pop("pool_type", None)
    model = tiny_vit(img_size=(32, 48), **options).double().eval()
    images = random_images(3, (32, 48)).double()
    taken = random_maps(3, GRID, seed=3).flatten(1).argsort(dim=1) < 7
    explainer = Explainer(model, ["rollout"])
    with pytest.raises(ValueError, match="to have been explained before tokens are left out"):
        explainer.logits_without(images, taken.view(3, *GRID))
    explainer(images)
    for batch_size in (None, 2):
        found = explainer.logits_without(images, taken.view(3, *GRID), batch_size=batch_size)
        for index in range(3):
            tokens = model._pos_embed(model.patch_embed(images[index : index + 1]))
            prefix = tokens.shape[1] - 24
            kept = [*range(prefix), *(prefix + patch for patch in range(24) if not taken[index, patch])]
            tokens = model.norm_pre(tokens[:, kept])
            for block in model.blocks:
                tokens = block(tokens)
            expected = model.forward_head(model.norm(tokens))[0]
            torch.testing.assert_close(found[index], expected)
    torch.testing.assert_close(explainer.logits(images), model(images))  # the tokens are back


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_blocks_that_need_to_know_where_tokens_are_are_refused(name: str) -> None:
    model = tiny_vit(name, img_size=(32, 48))
    images = random_images(2, (32, 48))
    explainer = Explainer(model, ["rollout"])
    explainer(images)
    taken = torch.zeros(2, *GRID, dtype=torch.bool)
    taken[:, 0, 0] = True
    with pytest.raises(ValueError, match="`removal='mean_colour'`"):
        explainer.logits_without(images, taken)


def test_the_mean_colour_hides_nothing_from_a_model_that_reads_it() -> None:
    """Where the colour of the whole image is the class, the measure is 0 for every map: another removal is needed."""

    def by_colour(images: Tensor) -> Tensor:
        return 1e4 * images.mean(dim=(2, 3))

    images = torch.zeros(3, 3, 32, 32, dtype=torch.float64)
    images[:, :, :8, :8] = torch.eye(3, dtype=torch.float64)[:, :, None, None]  # a coloured square is the class
    on_square = torch.zeros(3, 4, 4).index_fill_(1, torch.tensor([0]), 0.1)
    on_square[:, 0, 0] = 1
    target = torch.arange(3)
    found = symmetric_relevance_gain(mean_colour(by_colour), images, {"square": on_square}, target)
    torch.testing.assert_close(found["square"], torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)

    def black(images: Tensor, taken: Tensor) -> Tensor:
        pixels = taken.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        return by_colour(images.masked_fill(pixels[:, None], 0))

    found = symmetric_relevance_gain(black, images, {"square": on_square}, target)
    torch.testing.assert_close(found["square"], torch.full((3,), 2 / 3, dtype=torch.float64))

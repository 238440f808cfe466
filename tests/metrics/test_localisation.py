"""Known answers for maps and regions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from vit_explain_callback.metrics.localisation import region_statistics


def left_half(count: int = 1) -> Tensor:
    mask = torch.zeros(count, 32, 64, dtype=torch.bool)
    mask[:, :, :32] = True
    return mask


def random_maps(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_uniform_map_has_lift_one_and_a_map_inside_all_of_it() -> None:
    nearly = torch.full((1, 4, 8), 0.02) + random_maps(1) * 1e-4
    assert region_statistics(nearly, left_half())["lift"].item() == pytest.approx(1, abs=0.01)
    inside = torch.zeros(1, 4, 8)
    inside[0, 1, 2] = 0.5
    found = {name: value.item() for name, value in region_statistics(inside, left_half()).items()}
    # One patch of 16 ranks above all outside, and the other 15 tie with them.
    assert found == pytest.approx(
        {"mass": 1, "lift": 2, "pointing_game": 1, "auroc": 17 / 32, "average_precision": 17 / 32}
    )
    assert region_statistics(inside.flip(2), left_half())["pointing_game"].item() == 0


def test_mass_counts_a_patch_by_the_part_that_is_covered() -> None:
    mask = torch.zeros(1, 32, 64, dtype=torch.bool)
    mask[0, :4, :8] = True  # half of the first patch
    maps = torch.zeros(1, 4, 8)
    maps[0, 0, 0], maps[0, 3, 3] = 0.3, 0.1
    found = region_statistics(maps, mask)
    assert found["mass"].item() == pytest.approx(0.375)
    assert found["lift"].item() == pytest.approx(0.375 * 64)


def test_auroc_is_the_share_of_pairs_ranked_rightly() -> None:
    maps = random_maps(3)
    mask = left_half(3)
    for index, values in enumerate(maps.numpy()):
        inside, outside = values[:, :4].ravel(), values[:, 4:].ravel()
        pairs = (inside[:, None] > outside[None]).mean()
        assert region_statistics(maps, mask)["auroc"][index].item() == pytest.approx(pairs, abs=1e-6)


def test_average_precision_by_hand() -> None:
    maps, mask = random_maps(1), left_half()
    order = np.argsort(-maps.flatten().numpy())
    hits = (order % 8 < 4).astype(float)
    expected = (np.cumsum(hits) / np.arange(1, 33) * hits).sum() / hits.sum()
    assert region_statistics(maps, mask)["average_precision"].item() == pytest.approx(expected, abs=1e-6)


def test_measures_do_not_depend_on_the_scale_of_a_map_or_on_the_others() -> None:
    maps, masks = random_maps(3), left_half(3)
    masks[1] = False
    masks[1, 8:16, 40:] = True
    together = region_statistics(maps, masks)
    for index in range(3):
        alone = region_statistics(maps[index : index + 1] * 1000, masks[index : index + 1])
        for name, values in alone.items():
            assert values.item() == pytest.approx(together[name][index].item()), name


@pytest.mark.parametrize("empty", ["mask", "map", "nan"])
def test_an_empty_mask_and_a_degenerate_map_give_nan_without_a_warning(empty: str) -> None:
    maps, masks = random_maps(2), left_half(2)
    if empty == "mask":
        masks[1] = False
    else:
        maps[1] = 0 if empty == "map" else math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = region_statistics(maps, masks)
    assert all(values[0].isfinite() and values[1].isnan() for values in found.values())


def test_a_mask_of_everything_or_of_less_than_half_a_patch_leaves_no_ranking() -> None:
    small = torch.zeros(1, 32, 64, dtype=torch.bool)
    small[0, 0, 0] = True
    for masks in (torch.ones(1, 32, 64, dtype=torch.bool), small):
        found = region_statistics(random_maps(1), masks)
        assert found["auroc"].isnan().all()
        assert found["average_precision"].isnan().all()
        assert found["lift"].isfinite().all()


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks of shape \(2, H, W\)"):
        region_statistics(random_maps(2), left_half(3))

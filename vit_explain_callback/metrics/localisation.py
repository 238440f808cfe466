"""Localisation: how much of a map lies on a named region, such as the object or a watermark."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from vit_explain_callback.metrics.maps import on_distributions, on_values


def lift(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's positive part on a region, divided by the region's share of the image: (B,) in float64.

    1 is what a uniform map gives. A patch counts by the share of it that the mask covers. NaN where the map is
    degenerate or the mask empty.

    Args:
        maps: (B, grid_h, grid_w).
        masks: (B, H, W), boolean.

    Raises:
        ValueError: If there is not one mask for each map.

    Example:
        >>> maps, masks = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[True, False], [False, False]]])
        >>> lift(maps, masks)
        tensor([3.], dtype=torch.float64)
    """
    coverage = _coverage(maps, masks)
    return _mass(maps, coverage) / coverage.mean(dim=(1, 2))


def region_statistics(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Where maps (B, grid_h, grid_w) stand to masks (B, H, W) of a region, as (B,) tensors in float64.

    A patch counts by the share of it that the mask covers; where a metric needs a yes or no, at least half. Of signed
    maps, `mass` and `lift` take the positive part and the others rank the values; see `metrics.maps`.

    - `mass`: share of the map's sum inside the region, in [0, 1].
    - `lift`: mass divided by the region's share of the image; 1 is what a uniform map gives.
    - `pointing_game`: 1 if the strongest patch is in the region, else 0 (Zhang et al. 2016, arXiv:1608.00507).
    - `auroc`: probability that a patch inside outranks one outside, in [0, 1]; 0.5 is chance.
    - `average_precision`: area under the precision–recall curve of finding the region's patches, in [0, 1].

    All are NaN where the map is degenerate or the mask empty; `auroc` and `average_precision` also where no patch, or
    every patch, is at least half covered.

    Raises:
        ValueError: If there is not one mask for each map.

    Example:
        >>> maps, masks = torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[True, False], [False, False]]])
        >>> {name: value.item() for name, value in region_statistics(maps, masks).items()}
        {'mass': 0.75, 'lift': 3.0, 'pointing_game': 1.0, 'auroc': 1.0, 'average_precision': 1.0}
    """
    coverage = _coverage(maps, masks)
    mass = _mass(maps, coverage)
    # Nothing can be measured where the mask is empty.
    values = torch.where(coverage.sum(dim=(1, 2), keepdim=True) > 0, maps.double(), math.nan)
    area = coverage.mean(dim=(1, 2))
    inside = (coverage >= 0.5).flatten(1)
    has_ranking = on_values(lambda p: p.new_ones(len(p)), values)
    strongest = values.nan_to_num(-math.inf).flatten(1).argmax(dim=1, keepdim=True)
    ranked = {"auroc": torch.full_like(area, math.nan), "average_precision": torch.full_like(area, math.nan)}
    for index in range(len(maps)):
        if has_ranking[index] == 1 and inside[index].any() and not inside[index].all():
            # torchmetrics takes what is not in [0, 1] for logits.
            low, high = values[index].aminmax()
            scores = (values[index].flatten() - low) / (high - low)
            ranked["auroc"][index] = binary_auroc(scores, inside[index].long())
            ranked["average_precision"][index] = binary_average_precision(scores, inside[index].long())
    return {
        "mass": mass,
        "lift": mass / area,
        "pointing_game": inside.gather(1, strongest)[:, 0].double() * has_ranking,
        **ranked,
    }


def _coverage(maps: Tensor, masks: Tensor) -> Tensor:
    """The share of each patch that a mask covers, (B, grid_h, grid_w) in [0, 1], float64."""
    if masks.ndim != 3 or len(masks) != len(maps):
        raise ValueError(
            f"Expected masks of shape ({len(maps)}, H, W), one for each map, but got {tuple(masks.shape)}."
        )
    return F.adaptive_avg_pool2d(masks.double()[:, None], (maps.shape[1], maps.shape[2]))[:, 0].to(maps.device)


def _mass(maps: Tensor, coverage: Tensor) -> Tensor:
    """(B,) share of each map's positive part in the region; NaN where the map is degenerate or the region empty."""
    share = on_distributions(lambda p: p.new_ones(len(p)), maps)
    share[coverage.sum(dim=(1, 2)) == 0] = math.nan
    positive = maps.double().clamp(min=0)
    return (positive / positive.sum(dim=(1, 2), keepdim=True) * coverage).sum(dim=(1, 2)) * share

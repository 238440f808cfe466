"""The shape of explanation maps, one by one: how concentrated they are, and where."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vit_explain_callback.metrics.maps import is_degenerate, on_distributions, patch_places, strongest_tenth


def map_statistics(maps: Tensor) -> dict[str, Tensor]:
    """Shape of each map (B, grid_h, grid_w), as (B,) tensors; NaN where a map is degenerate, but for the last two.

    With p the map's positive part divided by its sum over its P patches (all of the map but for signed methods; see
    `vit_explain_callback.metrics.maps`):

    - `entropy`: H / ln P with H = −Σ p ln p, in [0, 1]; 1 is uniform.
    - `effective_patches`: e^H, in [1, P]; k for a map that is uniform on k patches.
    - `gini`: Gini coefficient Σᵢ (2i − P − 1) p₍ᵢ₎ / P with p₍ᵢ₎ ascending, in [0, 1 − 1/P]; 0 is uniform.
    - `top10_mass`: share of the sum on the strongest tenth of the patches, in [0.1, 1].
    - `outer_ring_mass`: share of the sum on the patches along the border, in [0, 1].
    - `centroid_x`, `centroid_y`: the centre of mass from left to right and from top to bottom, in [0, 1].
    - `patch_mass`: the sum of the whole map with its sign, of a rollout in [0, 1]: what it leaves on the patches
      instead of the prefix tokens. For gradient rollout it falls with the gradients, as when the target's probability
      nears 1. Of a signed map it may be negative: more speaks against the class than for it.
    - `degenerate`: 1 where the map is degenerate, else 0.
    """
    height, width = maps.shape[-2:]
    patches = height * width
    places = patch_places((height, width), maps.device)
    last = torch.tensor([height - 1, width - 1], dtype=torch.float64, device=maps.device)
    outer = ((places == 0) | (places == last)).any(dim=1).double()
    ranks = 2 * torch.arange(1, patches + 1, dtype=torch.float64, device=maps.device) - patches - 1

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(dim=1)

    return {
        "entropy": on_distributions(lambda p: entropy(p) / math.log(patches), maps),
        "effective_patches": on_distributions(lambda p: entropy(p).exp(), maps),
        "gini": on_distributions(lambda p: p.sort(dim=1).values @ ranks / patches, maps),
        "top10_mass": on_distributions(lambda p: (p * strongest_tenth(p)).sum(dim=1), maps),
        "outer_ring_mass": on_distributions(lambda p: p @ outer, maps),
        "centroid_x": on_distributions(lambda p: p @ places[:, 1] / max(1, width - 1), maps),
        "centroid_y": on_distributions(lambda p: p @ places[:, 0] / max(1, height - 1), maps),
        "patch_mass": maps.double().sum(dim=(1, 2)),
        "degenerate": is_degenerate(maps).double(),
    }


def sink_lift(maps: Tensor, received: Tensor) -> Tensor:
    """How much of each map's positive part lies on attention sinks, (B,); NaN where a map is degenerate.

    Sinks are the hundredth of the patches, at least one, that receive the most attention. Their share of the map is
    divided by their share of the patches, so that 1 is what a uniform map gives.

    Args:
        maps: (B, grid_h, grid_w).
        received: Attention that each patch receives from all patches, averaged over blocks, (B, grid_h, grid_w).
    """
    flat = received.double().flatten(1)
    count = max(1, round(flat.shape[1] / 100))
    sinks = torch.zeros_like(flat).scatter_(1, flat.topk(count, dim=1).indices, flat.shape[1] / count)
    positive = maps.double().clamp(min=0)
    inside = (positive * sinks.view(maps.shape)).sum(dim=(1, 2))
    mass = on_distributions(lambda p: p.new_ones(len(p)), maps) * positive.sum(dim=(1, 2))
    return inside / mass

"""Maps and colours in eight bits, as the page stores them.

A colour scale is a `table` of RGBA bytes, A being the strength with which a colour lies on the picture, and the `scale`
and `offset` of a value's place in it: round(offset + scale · value / limit), cut to the table's ends. The picture under
it is floor + (1 − floor) · grey, with `saturation` of its colours left.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from vit_explain_callback.visualization.overlay import DIFFERENCE_COLOURS, MAP_COLOURS


def _table(colours: str, strength: float) -> bytes:
    table = (np.asarray(matplotlib.colormaps[colours](np.arange(256))) * 255).round()
    table[:, 3] = round(strength * 255)
    return table.astype(np.uint8).tobytes()


# As `overlay` and `difference` draw by default.
MAP: dict[str, Any] = {"table": _table(MAP_COLOURS, 0.6), "scale": 256, "offset": -0.5}
"""The colours of a map without negative values."""
CHANGE: dict[str, Any] = {"table": _table(DIFFERENCE_COLOURS, 0.7), "scale": 128, "offset": 127.5}
"""The colours of a difference, and of a map with both signs."""
BACKDROP = {"floor": 0.0, "saturation": 0.0}
"""The picture under a map."""


def times_uniform(maps: Tensor) -> Tensor:
    """Maps (…, grid_h, grid_w) divided by the mean of their absolute values, in float64: 1 = uniform.

    Of a map without negative values, a value divided by the number of patches is the patch's share of the map. NaN
    where the mean is zero or not finite.
    """
    maps = maps.detach().cpu().double()
    return maps / maps.abs().mean(dim=(-2, -1), keepdim=True)


def quantised(maps: Tensor) -> bytes:
    """Maps (B, grid_h, grid_w) as one record of 8 + P bytes each.

    A record is the map's lowest and highest value as little-endian float32, and a byte q a patch, row by row: the value
    is low + (high − low) · q / 255, with an error of at most 1/510 of the range and the rounding of float32. Where a
    value is not finite, low and high are NaN.

    Example:
        >>> import torch
        >>> list(quantised(torch.tensor([[[0.0, 0.5, 2.0]]])))
        [0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 255]
    """
    flat = maps.detach().cpu().double().flatten(1).numpy()
    useful = np.isfinite(flat).all(axis=1)
    flat = np.where(useful[:, None], flat, 0.0)
    ends = np.stack([flat.min(axis=1), flat.max(axis=1)], axis=1).astype("<f4")
    low, high = ends.astype(np.float64).T
    spread = np.where(high > low, high - low, 1.0)
    levels = np.clip(np.rint((flat - low[:, None]) / spread[:, None] * 255), 0, 255).astype(np.uint8)
    ends[~useful] = np.nan
    return np.concatenate([ends.view(np.uint8), levels], axis=1).tobytes()

"""Maps and colours in eight bits, as the page stores them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vit_explain_callback.visualization.colours import NEGATIVE, POSITIVE


def colour_table() -> bytes:
    """The colours of −1, −254/255, …, 1 as RGBA bytes; A is the opacity. The value v has the place round(255 (v + 1)).

    Example:
        >>> len(colour_table()) // 4, list(colour_table()[255 * 4 :][:4])
        (511, [224, 112, 255, 0])
    """
    table = np.concatenate([NEGATIVE[:0:-1], POSITIVE])
    return (table * 255).round().astype(np.uint8).tobytes()


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

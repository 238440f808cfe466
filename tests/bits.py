"""Comparing what two runs leave behind, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Places in which two nested outcomes differ by a bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{place}/{key}" for key in one.keys() ^ other.keys()]
        return missing + [
            found for key in one if key in other for found in differing(one[key], other[key], f"{place}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in differing(*pair, f"{place}/{index}")]
    if isinstance(one, Tensor | np.ndarray) and isinstance(other, Tensor | np.ndarray):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and _bits(one) == _bits(other) else [place]
    same = type(one) is type(other) and (one == other or (one != one and other != other))
    return [] if same else [place]


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

"""Compute attention in the open where that is faster than to run a fused kernel and to compute it once more.

Shapes: B images, H heads, N query tokens, M key tokens, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Entries of a head, N · M, up to which a CPU forms A = softmax(scale · q kᵀ) and A v about as fast as its fused kernel.
FORMED_ENTRIES = 2**18


def forms(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether attention of these is to be formed: on a CPU, with few tokens, and where nothing is unusual about it.

    Not where gradients are kept: A would be kept for them, and so would its gradient. Nor with a mask, with heads that
    share keys, or in precision that the model chooses while it runs, all of which are left to torch's kernel.
    """
    return (
        not torch.is_grad_enabled()
        and all(type(part) is Tensor and part.ndim == 4 and part.device.type == "cpu" for part in (query, key, value))
        and query.shape[2] * key.shape[2] <= FORMED_ENTRIES
        and query.dtype == key.dtype == value.dtype
        and query.shape[:2] == key.shape[:2]
        and attn_mask is None
        and not (dropout_p or is_causal or enable_gqa)
        and not torch.is_autocast_enabled("cpu")
    )


def formed_attention(query: Tensor, key: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """A = softmax(scale · q kᵀ + mask), (B, H, N, M), in float32, or float64 where the model is float64.

    Args:
        query: (B, H, N, d), outside the autograd graph.
        key: (B, H, M, d), likewise.
        scale: By default 1 / √d.
        mask: (B, H, N, M), added to the scores, or boolean and False where a key is not to be seen.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.to(precision) * factor) @ key.to(precision).mT
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    return torch.softmax(scores, dim=-1, out=scores)  # in place: with many tokens, fresh memory takes as long

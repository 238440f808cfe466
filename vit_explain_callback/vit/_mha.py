"""`torch.nn.functional.multi_head_attention_forward` taken apart, so that its inner attention can be seen.

Shapes: B images, H heads, N query tokens, M key tokens, d head width, E = H d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Not asked of the function, which may be one that somebody put in its place.
_ARGUMENTS = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights"),
    *("attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k"),
    *("static_v", "average_attn_weights", "is_causal"),
)
_DEFAULTS = {"need_weights": True, "average_attn_weights": True}


@dataclass(frozen=True)
class MultiHeadParts:
    """What goes into the attention of one call, and how its output goes on.

    Attributes:
        query: (B, H, N, d).
        key: (B, H, M, d).
        value: (B, H, M, d).
        mask: Added to the scores, broadcastable to (B, H, N, M), or None.
        finish: Turns the attention's output (B, H, N, d) into what the whole function returns as its output.
        wants_weights: None if the caller wants no weights, else whether it wants their mean over heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    finish: Callable[[Tensor], Tensor]
    wants_weights: bool | None


def take_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> MultiHeadParts | None:
    """Project to queries, keys and values as the function does; None for its uncommon options and unbatched input."""
    given: dict[str, Any] = dict.fromkeys(_ARGUMENTS) | _DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    uncommon = any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v"))
    if uncommon or given["add_zero_attn"] or given["query"].ndim != 3:
        return None
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    heads = given["num_heads"]
    inputs = (given["query"], given["key"], given["value"])  # each (tokens, B, E)
    query, key, value = (
        F.linear(tensor, weight, bias).reshape(*tensor.shape[:2], heads, -1).permute(1, 2, 0, 3)
        for tensor, weight, bias in zip(inputs, weights, biases, strict=True)
    )

    def finish(output: Tensor) -> Tensor:
        return F.linear(output.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"])

    wants = given["average_attn_weights"] if given["need_weights"] else None
    mask = _mask(given["attn_mask"], given["key_padding_mask"], query)
    return MultiHeadParts(query, key, value, mask, finish, wants)


def _mask(attention: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one that is added; here, other than elsewhere in torch, True means *left out*."""
    if attention is not None:
        attention = _additive(attention, query)
        if attention.ndim == 3:  # (B·H, N, M)
            attention = attention.reshape(*query.shape[:2], *attention.shape[1:])
    if padding is None:
        return attention
    padding = _additive(padding, query)[:, None, None]
    return padding if attention is None else attention + padding


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(mask, -math.inf)

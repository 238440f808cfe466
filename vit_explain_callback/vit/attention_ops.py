"""Recognise PyTorch's attention functions, split multi-head attention, and compute attention explicitly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALED_DOT_PRODUCT: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention
"""The kernel itself, whatever `torch.nn.functional` calls by its name."""

# Written in Python and looked up by name, so that a mode sees a function that replaces one of them.
_LOOKED_UP = ("softmax", "log_softmax", "dropout", "multi_head_attention_forward")
_ORIGINALS: dict[str, Callable[..., Any]] = {name: getattr(F, name) for name in _LOOKED_UP}


def function_name(func: Callable[..., Any]) -> str:
    """Name of a function seen by a `TorchFunctionMode`; of the getter of a property, that of the property."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return next((candidate for candidate in _LOOKED_UP if func is getattr(F, candidate)), name)


def original_function(func: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's own function where it was replaced; the replacement has been called already."""
    return next((_ORIGINALS[candidate] for candidate in _LOOKED_UP if func is getattr(F, candidate)), func)


# Up to N · M entries a head, a CPU computes A = softmax(scale · q kᵀ) and A v about as fast as its fused kernel.
EXPLICIT_ENTRIES = 2**18


def computes_explicitly(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether to compute A itself and not call the fused kernel: on a CPU, with few tokens and common options.

    False with gradients, which would keep A and its gradient in memory, and with a mask, dropout, causal attention,
    grouped queries or autocast.
    """
    return (
        not torch.is_grad_enabled()
        and all(type(part) is Tensor and part.ndim == 4 and part.device.type == "cpu" for part in (query, key, value))
        and query.shape[2] * key.shape[2] <= EXPLICIT_ENTRIES
        and query.dtype == key.dtype == value.dtype
        and query.shape[:2] == key.shape[:2]
        and attn_mask is None
        and not (dropout_p or is_causal or enable_gqa)
        and not torch.is_autocast_enabled("cpu")
    )


def explicit_attention(query: Tensor, key: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
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


# Not read off the function's signature: it may have been replaced.
_ARGUMENTS = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights"),
    *("attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k"),
    *("static_v", "average_attn_weights", "is_causal"),
)
_DEFAULTS = {"need_weights": True, "average_attn_weights": True}


@dataclass(frozen=True)
class MultiHeadParts:
    """Inputs of the attention in one multi-head call, and the projection of its output.

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


def multi_head_parts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> MultiHeadParts | None:
    """Project to queries, keys and values as the function does; None for uncommon options and unbatched input."""
    arguments: dict[str, Any] = (
        dict.fromkeys(_ARGUMENTS) | _DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    )
    uncommon = any(arguments[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v"))
    if uncommon or arguments["add_zero_attn"] or arguments["query"].ndim != 3:
        return None
    if arguments["use_separate_proj_weight"]:
        weights = [arguments[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = arguments["in_proj_weight"].chunk(3)
    biases = [None] * 3 if arguments["in_proj_bias"] is None else arguments["in_proj_bias"].chunk(3)
    heads = arguments["num_heads"]
    inputs = (arguments["query"], arguments["key"], arguments["value"])  # each (tokens, B, E)
    query, key, value = (
        F.linear(tensor, weight, bias).reshape(*tensor.shape[:2], heads, -1).permute(1, 2, 0, 3)
        for tensor, weight, bias in zip(inputs, weights, biases, strict=True)
    )

    def finish(output: Tensor) -> Tensor:
        return F.linear(output.permute(2, 0, 1, 3).flatten(2), arguments["out_proj_weight"], arguments["out_proj_bias"])

    wants = arguments["average_attn_weights"] if arguments["need_weights"] else None
    mask = _mask(arguments["attn_mask"], arguments["key_padding_mask"], query)
    return MultiHeadParts(query, key, value, mask, finish, wants)


def _mask(attention: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one additive mask; here, unlike in scaled dot-product attention, True means *masked out*."""
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

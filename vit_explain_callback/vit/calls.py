"""One attention operation seen in a forward pass, however it was written.

Shapes: B images, H heads, N query tokens, M key tokens (M = N in self-attention), d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vit_explain_callback.vit.attention_ops import explicit_attention

_ALL = slice(None)


class PartOfAttention(Protocol):
    """Gives the attention of some images, heads and query rows, (b, h, n, M)."""

    def __call__(self, images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        """Compute it, in float32, or float64 where the model is float64."""


@dataclass(frozen=True)
class AttentionCall:
    """One attention operation; its tensors are the model's own, not copies.

    Attributes:
        module: Path of the innermost module that ran it, seen from the recorded module.
        output: O = A v as the model got it, (B, H, N, d) or (B, N, d), in the autograd graph if the forward built one.
        value: v, (B, H, M, d).
        attention: The attention of some images, heads and query rows.
        shape: (B, H, N, M).
        trail: The modules that were running, outermost first: path of each, and how often it had run before.
    """

    module: str
    output: Tensor
    value: Tensor
    attention: PartOfAttention
    shape: tuple[int, int, int, int]
    trail: tuple[tuple[str, int], ...] = ()

    def attention_gradient(self, output_gradient: Tensor, images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        """∂y/∂A = (∂y/∂O) vᵀ of a part of the attention, (b, h, n, M), from `output_gradient` ∂y/∂O, (B, H, N, d)."""
        upstream = output_gradient.reshape(*self.shape[:3], -1)[images, heads, queries]
        return at_least_float32(upstream) @ at_least_float32(self.value[images, heads]).mT

    def with_heads(self, images: int) -> AttentionCall:
        """Unfold heads from the batch dimension, which holds the heads of an image next to each other."""
        folded, count = self.attention, self.shape[0] // images
        batch = images

        def attention(images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
            start, stop, _ = heads.indices(count)
            of_images = range(*images.indices(batch))
            return torch.stack(
                [folded(slice(image * count + start, image * count + stop), _ALL, queries)[:, 0] for image in of_images]
            )

        shape = (images, count, *self.shape[2:])
        return replace(
            self, attention=attention, value=self.value.reshape(*shape[:2], *self.value.shape[2:]), shape=shape
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fused_call(
    module: str,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """A call of the fused kernel, from its inputs."""
    # Without a head dimension there is one head; with more than one before the tokens, as with groups, all are heads.
    query, key, value = (_as_heads(part) for part in (query.detach(), key.detach(), value))
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if enable_gqa:
        key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    if is_causal:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    mask = None
    if attn_mask is not None:
        mask = attn_mask.detach()
        mask = mask.unsqueeze(1) if mask.ndim == 3 and output.ndim == 3 else mask
        mask = mask.expand(batch, heads, queries, keys)

    def attention(images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        part = None if mask is None else mask[images, heads, queries]
        return explicit_attention(query[images, heads, queries], key[images, heads], scale, part)

    return AttentionCall(module, output, value, attention, (batch, heads, queries, keys))


def explicit_call(module: str, output: Tensor, weights: Tensor, value: Tensor) -> AttentionCall:
    """A call whose attention weights, (B, H, N, M) or (B, N, M), were computed explicitly."""
    weights, value = _as_heads(weights.detach()), _as_heads(value)

    def attention(images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        return weights[images, heads, queries].to(torch.promote_types(value.dtype, torch.float32))

    batch, heads, queries, keys = weights.shape
    return AttentionCall(module, output, value, attention, (batch, heads, queries, keys))


def merged_call(calls: Sequence[AttentionCall], output: Tensor) -> AttentionCall:
    """Merge calls that each computed some heads into one; `output`, (B, H, N, d), is that of all heads."""
    first = calls[0]
    count = sum(call.shape[1] for call in calls)

    def attention(images: slice, heads: slice, queries: slice = _ALL) -> Tensor:
        parts, before = [], 0
        start, stop, _ = heads.indices(count)
        for call in calls:
            local = slice(max(0, start - before), min(call.shape[1], stop - before))
            if local.start < local.stop:
                parts.append(call.attention(images, local, queries))
            before += call.shape[1]
        return torch.cat(parts, dim=1)

    shared = [step for step in first.trail if all(step in call.trail for call in calls)]
    shape = (first.shape[0], count, *first.shape[2:])
    value = torch.cat([call.value for call in calls], dim=1)
    return AttentionCall(shared[-1][0] if shared else "", output, value, attention, shape, tuple(shared))


def _as_heads(part: Tensor) -> Tensor:
    """(B, N, d) or (B, …, N, d) as (B, H, N, d)."""
    return part.unsqueeze(1) if part.ndim == 3 else part.flatten(1, -3)

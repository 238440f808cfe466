"""A second, naive implementation of the methods: float64, explicit matrices, image by image, from the definition.

It shares nothing with the package. The model runs with `scaled_dot_product_attention` replaced by the textbook formula,
so that every attention matrix A exists and autograd itself gives ∂y/∂A.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn


@dataclass
class Matrices:
    """Attention A and ∂y/∂A of every operation in the order of the forward pass, each (B, H, N, M); logits (B, C)."""

    attentions: list[Tensor]
    gradients: list[Tensor]
    score_gradients: list[Tensor]
    logits: Tensor


def matrices(model: nn.Module, images: Tensor, target: Sequence[int] | None = None) -> Matrices:
    model = copy.deepcopy(model).double().eval()
    attentions: list[Tensor] = []
    scores: list[Tensor] = []

    def textbook(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert (dropout_p, is_causal) == (0.0, False)
        if enable_gqa:  # several query heads share a key head
            shared = [head * k.shape[1] // q.shape[1] for head in range(q.shape[1])]
            k, v = k[:, shared], v[:, shared]
        score = torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
        if attn_mask is not None:
            score = score + attn_mask
        score.requires_grad_() if score.is_leaf else score.retain_grad()
        weights = score.exp() / score.exp().sum(dim=-1, keepdim=True)
        attentions.append(weights)
        scores.append(score)
        return torch.einsum("bhnm,bhmd->bhnd", weights, v)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", textbook):
        logits = model(images.double().requires_grad_())
    chosen = logits.argmax(dim=1).tolist() if target is None else list(target)
    y = sum(logits[image, label] for image, label in enumerate(chosen))
    gradients = torch.autograd.grad(y, attentions + scores)
    count = len(attentions)
    detached = [attention.detach() for attention in attentions]
    return Matrices(detached, list(gradients[:count]), list(gradients[count:]), logits.detach())


def fused_matrix(attention: Tensor, gradient: Tensor | None, fusion: str) -> Tensor:
    """(H, N, M) of one image to (N, M)."""
    weighted = attention if gradient is None else attention * gradient
    heads = list(weighted)
    total = heads[0]
    for head in heads[1:]:
        if fusion == "mean":
            total = total + head
        elif fusion == "max":
            total = torch.where(head > total, head, total)
        else:
            total = torch.where(head < total, head, total)
    if fusion == "mean":
        total = total / len(heads)
    return total if gradient is None else torch.where(total > 0, total, 0.0)


def discarded(fused: Tensor, ratio: float, class_token: int | None) -> Tensor:
    """Zero the ⌊ratio · N²⌋ smallest entries of an (N, N) matrix, one by one."""
    result = fused.clone()
    entries = sorted((value, index) for index, value in enumerate(fused.flatten().tolist()))
    for _, index in entries[: int(ratio * len(entries))]:
        row, column = divmod(index, fused.shape[1])
        if not (row == column == class_token):
            result[row, column] = 0
    return result


def rollout(
    blocks: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    start: Tensor,
    fusion: str = "mean",
    ratio: float = 0.0,
    start_layer: int = 1,
    class_token: int | None = 0,
) -> Tensor:
    """Relevance (N,) of one image: full products of N × N matrices. `blocks` are L matrices (H, N, N)."""
    tokens = blocks[0].shape[-1]
    product = torch.eye(tokens, dtype=torch.float64)
    for layer in range(start_layer - 1, len(blocks)):
        fused = fused_matrix(blocks[layer], None if gradients is None else gradients[layer], fusion)
        with_residual = discarded(fused, ratio, class_token) + torch.eye(tokens, dtype=torch.float64)
        normalised = torch.stack([row / row.sum() for row in with_residual])
        product = normalised @ product
    return start @ product

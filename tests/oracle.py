"""A second, naive implementation of the methods: float64, explicit matrices, image by image, from the definition.

It shares nothing with the package. The model runs with `scaled_dot_product_attention` replaced by the textbook formula,
so that every attention matrix A exists and autograd itself gives ∂y/∂A.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
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


@contextmanager
def textbook_attention(attentions: list[Tensor], scores: list[Tensor]) -> Iterator[None]:
    """Replace the kernel by the textbook formula, and keep every A and the scores before its softmax."""

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
        yield


def matrices(model: nn.Module, images: Tensor, target: Sequence[int] | None = None) -> Matrices:
    model = copy.deepcopy(model).double().eval()
    attentions: list[Tensor] = []
    scores: list[Tensor] = []
    with textbook_attention(attentions, scores):
        logits = model(images.double().requires_grad_())
    chosen = logits.argmax(dim=1).tolist() if target is None else list(target)
    y = sum(logits[image, label] for image, label in enumerate(chosen))
    gradients = torch.autograd.grad(y, attentions + scores)
    count = len(attentions)
    detached = [attention.detach() for attention in attentions]
    return Matrices(detached, list(gradients[:count]), list(gradients[count:]), logits.detach())


def block_gradients(model: Any, images: Tensor, target: Sequence[int]) -> list[Tensor]:
    """∂s/∂A of each block of a timm ViT, with s the target's logit of that block's tokens; of the pool's A if any."""
    model = copy.deepcopy(model).double().eval()
    attentions: list[Tensor] = []
    leaving: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, tokens: leaving.append(tokens))
    with textbook_attention(attentions, []):
        model(images.double().requires_grad_())
        blocks, found = attentions[: len(leaving)], []
        for attention, tokens in zip(blocks, list(leaving), strict=True):
            seen = len(attentions)
            logits = model.forward_head(model.norm(tokens))
            read_at = attentions[-1] if len(attentions) > seen else attention
            s = sum(logits[image, label] for image, label in enumerate(target))
            (gradient,) = torch.autograd.grad(s, read_at, retain_graph=True)
            found.append(gradient)
    return found


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
    start_block: int = 1,
    class_token: int | None = 0,
) -> Tensor:
    """Relevance (N,) of one image: full products of N × N matrices. `blocks` are L matrices (H, N, N)."""
    tokens = blocks[0].shape[-1]
    product = torch.eye(tokens, dtype=torch.float64)
    for layer in range(start_block - 1, len(blocks)):
        fused = fused_matrix(blocks[layer], None if gradients is None else gradients[layer], fusion)
        with_residual = discarded(fused, ratio, class_token) + torch.eye(tokens, dtype=torch.float64)
        normalised = torch.stack([row / row.sum() for row in with_residual])
        product = normalised @ product
    return start @ product


def positive_product(attention: Tensor, gradient: Tensor) -> Tensor:
    """Ē = mean_h relu(A ⊙ ∂y/∂A) of one image, (H, N, M) to (N, M), head by head."""
    total = torch.zeros_like(attention[0])
    for of_head, gradient_of_head in zip(attention, gradient, strict=True):
        product = of_head * gradient_of_head
        total = total + torch.where(product > 0, product, 0.0)
    return total / len(attention)


def signed_product(attention: Tensor, gradient: Tensor) -> Tensor:
    """mean_h(A ⊙ ∂y/∂A) of one image, (H, N, M) to (N, M), head by head."""
    total = torch.zeros_like(attention[0])
    for of_head, gradient_of_head in zip(attention, gradient, strict=True):
        total = total + of_head * gradient_of_head
    return total / len(attention)

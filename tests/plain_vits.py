"""A small ViT whose blocks can be held, called and written in any way, and its attention computed from the definition.

`matrices` shares nothing with the package and calls no module that attends: it takes the weights and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import oracle
from tests.models import CLASSES, randomised
from vit_explain_callback import AttentionRollout, GradientRollout, explain

WIDTH, HEADS, DEPTH, GRID = 24, 3, 3, (3, 4)
SIZE = (GRID[0] * 8, GRID[1] * 8)
METHODS: list[Any] = [
    AttentionRollout(),
    AttentionRollout("max", 0.5),
    GradientRollout(),
    GradientRollout("max", 0.5, 2),
]

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""O (B, H, N, d) of q, k and v, (B, H, N, d)."""


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, product: Product = kernel, heads: int = HEADS) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.heads, self.product = heads, product

    def parts(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]

    def forward(self, x: Tensor) -> Any:
        return self.proj(self.product(*self.parts(x)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Any:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """Blocks in a list; subclasses hold and run them in other ways, and name them in `layers`."""

    def __init__(self, product: Product = kernel, heads: int = HEADS) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 1 + GRID[0] * GRID[1], WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.hold([Block(Attention(product, heads)) for _ in range(DEPTH)])

    def hold(self, blocks: list[Block]) -> None:
        self.blocks = nn.ModuleList(blocks)

    def layers(self) -> list[Any]:
        return list(self.blocks)

    def run(self, x: Tensor) -> Tensor:
        for block in self.layers():
            x = block(x)
        return x

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.position

    def read(self, x: Tensor) -> Tensor:
        return self.norm(x)[:, 0]

    def forward(self, images: Tensor) -> Any:
        return self.head(self.read(self.run(self.tokens(images))))


def built(kind: Callable[..., Any], *options: Any, seed: int = 0) -> Any:
    return randomised(kind(*options), seed).double().eval()


def matrices(vit: Any, images: Tensor) -> oracle.Matrices:
    """Every A, (B, H, N, N), and the gradient of the predicted class's logit at it."""
    x, attentions = vit.tokens(images), []
    for block in vit.layers():
        q, k, v = block.attn.parts(block.norm1(x))
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
        attention = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        attentions.append(attention)
        x = x + block.attn.proj(torch.einsum("bhnm,bhmd->bnhd", attention, v).flatten(2))
        x = x + block.mlp(block.norm2(x))
    logits = vit.head(vit.read(x))
    gradients = torch.autograd.grad(logits.amax(dim=1).sum(), attentions)
    return oracle.Matrices([a.detach() for a in attentions], list(gradients), [], logits.detach())


def class_row(tokens: int = 1 + GRID[0] * GRID[1]) -> Tensor:
    return torch.eye(tokens, dtype=torch.float64)[0]


def check(
    vit: Any,
    images: Tensor,
    found: oracle.Matrices | None = None,
    starts: Sequence[Tensor] | None = None,
    class_token: int | None = 0,
    **options: Any,
) -> None:
    """The maps of a model, with gradients and without, against those of `found`, read from `starts` of each image."""
    images = images.double()
    found = matrices(vit, images) if found is None else found
    both = explain(vit, images, METHODS, **options)
    alone = explain(vit, images, METHODS[:2], **options)
    torch.testing.assert_close(both.logits, found.logits, rtol=1e-9, atol=1e-9)
    first = found.attentions[0].shape[-1] - GRID[0] * GRID[1]
    for method in METHODS:
        for image in range(len(images)):
            blocks = [a[image] for a in found.attentions]
            gradients = [g[image] for g in found.gradients] if isinstance(method, GradientRollout) else None
            chosen = (method.head_fusion, method.discard_ratio, method.start_block, class_token)
            start = class_row() if starts is None else starts[image]
            expected = oracle.rollout(blocks, gradients, start, *chosen)[first:].reshape(GRID)
            for maps in (both.maps, alone.maps):
                if method.name in maps:
                    torch.testing.assert_close(maps[method.name][image], expected, rtol=1e-9, atol=1e-12)


def scores_by(softmax: Callable[[Tensor], Tensor]) -> Product:
    """Attention in the open, with a softmax of one's own."""
    return lambda q, k, v: softmax(q @ k.mT / q.shape[-1] ** 0.5) @ v

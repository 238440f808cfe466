"""Attention written in other ways: the maps of the kernel, to the ninth digit; or a refusal that says why."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import random_images, tiny_vit
from tests.plain_vits import HEADS, SIZE, WIDTH, Attention, PlainViT, Product, built, check, matrices
from vit_explain_callback import explain
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.vit import attention_ops

sdpa: Any = F.scaled_dot_product_attention


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exponentials = (scores(q, k) - scores(q, k).amax(dim=-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True) @ v


def by_hand_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exponentials = torch.exp(scores(q, k))
    weights = exponentials.clone()
    total = weights.sum(-1).unsqueeze(-1)
    return torch.div(weights, total) @ v


def masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exponentials = scores(q, k).exp().masked_fill(torch.zeros(13, dtype=torch.bool), 0.0)
    return (exponentials / torch.sum(exponentials, dim=-1, keepdim=True)).matmul(v)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    empty = q.new_empty(len(q), q.shape[1], k.shape[1])
    weights = torch.baddbmm(empty, q, k.mT, beta=0, alpha=1 / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return torch.baddbmm(v.new_zeros(1, 1, 1), weights, v).unflatten(0, (-1, HEADS))


def one_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = [scores(q[:, head], k[:, head]).softmax(dim=-1) @ v[:, head] for head in range(q.shape[1])]
    return torch.cat(found, dim=-1).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def one_at_a_time_stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([sdpa(*parts) for parts in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)], dim=1)


def head_by_head_of_one_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(dim=-1)
    return torch.stack([one @ value for one, value in zip(weights.unbind(1), v.unbind(1), strict=True)], dim=1)


def in_chunks_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(q[:, :2], k[:, :2], v[:, :2]), sdpa(q[:, 2:], k[:, 2:], v[:, 2:])], dim=1)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(*(part.reshape(-1, *part.shape[2:]) for part in (q, k, v))).view(q.shape)


def folded_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    return torch.bmm(torch.bmm(q / math.sqrt(q.shape[-1]), k.mT).softmax(dim=-1), v).unflatten(0, (-1, HEADS))


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhnd,bhmd->bnmh", q, k).div(math.sqrt(q.shape[-1])).softmax(dim=2)
    return torch.einsum("bnmh,bhmd->bhnd", weights, v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhmn,bhmd->bhnd", scores(k, q).softmax(dim=2), v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(dim=-1).unflatten(1, (HEADS, 1))
    return (weights @ v.unflatten(1, (HEADS, 1))).flatten(1, 2)


WRITTEN: dict[str, Product] = {
    "transposed values": lambda q, k, v: (v.mT @ scores(q, k).softmax(dim=-1).mT).mT,
    "transposed values, by transpose": lambda q, k, v: (
        v.transpose(2, 3) @ scores(q, k).softmax(dim=-1).transpose(-2, -1)
    ).transpose(2, 3),
    "softmax over the other dimension": lambda q, k, v: scores(k, q).softmax(dim=-2).mT @ v,
    "softmax over dimension 2": lambda q, k, v: torch.matmul(F.softmax(scores(k, q), dim=2).swapaxes(2, 3), v),
    "other dimension, transposed values": lambda q, k, v: (v.mT @ scores(k, q).softmax(dim=-2)).mT,
    "twice transposed": lambda q, k, v: scores(q, k).softmax(dim=-1).mT.permute(0, 1, 3, 2) @ v,
    "a copy of the transpose": lambda q, k, v: (
        (v.mT.contiguous() @ scores(q, k).softmax(dim=-1).transpose(2, 3).contiguous()).mT
    ),
    "exponential of a log-softmax": lambda q, k, v: torch.exp(scores(q, k).log_softmax(dim=-1)) @ v,
    "the same, by methods": lambda q, k, v: F.log_softmax(scores(q, k), -1).exp().matmul(v),
    "softmax in another precision": lambda q, k, v: F.softmax(scores(q, k).double(), -1).to(v.dtype) @ v,
    "exponentials by their sum": by_hand,
    "the same, in other words": by_hand_in_place,
    "masked exponentials": masked_by_hand,
    "baddbmm": baddbmm,
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", scores(q, k).softmax(-1), v),
    "einsum, values first": lambda q, k, v: torch.einsum("bhjd,bhij->bhid", v, scores(q, k).softmax(-1)),
    "einsum with an ellipsis": lambda q, k, v: torch.einsum("...ij, ...jd -> ...id", scores(q, k).softmax(-1), v),
    "einsum, output unsaid": lambda q, k, v: torch.einsum("...ij,...jk", scores(q, k).softmax(-1), v),
    "einsum, operands in a list": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", [scores(q, k).softmax(-1), v]),
    "einsum to the transpose": lambda q, k, v: torch.einsum("bhij,bhjd->bhdi", scores(q, k).softmax(-1), v).mT,
    "heads last": heads_last,
    "keys first": keys_first,
    "one head at a time": one_at_a_time,
    "one head at a time, stacked": one_at_a_time_stacked,
    "one softmax, head by head": head_by_head_of_one_softmax,
    "heads in chunks": in_chunks_of_heads,
    "heads folded into the batch": folded,
    "folded, softmax by hand": folded_softmax,
    "grouped heads": grouped,
    "a clone": lambda q, k, v: scores(q, k).softmax(dim=-1).clone().contiguous() @ v,
    "dropout by name": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), p=0.5, training=False) @ v,
    "reshaped and back": lambda q, k, v: scores(q, k).softmax(-1).flatten(0, 1).unflatten(0, (-1, HEADS)) @ v,
    "operands by name": lambda q, k, v: torch.matmul(input=torch.softmax(input=scores(q, k), dim=-1), other=v),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_it_gives_the_maps_of_the_textbook(name: str) -> None:
    check(built(PlainViT, WRITTEN[name]), random_images(2, SIZE))


@pytest.mark.parametrize("name", ["one head at a time", "softmax over the other dimension", "baddbmm", "keys first"])
def test_every_other_method_gives_the_maps_of_the_kernel(name: str) -> None:
    methods = ["chefer", "flow", "gradsam", "legrad", "attention_block2_head3"]
    images = random_images(2, SIZE).double()
    expected = explain(built(PlainViT), images, methods, block_statistics=True)
    found = explain(built(PlainViT, WRITTEN[name]), images, methods, block_statistics=True)
    for key, maps in expected.maps.items():
        torch.testing.assert_close(found.maps[key], maps, rtol=1e-9, atol=1e-12)


@functools.cache
def by_the_textbook(count: int) -> Explanation:
    return explain(built(PlainViT).float(), random_images(count, SIZE))


@pytest.mark.parametrize("name", WRITTEN)
def test_it_is_one_image_and_single_precision_too(name: str) -> None:
    """As many images as heads would hide an order that is mistaken; one image would hide it at all."""
    for count in (1, HEADS):
        images, expected = random_images(count, SIZE), by_the_textbook(count)
        found = explain(built(PlainViT, WRITTEN[name]).float(), images)
        for key, maps in expected.maps.items():
            torch.testing.assert_close(found.maps[key], maps, rtol=1e-4, atol=1e-6)


class Head(nn.Module):
    """A head as in many a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH // HEADS, bias=False) for _ in range(3))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.query(x) @ self.key(x).transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        found: Tensor = self.dropout(F.softmax(weights, dim=-1)) @ self.value(x)
        return found


class Heads(Attention):
    """A list of heads, whose outputs are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv
        self.list = nn.ModuleList(Head() for _ in range(HEADS))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [
            torch.stack([head.get_submodule(name)(x) for head in self.list], dim=1)
            for name in ("query", "key", "value")
        ]

    def forward(self, x: Tensor) -> Any:
        return self.proj(torch.cat([head(x) for head in self.list], dim=-1))


def with_heads() -> PlainViT:
    vit = PlainViT()
    for block in vit.blocks:
        block.attn = Heads()
    return vit


def test_heads_that_are_modules() -> None:
    check(built(with_heads), random_images(2, SIZE))
    explain(built(with_heads).float(), random_images(2, SIZE), ["legrad", "chefer", "flow"])


class FoldedHeadFirst(Attention):
    """Heads before images: `(h b) n d`."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part.transpose(0, 1).flatten(0, 1) for part in self.parts(x))
        return self.proj(sdpa(q, k, v).unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2))


class HeadFirst(Attention):
    """Heads before images, each in a dimension of its own."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part.transpose(0, 1) for part in self.parts(x))
        return self.proj(sdpa(q, k, v).permute(1, 2, 0, 3).flatten(2))


class Windows(Attention):
    """Two windows of tokens, concatenated; the class token and one more are in both."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.parts(x)
        found = [sdpa(q[:, :, part], k[:, :, part], v[:, :, part]) for part in (slice(0, 6), slice(6, 12))]
        return self.proj(torch.cat([*found, v[:, :, 12:]], dim=2).transpose(1, 2).flatten(2))


def of(product: Product) -> Callable[[], Any]:
    return lambda: PlainViT(product)


def with_attention(kind: Callable[[], nn.Module]) -> Callable[[], Any]:
    def make() -> Any:
        vit = PlainViT()
        for block in vit.blocks:
            block.attn = kind()
        return vit

    return make


def opaque(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As a kernel of one's own: nothing of it is seen."""
    return Opaque.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        with torch._C.DisableTorchFunction():
            return torch._C._nn.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in ctx.saved_tensors]
            return torch.autograd.grad(by_hand(parts[0], parts[1], parts[2]), parts, gradients[0])


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)  # type: ignore[return-value]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v)


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) - 0.3 * scores(k, q).softmax(-1)) @ v


CHANGED = "to be multiplied with the values as it is"
UNSEEN = "but saw none. Only `scaled_dot_product_attention`, `nn.MultiheadAttention` and a softmax"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "folded, heads first": (with_attention(FoldedHeadFirst), "heads folded into the batch before the images"),
    "heads first": (with_attention(HeadFirst), "over all 13 tokens of each of 2 images, but its attention is"),
    "columns of a softmax": (of(lambda q, k, v: scores(q, k).softmax(dim=-2) @ v), CHANGED),
    "squared": (of(lambda q, k, v: scores(q, k).softmax(dim=-1).square() @ v), CHANGED),
    "scaled in place": (of(lambda q, k, v: scores(q, k).softmax(dim=-1).detach().clone().mul_(2) @ v), CHANGED),
    "masked after": (of(lambda q, k, v: scores(q, k).softmax(-1).tril() @ v), CHANGED),
    "rows in another order": (of(lambda q, k, v: scores(q, k).softmax(-1).flip(-1) @ v), CHANGED),
    "reshaped across": (
        of(lambda q, k, v: scores(q, k).softmax(-1).mT.reshape(len(q), HEADS, 169).unflatten(2, (13, 13)) @ v),
        CHANGED,
    ),
    "a product of sums": (
        of(lambda q, k, v: (scores(q, k).softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(dim=3)),
        CHANGED,
    ),
    "differential": (of(differential), CHANGED),
    "sums of something else": (of(lambda q, k, v: (scores(q, k).exp() / scores(k, q).exp().sum(-1, True)) @ v), UNSEEN),
    "relu by its sum": (of(lambda q, k, v: scores(q, k).relu() / scores(q, k).relu().sum(-1, True) @ v), UNSEEN),
    "an opaque kernel": (of(opaque), UNSEEN),
    "flex_attention": (of(flex), UNSEEN),
    "linear attention": (of(linear_attention), UNSEEN),
    "windows": (with_attention(Windows), "one attention operation in `blocks.0` of PlainViT, but captured 2"),
}


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("count", [2, HEADS])
def test_what_is_no_attention_of_rows_is_refused(name: str, count: int) -> None:
    kind, reason = REFUSED[name]
    with pytest.raises(ValueError, match="Expected") as caught:
        explain(built(kind), random_images(count, SIZE), ["rollout"])
    if count == 2:
        assert reason in str(caught.value)


@pytest.mark.parametrize("product", [opaque, linear_attention, flex])
@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
def test_attention_that_is_not_seen_beside_one_that_is(product: Product) -> None:
    for kind in (PlainViT, tiny_vit):
        vit = built(kind) if kind is PlainViT else tiny_vit()
        images = random_images(2, SIZE if kind is PlainViT else (32, 32))
        block = vit.blocks[1]
        if kind is PlainViT:
            block.attn.product = product
        else:
            block.attn = Timm(block.attn, product)
        with pytest.raises(
            ValueError, match=r"Expected (attention alone|one attention op|no attention|.* to run with grad)"
        ):
            explain(vit, images, ["rollout"])


class Timm(nn.Module):
    """The attention of a timm block, written in another way."""

    def __init__(self, attention: Any, product: Product) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.product = attention.qkv, attention.proj, attention.num_heads, product

    def forward(self, x: Tensor, **_: Any) -> Any:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(self.product(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "name", ["one head at a time", "heads folded into the batch", "keys first", "transposed values"]
)
def test_in_a_model_of_timm_whose_attention_was_replaced(name: str) -> None:
    images = random_images(2)
    expected = explain(tiny_vit().double(), images.double(), ["rollout", "grad_rollout", "legrad"])
    vit = tiny_vit().double()
    for block in vit.blocks:
        block.attn = Timm(block.attn, WRITTEN[name])
    for key, maps in explain(vit, images.double(), ["rollout", "grad_rollout", "legrad"]).maps.items():
        torch.testing.assert_close(maps, expected.maps[key], rtol=1e-9, atol=1e-12)


def test_heads_before_images_in_a_model_of_timm() -> None:
    """By name alone it would be believed where there are as many heads as images."""
    vit = tiny_vit()
    for block in vit.blocks:
        block.attn = Timm(block.attn, lambda q, k, v: sdpa(*(p.transpose(0, 1) for p in (q, k, v))).transpose(0, 1))
    with pytest.raises(ValueError, match="Expected"):
        explain(vit, random_images(3), ["rollout"])


def test_the_kernel_is_known_under_its_own_name() -> None:
    assert attention_ops.SCALED_DOT_PRODUCT is torch._C._nn.scaled_dot_product_attention
    assert matrices(built(PlainViT), random_images(1, SIZE).double()).attentions[0].shape == (1, HEADS, 13, 13)

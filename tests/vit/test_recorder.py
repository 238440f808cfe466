"""The recorder: what it sees, what it refuses, and that it goes without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import random_images, tiny_vit
from vit_explain_callback import explain
from vit_explain_callback.vit.recorder import AttentionRecorder

ALL = slice(None)


class OneAttention(nn.Module):
    """Runs a given function of q, k, v."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.operation(q, k, v)


def recorded(operation: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    module = OneAttention(operation)
    with AttentionRecorder(module) as recorder:
        module(q, k, v)
    (call,) = recorded_calls = recorder.calls
    assert len(recorded_calls) == 1
    return call


def qkv(heads: int = 2, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, heads, tokens, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_masks_scales_and_grouped_queries() -> None:
    q, k, v = qkv()
    bias = torch.randn(2, 5, 5, dtype=torch.float64)
    allowed = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed.fill_diagonal_(True)
    scores = q @ k.mT
    cases: dict[str, tuple[Any, Tensor]] = {
        "plain": ({}, scores / 2),
        "scale": ({"scale": 0.3}, scores * 0.3),
        "bias": ({"attn_mask": bias}, scores / 2 + bias),
        "boolean": ({"attn_mask": allowed}, (scores / 2).masked_fill(~allowed, -torch.inf)),
        "causal": ({"is_causal": True}, (scores / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)),
    }
    for options, expected in cases.values():
        call = recorded(lambda q, k, v, o=options: F.scaled_dot_product_attention(q, k, v, **o), q, k, v)
        torch.testing.assert_close(call.attention(ALL, ALL), expected.softmax(-1))
        torch.testing.assert_close(call.attention(ALL, ALL) @ v, call.output)
    few_k, few_v = k[:, :1], v[:, :1]
    call = recorded(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, few_k, few_v)
    torch.testing.assert_close(call.attention(ALL, slice(1, 2)), (q[:, 1:] @ few_k.mT / 2).softmax(-1))
    torch.testing.assert_close(call.attention(ALL, ALL) @ call.value, call.output)


def test_one_head_without_a_head_dimension() -> None:
    q, k, v = (tensor[:, 0].requires_grad_() for tensor in qkv())
    call = recorded(F.scaled_dot_product_attention, q, k, v)
    assert call.shape == (3, 1, 5, 5)
    (gradient,) = torch.autograd.grad(call.output.square().sum(), call.output)
    expected = (2 * call.output) @ v.mT
    torch.testing.assert_close(call.attention_gradient(gradient, ALL, ALL), expected[:, None])


@pytest.mark.parametrize(
    "softmax",
    [
        lambda scores: scores.softmax(dim=-1),
        lambda scores: scores.softmax(-1),
        lambda scores: torch.softmax(scores, 3),
        lambda scores: F.softmax(scores, dim=-1),
        lambda scores: nn.Softmax(dim=-1)(scores),
        lambda scores: F.dropout(scores.softmax(-1), 0.5, training=False),
        lambda scores: scores.softmax(-1).to(torch.float32).to(torch.float64),
    ],
)
@pytest.mark.parametrize("product", [torch.matmul, lambda a, v: a @ v, lambda a, v: a.matmul(v)])
def test_hand_written_attention(softmax: Any, product: Any) -> None:
    q, k, v = qkv()
    call = recorded(lambda q, k, v: product(softmax(q @ k.mT), v), q, k, v)
    torch.testing.assert_close(call.attention(ALL, ALL), (q @ k.mT).softmax(-1))
    torch.testing.assert_close(call.value, v)


def with_heads(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


class ByHand(nn.Module):
    """The attention of a timm block, its product with the values written in another way."""

    def __init__(self, attention: Any, product: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.scale = attention.qkv, attention.proj, attention.scale
        self.heads, self.product = attention.num_heads, product

    def forward(self, x: Tensor, **_: Any) -> Any:
        q, k, v = (with_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(self.product((q * self.scale @ k.mT), v).reshape(x.shape))


def without_heads(scores: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(scores[:, 0].softmax(dim=2), v[:, 0])


def folded_heads(scores: Tensor, v: Tensor) -> Tensor:
    out = torch.bmm(scores.flatten(0, 1).softmax(dim=-1), v.flatten(0, 1))
    return out.unflatten(0, scores.shape[:2]).transpose(1, 2)


@pytest.mark.parametrize(
    ("heads", "product"),
    [
        (3, lambda s, v: torch.einsum("bhij,bhjd->bhid", s.softmax(-1), v).transpose(1, 2)),
        (3, lambda s, v: torch.einsum("b h q k, b k h d -> b q h d", s.softmax(-1), v.transpose(1, 2))),
        (3, lambda s, v: torch.einsum("bhkd,bhqk->bqhd", v, s.softmax(-1))),
        (1, lambda s, v: torch.einsum("bij,bjd->bid", s[:, 0].softmax(-1), v[:, 0])),
        (1, without_heads),
        (3, folded_heads),
        (1, lambda s, v: F.softmax(s[:, 0], dim=-1) @ v[:, 0]),
    ],
)
def test_hand_written_products_give_the_maps_of_the_kernel(heads: int, product: Any) -> None:
    model, images = tiny_vit(num_heads=heads), random_images(2)
    expected = explain(model, images, ["rollout", "grad_rollout"])
    for block in model.blocks:
        block.attn = ByHand(block.attn, product)
    found = explain(model, images, ["rollout", "grad_rollout"])
    for name, maps in expected.maps.items():
        torch.testing.assert_close(found.maps[name], maps, rtol=1e-4, atol=1e-6)


def test_what_is_not_attention_is_not_recorded() -> None:
    def others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q.softmax(dim=1) @ k.mT
        (q.flatten(1).softmax(-1)) @ torch.ones(q[0].numel(), 2, dtype=q.dtype)
        q[:, 0].softmax(-1) @ k[:, 0].mT  # three dimensions, but not among tokens
        torch.einsum("bhnd,bhmd->bhnm", q, k)
        return q @ k.mT

    with AttentionRecorder(module := OneAttention(others)) as recorder:
        module(*qkv())
        q, k, v = qkv()
        F.scaled_dot_product_attention(q, k, v)  # outside the module
    assert recorder.calls == []
    assert recorder.changed_after_softmax() == []


def test_attention_of_another_module_is_left_out() -> None:
    mine, other = tiny_vit(), tiny_vit()
    with torch.no_grad(), AttentionRecorder(mine) as recorder:
        other(random_images(1))
        mine(random_images(1))
    assert [call.module for call in recorder.calls] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def refusal(model: Any, images: Tensor | None = None) -> str:
    with pytest.raises(ValueError, match="Expected") as caught:
        explain(model, random_images(1) if images is None else images)
    return str(caught.value)


def test_a_block_without_visible_attention_is_named() -> None:
    model = tiny_vit()

    class Without(nn.Module):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return x

    model.blocks[1].attn = Without()
    assert "`blocks.1` of VisionTransformer, but captured 0" in refusal(model)
    model = tiny_vit()
    attention = model.blocks[2].attn

    class Twice(nn.Module):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return attention(x) + attention(x)

    model.blocks[2].attn = Twice()
    model.blocks[2].attn.inner = attention
    assert "`blocks.2` of VisionTransformer, but captured 2" in refusal(model)


def test_attention_changed_after_its_softmax_is_named() -> None:
    model = tiny_vit()

    class Sharpen(nn.Module):
        def forward(self, attention: Tensor) -> Tensor:
            return attention.square()

    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.attn_drop = Sharpen()
    assert "the softmax in `blocks.1.attn`" in refusal(model)


def test_attention_over_part_of_the_tokens_is_named() -> None:
    model = tiny_vit()
    whole = model.blocks[0].attn

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return torch.cat([self.whole(x[:, :9]), x[:, 9:]], dim=1)

    model.blocks[0].attn = Half()
    message = refusal(model)
    assert "`blocks.0.attn.whole`" in message
    assert "all 17 tokens of each of 1 images, but its attention is (B, H, N, N) = (1, 3, 9, 9)" in message


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "xcit_tiny_12_p16_224", "samvit_base_patch16"])
def test_models_without_global_attention_are_refused(name: str) -> None:
    options: dict[str, Any] = {"img_size": 224, "depth": 2} if name == "samvit_base_patch16" else {}
    model = timm.create_model(name, **options)
    message = refusal(model, random_images(1, (224, 224)))
    assert type(model).__name__ in message
    assert "global attention to roll out" in message


def test_none_or_several_vits_are_told() -> None:
    assert "to be or hold a Vision Transformer, but nothing in Sequential can attend" in refusal(
        nn.Sequential(nn.Linear(2, 2))
    )
    pair = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit()})
    assert "found 2: student, teacher. Name the one to explain, as in `vit='student'`" in refusal(pair)


@pytest.mark.parametrize("pooling", ["max", "avgmax", ""])
def test_a_readout_that_no_row_describes_is_refused(pooling: str) -> None:
    assert f"`global_pool` is {pooling!r}" in refusal(tiny_vit(global_pool=pooling, class_token=False))

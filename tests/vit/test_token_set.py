"""Whether tokens can be left out is measured: of blocks that know positions in many ways, and of those that do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import CLASSES, FAMILIES, random_images, randomised, tiny_vit
from tests.vit.test_beyond_timm import HUGGING_FACE, Plain, hugging_face
from vit_explain_callback.explainer import Explainer

WIDTH, HEADS, PATCHES = 48, 3, 16
Parts = dict[str, Callable[..., Any]]


class Block(nn.Module):
    """A block as people write it, with a place for each thing that may know positions."""

    def __init__(self, parts: Parts, number: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
        self.parts, self.number = parts, number

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.parts.get("enter", lambda x: x)(x)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=2))
        turn = self.parts.get("turn", lambda x: x)
        options = self.parts.get("attention", lambda count: {"attn_mask": mask})(x.shape[1])
        mixed = F.scaled_dot_product_attention(turn(q), turn(k), v, **options)
        x = x + self.parts.get("scale", lambda x: x)(self.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.parts.get("local", lambda x: x)(self.mlp(x))


class HandWritten(nn.Module):
    """A ViT with a class token, and positions added before the first block, of `Block`s."""

    def __init__(self, last: bool = False, keyword: bool = False, **parts: Callable[..., Any]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.blocks = nn.ModuleList(Block(parts, number) for number in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.parts, self.last, self.keyword = parts, last, keyword
        randomised(self, 0).eval()

    def forward(self, images: Tensor) -> Tensor:
        patches, token = self.patches(images).flatten(2).transpose(1, 2), self.token.expand(len(images), -1, -1)
        x = torch.cat([patches, token] if self.last else [token, patches], dim=1) + self.positions
        mask = self.parts["mask"](x) if "mask" in self.parts else None
        for block in self.blocks:
            x = block(x=x, mask=mask) if self.keyword else block(x, mask)
        return self.head(self.parts.get("pool", lambda x: x[:, PATCHES if self.last else 0])(x))


def fixed(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(count: int) -> Tensor:
    """cos and sin of a rotary embedding, (2, count, 16)."""
    angles = torch.arange(count)[:, None] * (100 ** -(torch.arange(8) / 8))[None]
    return torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


COS, SIN = rotary(17)
BIAS, GAMMA, AGAIN = fixed(HEADS, 17, 17), 1 + 0.3 * fixed(17, 1), 0.3 * fixed(17, WIDTH)
KERNEL, SQUARE = fixed(WIDTH, 1, 3), fixed(WIDTH, 1, 3, 3)


def on_the_grid(x: Tensor) -> Tensor:
    """A depthwise convolution over the patches as a grid where they fill one, else over them in a row."""
    side = math.isqrt(x.shape[1] - 1)
    patches = x[:, 1:].transpose(1, 2)
    if side * side != x.shape[1] - 1:
        return torch.cat([x[:, :1], F.conv1d(patches, KERNEL, padding=1, groups=WIDTH).transpose(1, 2)], dim=1)
    mixed = F.conv2d(patches.unflatten(2, (side, side)), SQUARE, padding=1, groups=WIDTH)
    return torch.cat([x[:, :1], mixed.flatten(2).transpose(1, 2)], dim=1)


def distances(count: int) -> Tensor:
    places = torch.arange(count)
    return -(places[:, None] - places[None]).abs() * torch.tensor([0.5, 0.25, 0.1])[:, None, None]


def only_where_some_are_missing(x: Tensor) -> Tensor:
    return x if x.shape[1] == 17 else x + AGAIN[: x.shape[1]]


def plain(pooling: str, **options: Any) -> nn.Module:
    model: Any = randomised(Plain(pooling, **options), 0).eval()
    model.positions = nn.Parameter(model.positions[:, :17].detach())
    return model


KNOW_POSITIONS: dict[str, Callable[[], nn.Module]] = {
    "rope, cos[:N]": lambda: HandWritten(turn=lambda x: rotated(x, COS[: x.shape[2]], SIN[: x.shape[2]])),
    "rope, positions counted anew": lambda: HandWritten(turn=lambda x: rotated(x, *rotary(x.shape[2]))),
    "rope of exactly N": lambda: HandWritten(turn=lambda x: rotated(x, COS, SIN)),
    "relative bias, sliced": lambda: HandWritten(attention=lambda n: {"attn_mask": BIAS[:, :n, :n]}),
    "ALiBi": lambda: HandWritten(attention=lambda n: {"attn_mask": distances(n)}),
    "causal": lambda: HandWritten(attention=lambda n: {"is_causal": True}, pool=lambda x: x.mean(dim=1)),
    "causal, nothing reaches the class token": lambda: HandWritten(attention=lambda n: {"is_causal": True}),
    "a mask as an argument": lambda: HandWritten(mask=lambda x: BIAS[:, : x.shape[1], : x.shape[1]]),
    "a mask that masks nothing": lambda: HandWritten(mask=lambda x: torch.zeros(17, 17)),
    "a mask of the keys": lambda: HandWritten(mask=lambda x: BIAS[:1, :1]),
    "positions in every block": lambda: HandWritten(enter=lambda x: x + AGAIN[: x.shape[1]]),
    "positions where some are missing": lambda: HandWritten(enter=only_where_some_are_missing),
    "layer scale by position": lambda: HandWritten(scale=lambda x: x * GAMMA[: x.shape[1]]),
    "convolution over the row": lambda: HandWritten(
        local=lambda x: F.conv1d(x.transpose(1, 2), KERNEL, padding=1, groups=WIDTH).transpose(1, 2)
    ),
    "convolution over the grid": lambda: HandWritten(local=on_the_grid),
    "a shift by one": lambda: HandWritten(local=lambda x: x.roll(1, dims=1)),
    "first patches apart": lambda: HandWritten(scale=lambda x: torch.cat([x[:, :4], 0.5 * x[:, 4:]], dim=1)),
    "a class token at a fixed end": lambda: HandWritten(last=True),
    "timm eva02": FAMILIES["eva02"].create,
    "timm beit": FAMILIES["beit"].create,
    "Hugging Face DINOv3": lambda: hugging_face("DINOv3ViT", "sdpa"),
    "Hugging Face BEiT": lambda: hugging_face("Beit", "sdpa", use_relative_position_bias=True),
}
KNOW_NONE: dict[str, Callable[[], nn.Module]] = {
    **{name: FAMILIES[name].create for name in FAMILIES if name not in ("beit", "eva02")},
    **{name: partial(hugging_face, name, "sdpa") for name in HUGGING_FACE if name != "DINOv3ViT"},
    **{f"class token {end}": partial(plain, end) for end in ("first", "last", "mean")},
    "N before B": lambda: plain("first", batch_first=False),
    "written by hand": HandWritten,
    "tokens by keyword": lambda: HandWritten(keyword=True),
    "scaled by log N": lambda: HandWritten(attention=lambda n: {"scale": math.log(n) / 8}),
    "a class token that alone is special": lambda: HandWritten(
        scale=lambda x: torch.cat([2 * x[:, :1], x[:, 1:]], dim=1)
    ),
    "a mean over the tokens": lambda: HandWritten(local=lambda x: x + x.mean(dim=1, keepdim=True)),
    "float64": lambda: tiny_vit(depth=12).double(),
    "float16": lambda: tiny_vit(depth=12).half(),
    "bfloat16": lambda: tiny_vit(depth=12).bfloat16(),
}

MIXED = ("convolution over the row", "convolution over the grid", "a shift by one", "a mean over the tokens")
MIXING = {name: make for name, make in {**KNOW_POSITIONS, **KNOW_NONE}.items() if name in MIXED}


def can_leave_out(model: Any) -> bool | None:
    explainer = Explainer(model, ["rollout"])
    is_wide = getattr(getattr(model, "patch_embed", None), "grid_size", None) == (3, 6)
    images = random_images(3, (24, 48) if is_wide else (32, 32))
    grid = explainer(images).maps["rollout"].shape[1:]
    return explainer.can_leave_out_tokens(images, (grid[0], grid[1]))


@pytest.mark.parametrize("name", [name for name in KNOW_POSITIONS if name not in MIXING])
def test_blocks_that_know_positions_keep_their_tokens(name: str) -> None:
    assert not can_leave_out(KNOW_POSITIONS[name]())


@pytest.mark.parametrize("name", MIXING)
def test_blocks_that_mix_tokens_by_more_than_attention_are_not_explained_at_all(name: str) -> None:
    with pytest.raises(ValueError, match="Expected attention alone to mix the tokens"):
        can_leave_out(MIXING[name]())


@pytest.mark.parametrize("name", [name for name in KNOW_NONE if name not in MIXING])
def test_blocks_that_know_none_do_without_tokens(name: str) -> None:
    assert can_leave_out(KNOW_NONE[name]())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["positions in every block", "layer scale by position"])
def test_they_are_found_in_any_precision(name: str, dtype: torch.dtype) -> None:
    model = KNOW_POSITIONS[name]().to(dtype)
    parts: Any = model.parts
    parts |= {key: lambda x, part=part: part(x.float()).to(dtype) for key, part in parts.items()}
    assert not can_leave_out(model)


@pytest.mark.parametrize("offset", [1.0, 4.0, 16.0])
def test_rounding_is_not_taken_for_positions(offset: float) -> None:
    """Tokens change these logits by not much more than bfloat16 rounds them by."""
    model = tiny_vit(depth=12)
    with torch.no_grad():
        model.head.bias += offset
    assert can_leave_out(model) is True
    assert can_leave_out(model.bfloat16()) is not False


def test_of_logits_that_do_not_depend_on_tokens_nothing_is_told() -> None:
    for value in (0.0, math.nan):
        model = tiny_vit()
        nn.init.constant_(model.head.weight, value)
        explainer, images = Explainer(model, ["rollout"]), random_images(2)
        explainer(images)
        assert explainer.can_leave_out_tokens(images, (4, 4)) is None

"""Tiny Vision Transformers of every family, with weights random enough for attention to be far from uniform."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

CLASSES = 5


@dataclass(frozen=True)
class Family:
    """A timm model shrunk to a few tokens, and what a reader of its source knows about its tokens."""

    name: str
    prefix: int
    class_token: int | None
    readout: str  # "class", "class+dist", "patches" or "pool"
    image_size: tuple[int, int] = (32, 32)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // 8, self.image_size[1] // 8

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def start_row(self) -> Tensor:
        row = torch.zeros(self.tokens, dtype=torch.float64)
        rows = {"class": [0], "class+dist": [0, 1], "patches": list(range(self.prefix, self.tokens))}[self.readout]
        row[rows] = 1 / len(rows)
        return row

    def create(self, seed: int = 0) -> Any:
        return tiny_vit(self.name, seed, img_size=self.image_size, **self.options)


FAMILIES = {
    "vit": Family("vit_tiny_patch16_224", 1, 0, "class"),
    "vit_wide": Family("vit_tiny_patch16_224", 1, 0, "class", image_size=(24, 48)),
    "vit_gap": Family("vit_tiny_patch16_224", 1, 0, "patches", options={"global_pool": "avg"}),
    "vit_map": Family("vit_base_patch16_siglip_224", 0, None, "pool"),
    "vit_map_class": Family("vit_tiny_patch16_224", 1, 0, "pool", options={"global_pool": "map"}),
    "deit_distilled": Family("deit_tiny_distilled_patch16_224", 2, 0, "class+dist"),
    "deit3": Family("deit3_small_patch16_224", 1, 0, "class"),
    "beit": Family("beit_base_patch16_224", 1, 0, "patches"),
    "eva02": Family("eva02_tiny_patch14_224", 1, 0, "patches"),
    "dinov2_registers": Family("vit_small_patch14_reg4_dinov2", 5, 0, "class"),
    "registers_gap": Family("vit_medium_patch16_reg4_gap_256", 4, None, "patches"),
}


def tiny_vit(name: str = "vit_tiny_patch16_224", seed: int = 0, **options: Any) -> Any:
    """A timm ViT of 3 blocks, 3 heads and width 48 with 8-pixel patches, in evaluation mode."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
    model = timm.create_model(name, **(shape | options))
    return randomised(model, seed).eval()


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter values of the size that training gives them: tables and scales included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and not any(key in name for key in ("token", "pos", "latent")):
                parameter.copy_(1.4 * noise / parameter[0].numel() ** 0.5)
            elif ("norm" in name and name.endswith("weight")) or "gamma" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.4 * noise)
    return model


def random_images(count: int, size: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def steady_vit() -> Any:
    """A ViT that sees of a patch its mean colour alone, and in a mirror the same, so that drift has a scale."""
    vit = tiny_vit()
    with torch.no_grad():
        position = vit.pos_embed[:, 1:].view(1, 4, 4, -1)
        vit.pos_embed[:, 1:] = (position + position.flip(2)).view(1, 16, -1) / 2
        filters = vit.patch_embed.proj.weight
        filters.copy_(filters.mean(dim=(2, 3), keepdim=True) * filters[0, 0].numel() ** 0.5)
    return vit

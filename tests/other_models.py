"""Tiny models that are no ViTs, and Grad-CAM written by hand for them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from tests.models import CLASSES
from vit_explain_callback import MapFunction


def tiny_resnet(seed: int = 0) -> Any:
    """A ResNet-50 with one bottleneck a stage and narrow channels; 2x2 cells at `layer4` of 64x64 pixels."""
    torch.manual_seed(seed)
    return timm.create_model("resnet50", layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), num_classes=CLASSES)


def tiny_swin(seed: int = 0) -> Any:
    """A Swin with two blocks a stage, one of them shifted; `layers.2` gives (B, 4, 4, C) of 64x64 pixels."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=CLASSES, **shape)


def grad_cam(layer: str, channels_last: bool = False, name: str = "grad_cam") -> MapFunction:
    """Grad-CAM (Selvaraju et al. 2017): relu(Σ_c mean(∂y/∂F_c) F_c) with F the output of a layer."""

    def function(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda _, args, output: seen.append(output))
        logit = model(images).gather(1, target[:, None]).sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(logit, seen)
        features = seen[0]
        if channels_last:
            features, gradient = features.movedim(-1, 1), gradient.movedim(-1, 1)
        return (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).relu()

    return MapFunction(name, function)


def saliency(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """|∂y/∂x|, the greatest of the channels: a map of pixels."""
    images.requires_grad_()
    logit = model(images).gather(1, target[:, None]).sum()
    return torch.autograd.grad(logit, images)[0].abs().amax(dim=1)

"""Explainers of other libraries as methods, one line each: captum, pytorch-grad-cam, torch-cam, zennit.

For instance `ViTExplainCallback(methods=[captum(LayerGradCam, "net.layer4"), captum(IntegratedGradients, n_steps=20)])`
with `from captum.attr import IntegratedGradients, LayerGradCam`.

A layer is named by its path in the model, as in `dict(model.named_modules())`: what is explained is a copy, in which
the model's own modules are not.

Which runs on which model ("reshape": with a `reshape_transform`; "no": refused in a sentence), as the tests try it:

| class | CNN | Swin | ViT of timm | ViT of torchvision |
|---|---|---|---|---|
| captum `IntegratedGradients` | yes | yes | yes | yes |
| captum `Saliency` | yes | yes | yes | yes |
| captum `LayerGradCam` | yes | no | no | no |
| pytorch-grad-cam `GradCAM` | yes | reshape | reshape | reshape |
| torch-cam `GradCAM` | yes | no | no | no |
| torch-cam `LayerCAM` | yes | no | no | no |
| torch-cam `LeGrad` | no | no | no | yes |
| zennit `EpsilonPlus` | yes | yes | yes | no |
| zennit `EpsilonPlusFlat` | yes | yes | yes | no |

CNNs are a ResNet and a ConvNeXt. The composites of zennit have rules for linear and convolutional layers only: in the
others, attention included, relevance is the plain gradient. `tests/benchmarks/README.md` says what each costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from vit_explain_callback.methods.map_function import MapFunction


def captum(attribution: type[Any], layer: str | None = None, *, name: str | None = None, **options: Any) -> MapFunction:
    """A method of captum's, summed over channels.

    Args:
        attribution: Its class: `LayerGradCam`, `IntegratedGradients`, `Saliency`, …
        layer: Path of the layer, for classes that take one. Its output must be (B, C, h, w).
        name: Of the method; by default those of class and layer.
        **options: Of `attribute`: `n_steps=20`, `relu_attributions=True`, …

    Raises:
        TypeError: If `layer` is a module.
    """
    _check_layer(layer)

    def function(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        of = attribution(model) if layer is None else attribution(model, model.get_submodule(layer))
        maps = _summed(of.attribute(images.requires_grad_(), target=target, **options))
        _check_grid(maps.shape[1:], images)
        return maps

    return MapFunction(name or _named(attribution, layer), function)


def pytorch_grad_cam(cam: type[Any], layer: str, *, name: str | None = None, **options: Any) -> MapFunction:
    """A method of pytorch-grad-cam's, at the size of the images, each map between 0 and 1.

    Args:
        cam: Its class: `GradCAM`, `GradCAMPlusPlus`, `EigenCAM`, …
        layer: Path of the layer.
        name: Of the method; by default those of class and layer.
        **options: Of the class: `reshape_transform=` turns a layer's output into (B, C, h, w), as for a ViT or Swin.

    Raises:
        TypeError: If `layer` is a module.
    """
    _check_layer(layer)

    def function(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        chosen = [itemgetter(index) for index in target.tolist()]  # of the logits of an image
        module, grids = model.get_submodule(layer), []
        seen = module.register_forward_hook(lambda _, args, output: grids.append(getattr(output, "shape", ())[2:]))
        try:
            with cam(model=model, target_layers=[module], **options) as of:
                maps = of(input_tensor=images, targets=chosen)
        finally:
            seen.remove()
        if "reshape_transform" not in options:
            _check_grid(grids[0], images)  # the maps are of the size of the images, whatever the layer's
        return torch.from_numpy(maps)

    return MapFunction(name or _named(cam, layer), function)


def torch_cam(cam: type[Any], layer: str, *, name: str | None = None, **options: Any) -> MapFunction:
    """A method of torch-cam's, on the layer's own grid, each map between 0 and 1.

    Args:
        cam: Its class: `GradCAM`, `LayerCAM`, …
        layer: Path of the layer.
        name: Of the method; by default those of class and layer.
        **options: Of the class.

    Raises:
        TypeError: If `layer` is a module.
    """
    _check_layer(layer)

    def function(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with cam(model, target_layer=model.get_submodule(layer), **options) as of:
            maps: Tensor = of(target.tolist(), model(images))[0]
        _check_grid(maps.shape[1:], images)
        return maps

    return MapFunction(name or _named(cam, layer), function)


def zennit(composite: Any, attributor: type[Any] | None = None, *, name: str | None = None) -> MapFunction:
    """Layer-wise relevance propagation by zennit, summed over channels: a map of pixels with both signs.

    Args:
        composite: Rules for the layers: `EpsilonPlusFlat()`, …; with canonizers where batch norm is to be merged.
        attributor: Class of `zennit.attribution`; default: `Gradient`.
        name: Of the method; by default that of the composite's class.
    """

    def function(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        from zennit.attribution import Gradient

        def of_target(logits: Tensor) -> Tensor:
            return torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)

        with (attributor or Gradient)(model=model, composite=composite) as of:
            _, relevance = of(images, of_target)
        return _summed(relevance)

    return MapFunction(name or type(composite).__name__, function)


def _summed(attributed: Tensor) -> Tensor:
    """(B, h, w) of (B, C, h, w)."""
    if attributed.ndim != 4:
        raise ValueError(f"expected a layer whose output is (B, C, h, w), but got {tuple(attributed.shape)}")
    return attributed.detach().sum(dim=1)


def _check_grid(grid: Sequence[int], images: Tensor) -> None:
    """Refuse a grid that is no smaller copy of the images: where channels come last, they are taken for columns."""
    if len(grid) != 2:
        return
    sides = zip(images.shape[2:], grid, strict=True)
    strides = [(side / (cells + 1), side / max(cells - 1, 1e-9)) for side, cells in sides]  # a cell more or less
    if max(low for low, _ in strides) > min(high for _, high in strides):
        raise ValueError(
            f"expected a layer whose output is (B, C, h, w), but got {grid[0]} × {grid[1]} cells of images of "
            f"{images.shape[2]} × {images.shape[3]} pixels, as where channels come last; choose another layer, or "
            "`pytorch_grad_cam` with a `reshape_transform`"
        )


def _named(kind: Any, layer: str | None) -> str:
    return kind.__name__ if layer is None else f"{kind.__name__}_{layer}"


def _check_layer(layer: object) -> None:
    if layer is not None and not isinstance(layer, str):
        raise TypeError(
            f"Expected `layer` to be a path such as 'net.layer4', but got a {type(layer).__name__}: the model that is "
            "explained is a copy, in which that object is not. `dict(model.named_modules())` lists the paths."
        )

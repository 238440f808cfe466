"""Contenders of `python -m tests.benchmarks.cost`: the limits, this package, a way without it, and its peers.

Shapes: B images, L blocks, H heads, N tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.methods.base import FusedMethod, Method
from vit_explain_callback.methods.names import method_from_name

Run: TypeAlias = Callable[[Tensor], object]

FIVE = ("rollout", "rollout_max_0.9", "grad_rollout", "grad_rollout_0.9", "grad_rollout_max_0.9")


@dataclass(frozen=True)
class Contender:
    """One computation on a batch of images.

    Attributes:
        prepare: Turns a timm ViT whose parameters require no gradients into a function of images (B, C, H, W).
        limit: Name of the contender that bounds its cost from below.
        ours: Name of the contender of this package with the same maps, if any.
        matrices: Number of (B, L, H, N, N) tensors that it stores.
    """

    prepare: Callable[[nn.Module], Run]
    limit: str
    ours: str | None = None
    matrices: int = 0


def forward(model: nn.Module) -> Run:
    def run(images: Tensor) -> object:
        with torch.no_grad():
            return model(images)

    return run


def forward_backward(model: nn.Module) -> Run:
    """To the input; that is what a gradient of any kind costs at least."""

    def run(images: Tensor) -> object:
        images = images.detach().requires_grad_()
        logits = model(images)
        return torch.autograd.grad(logits.amax(dim=1).sum(), images)

    return run


def ours(methods: Sequence[str], model: nn.Module) -> Run:
    return Explainer(model, methods)


def while_training(methods: Sequence[str], model: nn.Module) -> Run:
    """With parameters that need gradients, so that autograd keeps their layers' inputs as well."""
    explainer = Explainer(model, methods)

    def run(images: Tensor) -> object:
        model.requires_grad_(True)
        try:
            return explainer(images)
        finally:
            model.requires_grad_(False)

    return run


def materialised(methods: Sequence[str], model: nn.Module) -> Run:
    """Without this package: no fused kernel, every A and ∂y/∂A of the model kept, products of N × N matrices.

    Batched, and correct for a timm ViT whose classifier reads its class token, token 0.
    """
    return partial(materialised_maps, model, [method_from_name(name) for name in methods])


def materialised_maps(model: Any, methods: Sequence[Method], images: Tensor) -> dict[str, Tensor]:
    """Relevance of the patches by method name, (B, P), in float32."""
    with_gradients = any(method.needs_target for method in methods)
    attentions: list[Tensor] = []
    layers = [block.attn for block in model.blocks]
    hooks = [layer.attn_drop.register_forward_pre_hook(lambda _, args: attentions.append(args[0])) for layer in layers]
    fused = [layer.fused_attn for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        with torch.set_grad_enabled(with_gradients):
            logits = model(images.detach().requires_grad_(with_gradients))
            gradients = torch.autograd.grad(logits.amax(dim=1).sum(), attentions) if with_gradients else ()
    finally:
        for layer, flag, hook in zip(layers, fused, hooks, strict=True):
            layer.fused_attn = flag
            hook.remove()
    with torch.no_grad():
        return {
            method.name: _product(method, attentions, gradients)[:, 0, model.num_prefix_tokens :]
            for method in methods
            if isinstance(method, FusedMethod)
        }


def _product(method: FusedMethod, attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """R = Ā^L … Ā^s, (B, N, N)."""
    fuse: dict[str, Any] = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}
    tokens = attentions[0].shape[-1]
    identity = torch.eye(tokens, device=attentions[0].device)
    product = identity
    for layer in range(method.start_block - 1, len(attentions)):
        attention = attentions[layer].float()
        if method.needs_target:
            matrix = fuse[method.head_fusion](attention * gradients[layer].float(), dim=1).relu()
        else:
            matrix = fuse[method.head_fusion](attention, dim=1)
        if dropped := int(method.discard_ratio * tokens**2):
            threshold = matrix.flatten(1).kthvalue(dropped + 1, dim=1).values
            class_self = matrix[:, 0, 0].clone()
            matrix = matrix.masked_fill(matrix < threshold[:, None, None], 0)
            matrix[:, 0, 0] = class_self
        matrix = matrix + identity
        product = matrix / matrix.sum(dim=-1, keepdim=True) @ product
    return product


def grad_cam(model: Any) -> Run:
    """pytorch-grad-cam's GradCAM on the last block; it has no attention methods."""
    package = importlib.import_module("pytorch_grad_cam")
    height, width = model.patch_embed.grid_size

    def to_grid(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].mT.reshape(len(tokens), -1, height, width)

    cam = package.GradCAM(model=model, target_layers=[model.blocks[-1].norm1], reshape_transform=to_grid)

    def run(images: Tensor) -> object:
        return cam(input_tensor=images.detach().clone().requires_grad_(), targets=None)

    return run


def legrad(model: Any) -> Run:
    """torch-cam's LeGrad on all blocks."""
    method = importlib.import_module("torchcam.methods").LeGrad

    def run(images: Tensor) -> object:
        with method(model, [block.attn for block in model.blocks]) as extractor:
            logits = model(images)
            return extractor(logits.argmax(dim=1).tolist(), logits)

    return run


def captum(name: str, model: nn.Module) -> Run:
    """One of captum's gradient methods on the input."""
    attribution = getattr(importlib.import_module("captum.attr"), name)(model)

    def run(images: Tensor) -> object:
        images = images.detach().requires_grad_()
        return attribution.attribute(images, target=0)

    return run


FORWARD, BACKWARD = "plain forward", "plain forward + backward"

CONTENDERS: dict[str, Contender] = {
    FORWARD: Contender(forward, FORWARD),
    BACKWARD: Contender(forward_backward, BACKWARD),
    "rollout": Contender(partial(ours, ["rollout"]), FORWARD),
    "rollout_0.9": Contender(partial(ours, ["rollout_0.9"]), FORWARD),
    "grad_rollout": Contender(partial(ours, ["grad_rollout"]), BACKWARD),
    "grad_rollout_0.9": Contender(partial(ours, ["grad_rollout_0.9"]), BACKWARD),
    "five variants": Contender(partial(ours, FIVE), BACKWARD),
    "grad_rollout, while training": Contender(partial(while_training, ["grad_rollout"]), BACKWARD),
    "materialised rollout": Contender(partial(materialised, ["rollout"]), FORWARD, "rollout", 1),
    "materialised grad_rollout": Contender(partial(materialised, ["grad_rollout"]), BACKWARD, "grad_rollout", 3),
    "materialised five variants": Contender(partial(materialised, FIVE), BACKWARD, "five variants", 3),
    "pytorch-grad-cam GradCAM": Contender(grad_cam, BACKWARD),
    "torch-cam LeGrad": Contender(legrad, BACKWARD),
    "captum Saliency": Contender(partial(captum, "Saliency"), BACKWARD),
    "captum InputXGradient": Contender(partial(captum, "InputXGradient"), BACKWARD),
}

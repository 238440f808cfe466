"""Measure the cost of other libraries' explainers, relative to one of ours and to forward and backward.

On ViT-Ti/16 at 224, 4 images, times are over those of `grad_rollout`; on a tiny ResNet and a tiny Swin, which have no
rollout, over a forward pass and a backward pass to the images. All go through an `Explainer`, which explains a copy.
Each round runs all of a model in turn, in another order each; a ratio is the median over rounds of the ratio within a
round, with its 10th and 90th percentile. Times are the process's own CPU time, as others may use the machine.

    python -m tests.benchmarks.adapters --rounds 9

Libraries that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tests.benchmarks.measure import seconds
from tests.other_models import tiny_resnet, tiny_swin
from vit_explain_callback import Explainer, MapFunction
from vit_explain_callback.adapters import captum, pytorch_grad_cam, torch_cam, zennit

LIMIT = "forward and backward"
OURS = "grad_rollout"
_IMAGES = 4


def forward_and_backward(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """|∂y/∂x|: what any explanation by gradients must compute."""
    logits = model(images.requires_grad_()).gather(1, target[:, None])
    return torch.autograd.grad(logits.sum(), images)[0].abs().amax(dim=1)


def on_vit() -> dict[str, Callable[[], Any]]:
    """Methods of other libraries that run on a ViT."""

    def to_grid(tokens: Tensor) -> Tensor:
        side = round((tokens.shape[1] - 1) ** 0.5)
        return tokens[:, 1:].unflatten(1, (side, side)).movedim(-1, 1)

    last = "blocks.10.norm1"
    return {
        "chefer": lambda: "chefer",
        "legrad": lambda: "legrad",
        "captum Saliency": lambda: captum(_of("captum.attr", "Saliency")),
        "captum IntegratedGradients, 20 steps": lambda: captum(_of("captum.attr", "IntegratedGradients"), n_steps=20),
        "pytorch-grad-cam GradCAM": lambda: pytorch_grad_cam(
            _of("pytorch_grad_cam", "GradCAM"), last, reshape_transform=to_grid
        ),
        "zennit EpsilonPlus": lambda: zennit(_of("zennit.composites", "EpsilonPlus")()),
    }


def on_resnet() -> dict[str, Callable[[], Any]]:
    """Methods of other libraries that need feature maps."""
    return {
        "captum LayerGradCam": lambda: captum(_of("captum.attr", "LayerGradCam"), "layer3"),
        "pytorch-grad-cam GradCAM": lambda: pytorch_grad_cam(_of("pytorch_grad_cam", "GradCAM"), "layer3"),
        "torch-cam GradCAM": lambda: torch_cam(_of("torchcam.methods", "GradCAM"), "layer3"),
        "torch-cam LayerCAM": lambda: torch_cam(_of("torchcam.methods", "LayerCAM"), "layer3"),
        "zennit EpsilonPlusFlat": lambda: zennit(_of("zennit.composites", "EpsilonPlusFlat")()),
    }


def on_swin() -> dict[str, Callable[[], Any]]:
    """Methods of other libraries that can turn tokens into feature maps."""
    return {
        "captum Saliency": lambda: captum(_of("captum.attr", "Saliency")),
        "pytorch-grad-cam GradCAM": lambda: pytorch_grad_cam(
            _of("pytorch_grad_cam", "GradCAM"), "layers.2", reshape_transform=lambda output: output.movedim(-1, 1)
        ),
    }


def _of(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def runs(model: nn.Module, size: int, methods: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], object]]:
    """A call for each method whose library is installed, and for the two references where they exist."""
    images = torch.randn(_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    target = torch.arange(_IMAGES)
    found: dict[str, Any] = {LIMIT: MapFunction("limit", forward_and_backward)}
    if isinstance(model, timm.models.VisionTransformer):
        found[OURS] = OURS
    for name, make in methods.items():
        with suppress(ImportError):
            found[name] = make()

    def call(method: Any) -> Callable[[], object]:
        explainer = Explainer(model, [method])
        return lambda: explainer(images, target)

    return {name: call(method) for name, method in found.items()}


def ratios(calls: Mapping[str, Callable[[], object]], over: str, rounds: int) -> dict[str, Sequence[float]]:
    """Time of each call relative to one of them, in each round."""
    for call in calls.values():
        call()
    shuffle, taken = random.Random(0), []
    for _ in tqdm(range(rounds)):
        order = list(calls)
        shuffle.shuffle(order)
        spent = {name: seconds(calls[name], clock="process") for name in order}
        taken.append({name: spent[name] / spent[over] for name in calls})
    return {name: [one[name] for one in taken] for name in calls}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vit-size", type=int, default=224)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=args.vit_size, num_classes=1000).eval()
    cases: list[tuple[str, nn.Module, int, dict[str, Callable[[], Any]], str]] = [
        (f"ViT-Ti/16 {args.vit_size}", vit, args.vit_size, on_vit(), OURS),
        ("tiny ResNet 64", tiny_resnet().eval(), 64, on_resnet(), LIMIT),
        ("tiny Swin 64", tiny_swin().eval(), 64, on_swin(), LIMIT),
    ]
    print("| model | method | over | median (p10 – p90) |\n|---|---|---|---|")
    for title, model, size, methods, over in cases:
        for name, found in ratios(runs(model, size, methods), over, args.rounds).items():
            low, median, high = np.percentile(found, [10, 50, 90])
            print(f"| {title} | {name} | {over} | {median:.2f} ({low:.2f} – {high:.2f}) |")


if __name__ == "__main__":
    main()

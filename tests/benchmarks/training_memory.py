"""Measure the memory of gradient rollout on a model in training, whose parameters require gradients.

The limit is a forward pass and a backward pass to the images alone, of a model whose parameters require none. What is
explained is a twin of the model, whose parameters require none either.

    python -m tests.benchmarks.training_memory
    python -m tests.benchmarks.training_memory --checkpointing
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from tests.benchmarks.measure import in_new_process, peak_bytes
from vit_explain_callback.explainer import Explainer


def limit(model: Any, images: Tensor) -> None:
    """Forward, and backward to the images."""
    images = images.clone().requires_grad_()
    torch.autograd.grad(model(images).amax(dim=1).sum(), images)


def peak(name: str, size: int, batch: int, checkpointing: bool, who: str) -> int:
    """Bytes above the model; `who` is "limit" or "explained"."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = timm.create_model(name, img_size=size, num_classes=10).eval()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(batch, 3, size, size)
    run: Callable[[], object]
    if who == "limit":
        model.requires_grad_(False)
        run = lambda: limit(model, images)  # noqa: E731
    else:
        explainer = Explainer(model.train(), ["grad_rollout"])
        run = lambda: explainer(images)  # noqa: E731
    run()
    return peak_bytes(run, "cpu")


def ratio(name: str, size: int, batch: int, checkpointing: bool) -> tuple[float, int]:
    """Of what explaining takes to the limit, each in a process of its own; and the limit in bytes."""
    found = {who: in_new_process(peak, name, size, batch, checkpointing, who) for who in ("limit", "explained")}
    return found["explained"] / found["limit"], found["limit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    times, least = ratio(args.model, args.size, args.batch, args.checkpointing)
    print(f"{args.model} at {args.size}, {args.batch} images: {times:.2f} x the limit of {least / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()

"""Measure how far a change that a model should ignore moves its output and its maps.

Four models: the example's small ViT with a new head on shapes; the same on images with a corner square of a random
colour, after it has learnt that the colour gives the label away, and before; and, with a folder of photographs and
weights, DINOv2 ViT-S/14. For each change: the share of predictions that hold, how far the logits move beside those of
another image (root mean squares; below a half, `output_holds`), and for each method the rank correlation of the maps
and its d' against that of different images, as in `methods`. `the package` is what its noise floor is measured with.

    VIT_EXPLAIN_WEIGHTS=dinov2_vits14.safetensors python -m tests.benchmarks.noise --stamps DIR
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pretrain import WEIGHTS, small_vit
from shapes import FINETUNE_CLASSES, PATCH_SIZE, Shapes
from torch import Tensor
from torch.utils.data import DataLoader

from tests.benchmarks import fine_tuned
from tests.benchmarks.resampling import d_prime
from vit_explain_callback import explain
from vit_explain_callback.cli.weights import Weights
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.reference import nudged, output_holds, shifted, unrelated_level

METHODS = ("rollout", "grad_rollout")
IMAGES = 64
Change = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""What is done to images, and to their maps to compare them."""


def changes(patch: int, grid: tuple[int, int]) -> dict[str, Change]:
    """By name."""

    def same(values: Tensor) -> Tensor:
        return values

    def mirrored(values: Tensor) -> Tensor:
        return values.flip(-1)

    found: dict[str, Change] = {"mirror": (mirrored, mirrored)}
    for share in (8, 4, 2):
        pixels = max(1, patch // share)
        found[f"shift by {pixels} of {patch} pixels"] = (partial(shifted, down=pixels, right=pixels), same)
    found["grain, 5 % of the deviation"] = (lambda images: _grained(images, 0.05), same)
    found["the package, no mirror"] = (lambda images: nudged(images, grid), same)
    found["the package, with a mirror"] = (lambda images: nudged(images, grid, mirror=True), mirrored)
    return found


def _grained(images: Tensor, by: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return images + by * images.std(dim=(1, 2, 3), keepdim=True) * noise


def table(model: Any, images: Tensor, labels: Tensor, patch: int) -> Iterator[str]:
    """Rows of a model, and what another image does."""
    before = explain(model, images, METHODS, labels, batch_size=16)
    height, width = before.maps["rollout"].shape[1:]
    between = torch.pdist(before.logits.double()).pow(2).mean().sqrt()
    for name, (change, back) in changes(patch, (height, width)).items():
        after = explain(model, change(images), METHODS, labels, batch_size=16)
        held = (after.prediction == before.prediction).double().mean()
        moved = (after.logits - before.logits).double().pow(2).sum(dim=1).mean().sqrt()
        holds = "yes" if output_holds(before.logits, after.logits) else "no"
        rho = {method: spearman(back(after.maps[method]), before.maps[method]) for method in METHODS}
        cells = [f"{rho[method].nanmean():.2f}, {_d_prime(rho[method], before.maps[method]):.1f}" for method in METHODS]
        yield f"| {name} | {held:.2f} | {moved / between:.2f}, {holds} | {' | '.join(cells)} |"
    levels = [unrelated_level(before.maps[method], spearman) for method in METHODS]
    yield f"| another image | | 1 | {levels[0]:.2f} | {levels[1]:.2f} |"


def _d_prime(of_changed: Tensor, maps: Tensor) -> float:
    """Separation of rank correlations, (B,), from those of neighbours, which are different images."""
    return -d_prime(of_changed.numpy(), spearman(maps, maps.roll(1, 0)).numpy())


def _corner(tuned: bool) -> tuple[Any, Tensor, Tensor]:
    """The small ViT, images whose corner square has a random colour, and labels."""
    model: Any = small_vit(len(FINETUNE_CLASSES))
    Weights.read(WEIGHTS).load_into(model)
    if tuned:
        torch.manual_seed(0)
        loader = DataLoader(Shapes(FINETUNE_CLASSES, 80 * 32, seed=2000, shortcut="label"), 32)
        fine_tuned.tuned(model, ((images, labels) for images, labels, _ in loader), body_lr=1e-3)
    shown = Shapes(FINETUNE_CLASSES, IMAGES, seed=5, shortcut="random")
    images, labels, _ = zip(*(shown[index] for index in range(IMAGES)), strict=True)
    return model.eval(), torch.stack(images), torch.tensor(labels)


def models(stamps: Path | None) -> Mapping[str, Callable[[], tuple[Any, Tensor, Tensor, int]]]:
    """What is measured, by name; made when it is asked for."""

    def of(task: fine_tuned.Task) -> tuple[Any, Tensor, Tensor, int]:
        return task.model, task.images[:IMAGES], task.labels[:IMAGES], task.patch

    found: dict[str, Callable[[], tuple[Any, Tensor, Tensor, int]]] = {
        "shapes": lambda: of(fine_tuned.made_up_shapes(0)),
        "shapes and a corner square, before": lambda: (*_corner(tuned=False), PATCH_SIZE),
        "shapes and a corner square, learnt": lambda: (*_corner(tuned=True), PATCH_SIZE),
    }
    if stamps is not None and "VIT_EXPLAIN_WEIGHTS" in os.environ:
        found["photographs, DINOv2"] = lambda: of(fine_tuned.photographs(stamps, 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, help="folder with train/, val/ and masks/, as of `methods`")
    for name, made in models(parser.parse_args().stamps).items():
        print(
            f"\n{name}\n\n| change | predictions hold | output moves, holds | rollout ρ, d' | gradient rollout ρ, d' |"
        )
        print("|---|---|---|---|---|", *table(*made()), sep="\n")


if __name__ == "__main__":
    main()

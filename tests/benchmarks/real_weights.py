"""Measure rollout and gradient rollout on real weights: faithfulness, randomised blocks, and known caveats.

DINOv2 ViT-S/14 is fine-tuned for a few steps to tell shapes apart, and then:

- faithfulness of head fusions and discard ratios: symmetric relevance gain against a random order, and lift on the
  object;
- cascading randomisation (Adebayo et al. 2018, arXiv:1810.03292): blocks are re-initialised from the last to the first;
- another image's attention in one block: in which blocks does a map notice?
- attention flow to each patch, against the capped column sum of the first block;
- gradients multiplied by 10 and 100.

    VIT_EXPLAIN_WEIGHTS=dinov2_vits14.safetensors python -m tests.benchmarks.real_weights
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from shapes import FINETUNE_CLASSES, Shapes
from torch import Tensor, nn

from tests import oracle
from tests.benchmarks.fine_tuned import IMAGENET_MEAN, IMAGENET_STD, SIZE, dinov2, tuned
from vit_explain_callback import attention_flow, attention_rollout, explain, gradient_rollout
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.faithfulness import mean_colour, random_maps, symmetric_relevance_gain
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.margin import margin

GRID = (8, 8)
VARIANTS = [
    f"{kind}{fusion}{ratio}"
    for kind in ("rollout", "grad_rollout")
    for fusion in ("", "_max", "_min")
    for ratio in ("", "_0.5", "_0.9")
] + [f"{kind}_from{first}" for kind in ("rollout", "grad_rollout", "flow") for first in (7, 10, 12)]
VARIANTS += ["flow", "flow_max", "flow_0.9"]


def batch(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images for DINOv2, labels and object masks."""
    data = Shapes(FINETUNE_CLASSES, count, seed)
    images, labels, masks = zip(*(data[index] for index in range(count)), strict=True)
    pixels = torch.stack(images) / 2 + 0.5
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    resized = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
    return (resized - mean[:, None, None]) / std[:, None, None], torch.tensor(labels), torch.stack(masks)


def fine_tuned(steps: int, seed: int) -> Any:
    batches = (batch(10_000 + 1000 * seed + step, 32)[:2] for step in range(steps))
    return tuned(dinov2(len(FINETUNE_CLASSES), seed), batches)


def mean_and_margin(values: Tensor) -> str:
    error = margin(values)
    return "not known" if error is None else f"{values[values.isfinite()].mean():.3f} ± {error:.3f}"


def faithfulness(model: Any, images: Tensor, labels: Tensor, masks: Tensor) -> None:
    maps = explain(model, images, VARIANTS, target=labels, batch_size=16).maps
    maps = {**maps, "random": random_maps(len(images), GRID)}
    remove = mean_colour(partial(Explainer(model, ["rollout"]).logits, batch_size=64))
    gains = symmetric_relevance_gain(remove, images, maps, labels)
    print("\n| method | SRG | above random | lift on the object |\n|---|---|---|---|")
    for name, gain in sorted(gains.items(), key=lambda item: -item[1].nanmean().item()):
        lift = region_statistics(maps[name], masks)["lift"]
        above = mean_and_margin(gain - gains["random"])
        print(f"| `{name}` | {mean_and_margin(gain)} | {above} | {lift.nanmean():.2f} |")


def cascade(model: Any, images: Tensor, labels: Tensor) -> None:
    before = explain(model, images, target=labels, batch_size=16, block_statistics=True)
    changed = copy.deepcopy(model)
    print("\n| drawn anew | rollout ρ | gradient rollout ρ | readout's row of the last block ρ |\n|---|---|---|---|")
    parts = {"head": changed.head}
    parts |= {f"+ block {block + 1}": changed.blocks[block] for block in reversed(range(len(changed.blocks)))}
    for name, part in parts.items():
        torch.manual_seed(0)
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.weight.std().item())
                nn.init.zeros_(module.bias)
        after = explain(changed, images, target=labels, batch_size=16, block_statistics=True)
        assert before.blocks is not None
        assert after.blocks is not None
        row = spearman(after.blocks.rows[:, -1], before.blocks.rows[:, -1]).nanmean()
        rho = [spearman(after.maps[method], before.maps[method]).nanmean() for method in before.maps]
        print(f"| {name} | {rho[0]:.2f} | {rho[1]:.2f} | {row:.2f} |")


def swapped_blocks(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    def maps(used: Sequence[Tensor], with_gradients: Sequence[Tensor] | None) -> Tensor:
        rows = attention_rollout(used) if with_gradients is None else gradient_rollout(used, with_gradients)
        return rows[:, 1:].view(-1, *GRID)

    print("\n| another image's attention in block | rollout ρ | gradient rollout ρ |\n|---|---|---|")
    for block in range(len(attentions)):
        used, weights = list(attentions), list(gradients)
        used[block], weights[block] = used[block].roll(1, 0), weights[block].roll(1, 0)
        rollout = spearman(maps(used, None), maps(attentions, None)).nanmean()
        gradient = spearman(maps(used, weights), maps(attentions, gradients)).nanmean()
        print(f"| {block + 1} | {rollout:.2f} | {gradient:.2f} |")


def scaled_gradients(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    plain = gradient_rollout(attentions, gradients)[:, 1:].view(-1, *GRID)
    for factor in (0.1, 10, 100):
        rows = gradient_rollout(attentions, [factor * gradient for gradient in gradients])
        rho = spearman(rows[:, 1:].view(-1, *GRID), plain).nanmean()
        print(f"gradients × {factor:g}: ρ with the map of the plain gradients {rho:.2f}")


def flow(attentions: Sequence[Tensor]) -> None:
    """Attention flow to each patch, against the capped column sum of the first block."""
    values = attention_flow(attentions)[:, 1:]
    means = [attention.mean(dim=1).double() for attention in attentions]
    first = (means[0] + torch.eye(means[0].shape[-1])) / 2  # rows sum to 1 already
    gaps = (values - first.sum(dim=1).clamp(max=1)[:, 1:]).abs()
    print(
        f"attention flow to {gaps.numel()} patches: differs from the capped column sum of the first block by "
        f"{gaps.max():.1e} at most; {(values > 1 - 1e-9).double().mean():.0%} are at the ceiling of 1"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = fine_tuned(args.steps, args.seed)
    images, labels, masks = batch(1, args.num_images)
    accuracy = (Explainer(model, ["rollout"]).logits(images, batch_size=64).argmax(dim=1) == labels).float().mean()
    print(f"\naccuracy after {args.steps} steps: {accuracy:.2f} on {args.num_images} images")
    faithfulness(model, images, labels, masks)
    cascade(model, images, labels)
    few = oracle.matrices(model, images[:16], labels[:16].tolist())
    swapped_blocks(few.attentions, few.gradients)
    scaled_gradients(few.attentions, few.gradients)
    flow(few.attentions)


if __name__ == "__main__":
    main()

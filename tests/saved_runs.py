"""Folders of runs as the callback saves them, without a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.attention import BlockStatistics
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.overlay import Picture

GRIDS = {"rollout": (4, 6), "grad_rollout": (3, 5)}


def smooth_pictures(count: int, size: tuple[int, int]) -> list[Picture]:
    """Pictures (H, W, 3) in which every pixel differs from its neighbours a little."""
    down, across = np.linspace(0, 3, size[0])[:, None], np.linspace(0, 3, size[1])[None]
    waves = [[np.sin(down * (c + 1) + i) + np.cos(across * (c + 2) - i) for c in range(3)] for i in range(count)]
    return [((np.stack(wave, axis=2) / 4 + 0.5) * 255).astype(np.uint8) for wave in waves]


def save_run(
    folder: Path,
    *,
    images: int = 4,
    steps: Sequence[int] = (0, 10, 20, 40),
    grids: Mapping[str, tuple[int, int]] | None = None,
    classes: int = 3,
    size: tuple[int, int] = (48, 64),
    labels: Sequence[int] | None = (0, 1, 2, 0),
    class_names: Sequence[str] | None = ("cat", "dog", "hare"),
    regions: Sequence[str] = (),
    blocks: int = 0,
    regression: bool = False,
    seed: int = 0,
    maps: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a run with random maps, or `maps` (T, B, grid_h, grid_w) by method; pictures and labels are the same ones
    whatever the `seed`.
    """
    # What blocks attend to is compared with the maps, patch by patch.
    grids = grids or (dict.fromkeys(GRIDS, (4, 6)) if blocks else GRIDS)
    generator = torch.Generator().manual_seed(seed)
    explanations = folder / "explanations"
    explanations.mkdir(parents=True)
    masks = {name: torch.zeros(images, *size, dtype=torch.bool) for name in regions}
    for index, mask in enumerate(masks.values()):
        mask[:, 8 : 24 + 8 * index, 8:32] = True
    known = None if labels is None else torch.tensor(labels)
    probe = Probe(None, smooth_pictures(images, size), known, masks, class_names, regression)
    probe.save(explanations / "probe.safetensors")
    for index, step in enumerate(steps):
        random = {name: torch.rand(images, *shape, generator=generator) ** 3 for name, shape in grids.items()}
        found = random if maps is None else {name: each[index] for name, each in maps.items()}
        logits = torch.randn(images, classes, generator=generator)
        target = torch.tensor([0] * images if labels is None else labels).clamp(min=0)
        seen = _blocks(images, blocks, next(iter(grids.values())), generator) if blocks else None
        Snapshot(step, Explanation(found, logits, target, seen)).save(explanations / f"step_{step:08d}.safetensors")
    return folder


def _blocks(images: int, blocks: int, grid: tuple[int, int], generator: torch.Generator) -> BlockStatistics:
    shapes = [(images, blocks, *grid)] * 2 + [(images, blocks)] * 5
    return BlockStatistics(*(torch.rand(shape, generator=generator) for shape in shapes))

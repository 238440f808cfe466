"""Draw designs of the overlay side by side, and measure them also as colour-blind eyes see them.

    PYTHONPATH=examples python -m tests.benchmarks.overlay_designs cat.png coffee.png --checkpoint dinov2.safetensors

The picture has a row for each photograph (rollout of a DINOv2 ViT-S/14) and for two shapes of the examples (gradient
rollout), and the first row once more as two kinds of colour-blind people see it; columns are the designs. The table has
a line for each design and kind of sight, over all pixels of the pictures:

- `lightness`: mean L* of the picture under such a map as the next.
- `photograph`: contrast of the picture under a uniform map of a scale that ends at 10 × uniform, as a share of that of
  the photograph: the standard deviation of L*.
- `strongest`: colour difference between strongest relevance and none, in 95 % of the pixels at least.
- `step`: the same between neighbours of the six values 0, 0.2, …, 1, for the pair that is told apart worst.

The package draws `chosen`; README.md has the figures.

Colour differences are Euclidean in CIELAB (ΔE*ab, 1976), of which about 2.3 is just noticeable (Mahy et al. 1994).
Colour blindness is simulated in linear RGB with the matrices of Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15:6)
for severity 1, lightness alone by the luminance of ITU-R BT.709.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pretrain import WEIGHTS, small_vit
from shapes import MEAN, PRETRAIN_CLASSES, STD, Shapes
from torch import Tensor
from torchvision.transforms import v2

from vit_explain_callback import explain
from vit_explain_callback.cli.weights import Weights
from vit_explain_callback.visualization.encode import jpeg
from vit_explain_callback.visualization.overlay import (
    Picture,
    backdrop,
    blend,
    colour_limit,
    resized,
    times_uniform,
    unnormalise,
)
from vit_explain_callback.visualization.text import with_strip

Values: TypeAlias = NDArray[np.float64]

SIDE = 160
SIGHT: dict[str, Values] = {
    "all colours": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "lightness": np.array([[0.2126, 0.7152, 0.0722]] * 3),
}


def inferno(picture: Picture, values: Values) -> Values:
    """What the package drew before: every pixel 60 % of inferno's colour."""
    grey = (picture @ [0.299, 0.587, 0.114] / 255)[..., None]
    return 0.6 * matplotlib.colormaps["inferno"](values)[..., :3] + 0.4 * grey


def one_hue(picture: Picture, values: Values) -> Values:
    """Vermilion over light grey, the more opaque the stronger."""
    opacity = 0.9 * values[..., None]
    return (1 - opacity) * backdrop(picture)[..., None] + opacity * np.array([0.835, 0.369, 0.0])


def spotlight(picture: Picture, values: Values) -> Values:
    """The photograph in its own colours where the map is strong, pale grey elsewhere."""
    pale = 0.4 + 0.6 * backdrop(picture)[..., None]
    return (1 - values[..., None]) * pale + values[..., None] * picture / 255


def purple(picture: Picture, values: Values) -> Values:
    """What the package draws: light to dark purple over light grey, the more opaque the stronger."""
    return blend(backdrop(picture), values) / 255


DESIGNS: dict[str, Callable[[Picture, Values], Values]] = {
    "before": inferno,
    "one hue": one_hue,
    "spotlight": spotlight,
    "chosen": purple,
}


def seen(colours: Values, sight: Values) -> Values:
    """sRGB colours in [0, 1] as another eye sees them, in sRGB."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4) @ sight.T
    linear = linear.clip(0, 1)
    result: Values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return result


def lab(colours: Values) -> Values:
    """CIELAB of sRGB colours in [0, 1], white D65, along the last axis."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    ratio = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def table(pictures: Sequence[Picture]) -> dict[tuple[str, str], dict[str, float]]:
    """Contrast of each design, under each kind of sight."""
    pixels = np.concatenate([picture.reshape(-1, 1, 3) for picture in pictures])
    photograph = lab(pixels / 255)[..., 0].std()
    rows = {}
    for name, design in DESIGNS.items():
        levels = [design(pixels, np.full(pixels.shape[:2], value)) for value in (0.1, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
        for sight, matrix in SIGHT.items():
            uniform, *scale = (lab(seen(level, matrix)) for level in levels)
            steps = [np.linalg.norm(b - a, axis=-1) for a, b in pairwise(scale)]
            strongest = np.linalg.norm(scale[-1] - scale[0], axis=-1)
            rows[name, sight] = {
                "lightness": float(uniform[..., 0].mean()),
                "photograph": float(uniform[..., 0].std() / photograph),
                "strongest": float(np.quantile(strongest, 0.05)),
                "step": float(min(np.quantile(step, 0.05) for step in steps)),
            }
    return rows


def side_by_side(pictures: Sequence[Picture], maps: Sequence[Tensor]) -> Picture:
    """A row for each picture with its map, then the first again as colour-blind people see it; designs are columns."""
    every = [(index, "all colours") for index in range(len(pictures))] + [(0, "protanopia"), (0, "deuteranopia")]
    rows: list[list[Picture]] = []
    for index, sight in every:
        height, width, _ = pictures[index].shape
        values = times_uniform(maps[index][None])[0] / colour_limit(maps[index][None])
        shown = F.interpolate(values.clamp(0, 1)[None, None], (height, width))[0, 0].numpy()
        drawn = [pictures[index] / 255, *(design(pictures[index], shown) for design in DESIGNS.values())]
        cells = [(seen(cell, SIGHT[sight]) * 255).round().astype(np.uint8) for cell in drawn]
        rows.append([with_strip(cell, sight) for cell in cells] if len(rows) >= len(pictures) else cells)
    heading = [with_strip(np.full((1, SIDE, 3), 255, dtype=np.uint8), name) for name in ("photograph", *DESIGNS)]
    return np.concatenate([np.concatenate(row, axis=1) for row in (heading, *rows)])


def photographs(paths: Sequence[Path], checkpoint: Path | None) -> tuple[list[Picture], list[Tensor]]:
    """The middles of photographs, with the rollout of a DINOv2 ViT-S/14, of random weights if need be."""
    model: Any = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    if checkpoint is not None:
        Weights.read(checkpoint).load_into(model)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    transform = v2.Compose(
        [
            v2.Resize(224),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    maps = explain(model, images, "rollout_max_0.9").maps["rollout_max_0.9"]
    return [resized(unnormalise(image, mean, std), SIDE, SIDE) for image in images], list(maps)


def shapes(count: int) -> tuple[list[Picture], list[Tensor]]:
    """Shapes of the examples, with the gradient rollout of the ViT that knows them."""
    model = small_vit(len(PRETRAIN_CLASSES))
    Weights.read(WEIGHTS).load_into(model)
    data = Shapes(PRETRAIN_CLASSES, count, seed=0, shortcut="random")
    images = torch.stack([data[index][0] for index in range(count)])
    maps = explain(model, images, "grad_rollout").maps["grad_rollout"]
    return [resized(unnormalise(image, MEAN, STD), SIDE, SIDE) for image in images], list(maps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="*")
    parser.add_argument("--checkpoint", type=Path, help="DINOv2 ViT-S/14 in timm's names; random weights without it")
    parser.add_argument("--output", type=Path, default=Path("overlay_designs.jpg"))
    args = parser.parse_args(arguments)
    pictures, maps = shapes(2)
    if args.photographs:
        more_pictures, more_maps = photographs(args.photographs, args.checkpoint)
        pictures, maps = more_pictures + pictures, more_maps + maps
    args.output.write_bytes(jpeg(side_by_side(pictures, maps)))
    print("design      sight         lightness  photograph  strongest   step")
    for (design, sight), row in table(pictures).items():
        numbers = "{lightness:9.0f} {photograph:11.2f} {strongest:10.1f} {step:6.1f}".format(**row)
        print(f"{design:11} {sight:13} {numbers}")


if __name__ == "__main__":
    main()

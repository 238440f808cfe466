"""Draw overlays of photographs, one row an image and one column a method, with any timm ViT.

    python examples/overlays.py dog.jpg cat.png --model vit_small_patch14_dinov2 --checkpoint dinov2.safetensors

Without `--checkpoint`, the weights come from the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from vit_explain_callback import explain
from vit_explain_callback.cli.weights import Weights
from vit_explain_callback.visualization.captions import range_caption
from vit_explain_callback.visualization.overlay import colour_limit, overlay, unnormalise
from vit_explain_callback.visualization.text import with_strip

METHODS = ["rollout", "rollout_max_0.9", "rollout_min_0.9", "rollout_from9"]


def main() -> None:
    """Explain the images and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", type=Path, default=Path("overlays.png"))
    args = parser.parse_args()

    model: Any = timm.create_model(args.model, pretrained=args.checkpoint is None, img_size=args.image_size)
    if args.checkpoint is not None:
        Weights.read(args.checkpoint).load_into(model)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    steps = [v2.RGB(), v2.Resize(args.image_size), v2.CenterCrop(args.image_size), v2.ToImage()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    images = torch.stack([transform(Image.open(path)) for path in args.images])
    explanation = explain(model, images, args.methods)

    rows = []
    for index, image in enumerate(images):
        picture = unnormalise(image, mean, std)
        cells = [with_strip(picture, args.images[index].stem)]
        for name, maps in explanation.maps.items():
            limit = colour_limit(maps)
            cells.append(with_strip(overlay(picture, maps[index], limit), f"{name} · {range_caption(limit)}"))
        rows.append(np.concatenate(cells, axis=1))
    Image.fromarray(np.concatenate(rows)).save(args.output)


if __name__ == "__main__":
    main()

"""Train a head on a frozen DINOv2 to tell the dog from the cat in one photograph, to draw class-specific maps.

    python examples/dog_and_cat.py both.png --backbone dinov2.safetensors
    vit-explain both.png --model vit_small_patch14_dinov2 --image_size 224 \
        --checkpoint dog_and_cat.safetensors --class_names dog cat other --category_index dog cat

A linear head is trained on random crops of the dog's box, the cat's box and the rest of that photograph; images from
`--others` join the third class. The head has seen only the animals that it is then asked about, so it shows how maps
differ by class, and does not classify other dogs and cats. The boxes fit `both.png` of
vit-explain.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from vit_explain_callback.cli.photograph import image_files, read_image
from vit_explain_callback.cli.weights import Weights

NAMES = ["dog", "cat", "other"]
CROPS = 40  # of each class


def main() -> None:
    """Train the head and save the whole model in timm's names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--backbone", type=Path, required=True, help="timm file of the model, with or without a head")
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=224)
    # Left, top, right, bottom in fractions of the photograph.
    parser.add_argument("--dog", type=float, nargs=4, default=(0.34, 0.05, 0.74, 0.58))
    parser.add_argument("--cat", type=float, nargs=4, default=(0.15, 0.60, 0.90, 1.0))
    parser.add_argument("--others", type=Path, help="folder of images with neither dog nor cat")
    parser.add_argument("--output", type=Path, default=Path("dog_and_cat.safetensors"))
    args = parser.parse_args()

    torch.manual_seed(0)
    model: Any = timm.create_model(args.model, img_size=args.image_size, num_classes=0).eval()
    Weights.read(args.backbone).load_into(model)
    photograph = read_image(args.photograph)
    # Left and right of the dog, above the cat.
    beside = [(0.0, 0.0, args.dog[0], 0.6), (args.dog[2], 0.0, 1.0, 0.55)]
    others = [cut(photograph, box) for box in beside]
    others += [read_image(path) for path in image_files(args.others)] if args.others else []
    regions = [[cut(photograph, args.dog)], [cut(photograph, args.cat)], others]

    config = model.pretrained_cfg
    steps = [v2.RandomResizedCrop(args.image_size, (0.4, 1.0)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    transform = v2.Compose(steps)
    features, labels = [], []
    for label, images in enumerate(regions):
        crops = torch.stack([transform(images[index % len(images)]) for index in range(CROPS)])
        with torch.no_grad():
            features.append(model(crops))
        labels += [label] * CROPS
    model.head = trained_head(torch.cat(features), torch.tensor(labels))
    save_file(model.state_dict(), args.output)
    print(f"{args.output}: {', '.join(NAMES)}")


def cut(photograph: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Crop a part of the photograph, in fractions of its size."""
    width, height = photograph.size
    return photograph.crop(
        (round(box[0] * width), round(box[1] * height), round(box[2] * width), round(box[3] * height))
    )


def trained_head(features: Tensor, labels: Tensor) -> nn.Linear:
    """Train a linear classifier of features (n, D) with weight decay; it includes the scaling of the features."""
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    head = nn.Linear(features.shape[1], len(NAMES))
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(200):
        loss = nn.functional.cross_entropy(head((features - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    accuracy = (head((features - mean) / std).argmax(dim=1) == labels).float().mean()
    print(f"loss {loss.item():.4f}, accuracy on the crops it was trained on {accuracy.item():.2f}")
    with torch.no_grad():
        head.bias.sub_(head.weight @ (mean / std))
        head.weight.div_(std)
    return head


if __name__ == "__main__":
    main()

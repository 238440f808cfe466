"""Create the starting weights of `finetune.py`: a small ViT that knows shapes, trained from scratch on a CPU.

It learns eight other shapes, then the four of `finetune.py`, always with a corner square of a random colour, which
gives no hint. A second loss asks every patch token whether it lies on the object; it makes so small a run converge.

    python examples/pretrain.py --shapes other --steps 2500 --output other.safetensors
    python examples/pretrain.py --shapes own --steps 800 --start other.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shapes import FINETUNE_CLASSES, IMAGE_SIZE, PATCH_SIZE, PRETRAIN_CLASSES, Shapes
from timm.models import VisionTransformer
from torch.utils.data import DataLoader
from tqdm import tqdm

WEIGHTS = Path(__file__).with_name("shapes_vit.safetensors")


def small_vit(num_classes: int) -> VisionTransformer:
    """The example's model: 6 blocks, 3 heads, width 96, 12 x 12 patches, class token; 0.7 million parameters."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=96,
        depth=6,
        num_heads=3,
        num_classes=num_classes,
    )
    assert isinstance(model, VisionTransformer)
    return model


def main() -> None:
    """Train, print the accuracy on fresh images, and save the weights in half precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["other", "own"], default="own")
    parser.add_argument("--start", type=Path, help="weights to start from; the classifier is new")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(0)
    classes = PRETRAIN_CLASSES if args.shapes == "other" else FINETUNE_CLASSES
    model = small_vit(len(classes))
    if args.start is not None:
        weights = load_file(args.start)
        model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")}, strict=False)
    on_object = torch.nn.Linear(model.embed_dim, 1)
    parameters = [*model.parameters(), *on_object.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    data = Shapes(classes, args.steps * args.batch_size, seed=1, shortcut="random")
    progress = tqdm(DataLoader(data, args.batch_size, num_workers=1), desc="pretrain")
    for images, labels, masks in progress:
        tokens = model.forward_features(images)
        loss = F.cross_entropy(model.forward_head(tokens), labels)
        covered = F.avg_pool2d(masks[:, None].float(), PATCH_SIZE).flatten(1)
        mask_loss = F.binary_cross_entropy_with_logits(on_object(tokens[:, 1:]).squeeze(-1), covered)
        optimizer.zero_grad()
        torch.autograd.backward(loss + mask_loss)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", mask=f"{mask_loss.item():.3f}", refresh=False)

    model.eval()
    fresh = DataLoader(Shapes(classes, 512, seed=2, shortcut="random"), args.batch_size)
    with torch.no_grad():
        correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels, _ in fresh)
    print(f"accuracy on 512 fresh images: {correct / 512:.3f}")
    save_file({name: value.half() for name, value in model.state_dict().items()}, args.output)


if __name__ == "__main__":
    main()

"""Fine-tune a Vision Transformer and track where it looks.

Without arguments, a small ViT learns shapes, offline and on a CPU, from images in which the colour of a corner square
gives the label away, and its explanation moves from the object to the square. `--no-shortcut` is the control.

    python examples/finetune.py
    python examples/finetune.py --no-shortcut
    python examples/finetune.py --dataset pets --model vit_small_patch16_224 --pretrained --lr 5e-5 --epochs 3
    python examples/finetune.py --data-dir my_images --model deit_tiny_patch16_224 --checkpoint weights.safetensors

Then `tensorboard --logdir runs`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import example_data
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain import WEIGHTS, small_vit
from pytorch_lightning.loggers import TensorBoardLogger
from shapes import FINETUNE_CLASSES
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vit_explain_callback import Run, ViTExplainCallback, load_run
from vit_explain_callback.cli.weights import Weights


class FineTune(pl.LightningModule):
    """A classifier trained with AdamW; records the accuracy on each validation set by step, for the final table."""

    def __init__(self, model: nn.Module, lr: float, validation_names: list[str], **hyperparameters: Any) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": lr, **hyperparameters})
        self.model = model
        self.lr = lr
        self.validation_names = validation_names
        self.accuracy: dict[int, dict[str, float]] = {}
        self._correct: dict[str, list[Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch[:2]
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Note which images of a batch are classified correctly."""
        images, labels = batch[:2]
        name = self.validation_names[dataloader_idx]
        self._correct.setdefault(name, []).append(self(images).argmax(dim=1) == labels)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy on each validation set."""
        accuracy = {name: torch.cat(correct).float().mean().item() for name, correct in self._correct.items()}
        self._correct.clear()
        self.accuracy[self.global_step] = accuracy
        self.log_dict({f"accuracy/{name.replace(' ', '_')}": value for name, value in accuracy.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the parameters that are not frozen."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def main() -> None:
    """Fine-tune, print the table and write `filmstrip.png`."""
    args = _arguments()
    made_up = args.data_dir is None and args.dataset == "shapes"
    pl.seed_everything(args.seed)
    model, data = _example(args) if made_up else _own(args)
    if args.freeze_backbone:
        head = {id(parameter) for parameter in model.get_classifier().parameters()}
        for parameter in model.parameters():
            parameter.requires_grad = id(parameter) in head

    loader = DataLoader(data.train, args.batch_size, shuffle=True, num_workers=args.workers)
    validation = [DataLoader(part, args.batch_size, num_workers=args.workers) for part in data.validation.values()]
    every = args.every_n_steps or max(1, args.epochs * len(loader) // 10)
    lr = args.lr or (1e-3 if made_up else 1e-4)
    module = FineTune(model, lr, list(data.validation), seed=args.seed, shortcut=made_up and not args.no_shortcut)
    explain = ViTExplainCallback(
        every_n_steps=every,
        images=(data.probe.images, data.probe.labels),
        regions=data.probe.regions,
        class_names=data.classes,
        batch_size=args.batch_size,
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[explain],
        logger=TensorBoardLogger(str(args.output), name=""),
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # accuracy before the first step
        log_every_n_steps=1,
        accelerator="cpu" if args.cpu else "auto",
        devices=1,
    )
    trainer.fit(module, loader, validation)
    folder = Path(trainer.log_dir or args.output)
    run = load_run(folder)
    _print_table(run, module.accuracy)
    Image.fromarray(run.pictures["explain/filmstrip/grad_rollout"]).save(folder / "filmstrip.png")
    print(f"\n{folder / 'filmstrip.png'} shows it; for curves and pictures: tensorboard --logdir {args.output}")


def _example(args: argparse.Namespace) -> tuple[Any, example_data.Data]:
    model = small_vit(len(FINETUNE_CLASSES))
    Weights.read(WEIGHTS).load_into(model)
    return model, example_data.shapes(args.num_train, args.num_images, args.seed, shortcut=not args.no_shortcut)


def _own(args: argparse.Namespace) -> tuple[Any, example_data.Data]:
    # The classes are known only from the data, and the normalisation only from the model.
    size = {} if args.image_size is None else {"img_size": args.image_size}
    try:
        model: Any = timm.create_model(args.model, pretrained=args.pretrained, **size)
    except (OSError, RuntimeError) as error:
        raise SystemExit(
            f"--model {args.model}: cannot be created: {error}\nWithout the hub, use --checkpoint FILE instead of "
            "--pretrained."
        ) from error
    config = model.pretrained_cfg
    layout = (args.image_size or config["input_size"][1], config["mean"], config["std"], args.num_images)
    if args.data_dir is not None:
        data = example_data.folder(args.data_dir, *layout)
    else:
        data = example_data.pets(args.pets_dir, *layout)
    model.reset_classifier(len(data.classes))
    if args.checkpoint is not None:
        try:
            fresh = Weights.read(args.checkpoint).load_into(model)
        except (OSError, ValueError) as error:
            raise SystemExit(f"--checkpoint: {error}") from error
        print(f"{args.checkpoint.name}: fresh tensors: {', '.join(fresh) or 'none'}")
    return model, data


def _print_table(run: Run, accuracy: dict[int, dict[str, float]]) -> None:
    """Print a line per snapshot: accuracy, drift (1 − Spearman's ρ to the baseline), share of map per region."""
    method, regions = "grad_rollout", list(run.probe.regions)
    names = list(next(iter(accuracy.values()), {}))
    print(f"\n{method}, mean over {len(run.probe)} images")
    print(" | ".join(["step", *(f"accuracy {name}" for name in names), "drift", *(f"on {r}" for r in regions)]))
    for row in run.scalars:
        step = int(row["step"])
        cells = [f"{step:4d}"]
        cells += [f"{accuracy.get(step, {}).get(name, float('nan')):{9 + len(name)}.3f}" for name in names]
        cells += [f"{1 - row[f'explain/drift/baseline_rank_correlation/{method}']:5.3f}"]
        cells += [
            f"{row[f'explain/statistics/region/{region}/{method}/mass']:{3 + len(region)}.3f}" for region in regions
        ]
        print(" | ".join(cells))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-shortcut", action="store_true", help="the corner square says nothing about the label")
    parser.add_argument("--dataset", choices=["shapes", "pets"], default="shapes")
    parser.add_argument("--data-dir", type=Path, help="folder with train/ and val/, one folder for each class inside")
    parser.add_argument("--pets-dir", type=Path, default=Path("data"), help="folder of the pets, downloaded if missing")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="any timm ViT, with --data-dir or pets")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="start from weights of the hub")
    weights.add_argument("--checkpoint", type=Path, help="start from a file that timm can read")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--freeze-backbone", action="store_true", help="train the classifier only")
    parser.add_argument("--lr", type=float, help="default: 1e-3 for the shapes, else 1e-4")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-train", type=int, default=7680, help="training images of the shapes")
    parser.add_argument("--num-images", type=int, default=32, help="images to explain")
    parser.add_argument("--every-n-steps", type=int, help="steps between snapshots; default: ten over the run")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if an accelerator is available")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""The command `vit-explain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm

from vit_explain_callback.methods import resolve_methods
from vit_explain_callback.page import page
from vit_explain_callback.series import explain_series, read_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 if something the user gave cannot be used."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"vit-explain: {error}", file=sys.stderr)
        return 2
    return 0


def _drift(args: argparse.Namespace) -> None:
    model = timm.create_model(args.model)
    images, unreadable = read_images(args.images, model, args.num_images)
    for line in unreadable:
        print(f"vit-explain: left out {line}", file=sys.stderr)
    explain_series(
        args.model,
        args.checkpoints,
        images,
        resolve_methods(args.method),
        args.output,
        target=args.category_index,
        num_shown=args.num_shown,
        batch_size=args.batch_size,
        device=args.device,
        check_every=args.check_every or None,
    )
    _write_page(args.output, args.output / "report.html")


def _report(args: argparse.Namespace) -> None:
    _write_page(args.run_dir, args.output or args.run_dir / "report.html")


def _write_page(run: Path, file: Path) -> None:
    file.write_text(page(run), encoding="utf-8")
    print(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vit-explain", description="Explanations of Vision Transformers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    drift = commands.add_parser("drift", help="the drift of a series of checkpoints")
    drift.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="timm or Lightning; first = baseline"
    )
    drift.add_argument("--images", type=Path, required=True, help="folder of images to explain")
    drift.add_argument("--model", required=True, help="name of the timm model")
    drift.add_argument("--output", type=Path, required=True, help="folder; what it holds already is not computed again")
    drift.add_argument("--method", nargs="+", default=["rollout", "grad_rollout"])
    drift.add_argument("--category-index", "--category_index", type=int, help="class that the gradients are of")
    drift.add_argument("--num-images", type=int, default=16, help="images taken from the folder")
    drift.add_argument("--num-shown", type=int, default=6, help="images drawn")
    drift.add_argument("--check-every", type=int, default=5, help="checkpoints between checks of faithfulness; 0: none")
    drift.add_argument("--batch-size", type=int)
    drift.add_argument("--device", default="cpu")
    drift.set_defaults(run=_drift)

    report = commands.add_parser("report", help="every picture and table of a run, from the raw maps it saved")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run that holds `explanations`")
    report.add_argument("--output", type=Path, help="HTML file; default: report.html in RUN_DIR")
    report.set_defaults(run=_report)
    return parser

"""Parse the words of `vit-explain`. Loads nothing but the standard library, so that help and errors come at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vit_explain_callback.cli.terminal import complain

HEAD_FUSIONS = ("mean", "max", "min")
DISCARD_RATIO = 0.9  # vit-explain's own

_EXAMPLES = """examples:
  vit-explain photo.jpg --open
  vit-explain photos --method rollout grad_rollout --category_index "tabby cat"
  vit-explain photo.jpg --model vit_small_patch16_224 --checkpoint last.ckpt --class_names cat dog
  vit-explain compare photo.jpg

other commands, each with its own --help:
  vit-explain compare   methods and classes side by side on one photograph
  vit-explain drift     the drift of a series of checkpoints
  vit-explain report    the page of a run that was saved

Only results that explanations.json lists are written over.
"""
_COMPARE_EXAMPLES = """examples:
  vit-explain compare photo.jpg
  vit-explain compare photo.jpg --method rollout --discard_ratio 0 0.5 0.9 --open
"""
_DRIFT_EXAMPLES = """examples:
  vit-explain drift epoch_*.ckpt --model vit_small_patch16_224 --images photos --output drift --open
  vit-explain drift run/checkpoint-* --hf run/final --images photos --output drift --method my_methods:grad_cam
"""
_REPORT_EXAMPLES = """examples:
  vit-explain report lightning_logs/version_0 --open
  vit-explain report lightning_logs/version_0 lightning_logs/version_1 --output both.html
"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options; `command` is `images`, `compare`, `drift` or `report`, and `sources` are the images to explain.

    Raises:
        FileNotFoundError: If the only image is not there.
        SystemExit: After the help, and after an option that cannot be used, which is said.
        ValueError: If options do not go together.
    """
    parsers: dict[str, Callable[[], _Parser]] = {"compare": _compare, "drift": _drift, "report": _report}
    command = words[0] if words and words[0] in parsers else None
    args = parsers[command]().parse_args(words[1:]) if command else _images().parse_args(words)
    args.command = command or "images"
    if args.command in ("images", "compare"):
        args.sources = _sources(args)
        _check_together(args)
    return args


def _sources(args: argparse.Namespace) -> list[Path]:
    sources: list[Path] = [*args.images, *(args.image_path or [])]
    if not sources:
        # An option that takes several words takes the images after it as well.
        swallowed = [word for name in ("method", "category_index", "class_names") for word in getattr(args, name) or []]
        file = next((word for word in swallowed if os.path.exists(word)), None)
        hint = "" if file is None else f": {file} went to the option before it; images go first, or after --image_path"
        raise ValueError(f"Expected at least one image or folder{hint}. See vit-explain --help.")
    if len(sources) == 1 and not os.path.exists(sources[0]):
        raise FileNotFoundError(f"There is no file or folder {sources[0]}.")
    return sources


def _check_together(args: argparse.Namespace) -> None:
    if args.command == "compare" and len(args.sources) > 1:
        raise ValueError(f"Expected one image to compare methods on, but got {len(args.sources)}.")
    if args.hf is not None and (args.model or args.checkpoint or args.image_size):
        raise ValueError("Expected --hf to stand without --model, --checkpoint and --image_size: it says all of them.")
    if args.prefix is not None and args.checkpoint is None:
        raise ValueError("Expected --prefix to stand with --checkpoint, the file whose names it begins.")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        complain(f"{message}. See {self.prog} --help.")
        self.exit(2)


def _option(parser: argparse._ActionsContainer, name: str, **how: Any) -> None:
    """Add `--some_name`, which is `--some-name` too."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **how)


def _images() -> _Parser:
    parser = _Parser("vit-explain", "Draw where Vision Transformers look in photographs.", _EXAMPLES)
    _add_images(parser)
    methods = _add_methods(parser)
    fusions = ", ".join(HEAD_FUSIONS)
    _option(
        methods,
        "head_fusion",
        choices=HEAD_FUSIONS,
        metavar="FUSION",
        help=f"{fusions}; default: max, with a class mean",
    )
    _option(
        methods,
        "discard_ratio",
        type=float,
        metavar="RATIO",
        help=f"share of the lowest attention dropped; default: {DISCARD_RATIO}",
    )
    running = _add_model(parser)
    _option(
        running, "batch_size", type=_at_least_one, metavar="COUNT", default=8, help="images in one pass; default: 8"
    )
    _add_output(parser, "folder; default: explanations", default=Path("explanations"))
    return parser


def _compare() -> _Parser:
    parser = _Parser("vit-explain compare", "Compare methods and classes on one photograph.", _COMPARE_EXAMPLES)
    _add_images(parser)
    methods = _add_methods(parser)
    _option(methods, "head_fusion", nargs="+", choices=HEAD_FUSIONS, metavar="FUSION", help="default: mean max min")
    _option(methods, "discard_ratio", nargs="+", type=float, metavar="RATIO", help=f"default: 0 {DISCARD_RATIO}")
    _add_model(parser)
    _add_output(parser, "folder; default: explanations", default=Path("explanations"))
    return parser


def _add_images(parser: _Parser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files and folders")
    _option(images, "image_path", type=Path, nargs="+", metavar="IMAGE", help="the same")


def _add_methods(parser: _Parser) -> argparse._ArgumentGroup:
    methods = parser.add_argument_group("methods and classes")
    _option(
        methods,
        "method",
        nargs="+",
        help="such as rollout, grad_rollout, rollout_max_0.9, or MODULE:NAME of a method of your own; default: "
        "rollout, with a class grad_rollout",
    )
    _option(
        methods, "category_index", nargs="+", metavar="CLASS", help="indices or names; default: the predicted class"
    )
    return methods


def _add_model(parser: _Parser) -> argparse._ArgumentGroup:
    model = parser.add_argument_group("model")
    _option(model, "model", metavar="NAME", help="name of a timm model; default: deit_tiny_patch16_224")
    _option(
        model,
        "checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of timm, Lightning or safetensors, instead of the hub; read as tensors only",
    )
    _option(model, "prefix", help="of the model's names in the checkpoint, where it holds several models")
    _option(model, "hf", metavar="NAME_OR_DIR", help="image classifier of transformers, instead of timm")
    _option(
        model, "class_names", nargs="+", metavar="NAME", help="of the classes, in order, for a checkpoint of your own"
    )
    _option(
        model,
        "image_size",
        type=_at_least_one,
        metavar="PIXELS",
        help="side of the model's images, where it can be chosen",
    )
    running = parser.add_argument_group("running")
    devices = running.add_mutually_exclusive_group()
    devices.add_argument("--device", help="default: cuda or mps if there, else cpu")
    devices.add_argument("--use_cuda", "--use-cuda", action="store_true", help="cuda if there, else cpu")
    return running


def _add_output(parser: _Parser, what: str, **how: Any) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    _option(output, "output", type=Path, metavar="PATH", help=what, **how)
    _option(output, "open", action="store_true", help="show the result in the browser when it is there")
    return output


def _drift() -> _Parser:
    parser = _Parser("vit-explain drift", "Measure the drift of a series of checkpoints.", _DRIFT_EXAMPLES)
    series = parser.add_argument_group("series")
    series.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="files of timm or Lightning, folders of transformers' Trainer; first = baseline",
    )
    kinds = series.add_mutually_exclusive_group(required=True)
    _option(kinds, "model", metavar="NAME", help="name of the timm model")
    _option(kinds, "hf", metavar="NAME_OR_DIR", help="image classifier of transformers, instead of timm")
    _option(series, "prefix", help="of the model's names in the checkpoints, where they hold several models")
    _option(series, "images", type=Path, required=True, metavar="FOLDER", help="folder of images to explain")
    _option(
        series, "num_images", type=_at_least_one, metavar="COUNT", default=16, help="taken from the folder; default: 16"
    )
    measured = parser.add_argument_group("methods and classes")
    _option(
        measured,
        "method",
        nargs="+",
        default=["rollout", "grad_rollout"],
        help="names, or MODULE:NAME of a method of your own; default: rollout grad_rollout",
    )
    _option(
        measured,
        "category_index",
        type=_at_least_zero,
        metavar="INDEX",
        help="class that the gradients are of; default: the prediction at the first checkpoint",
    )
    _option(
        measured,
        "check_every",
        type=_at_least_zero,
        metavar="COUNT",
        default=20,
        help="checkpoints between checks of faithfulness; 0: none; default: 20",
    )
    running = parser.add_argument_group("running")
    _option(running, "batch_size", type=_at_least_one, metavar="COUNT", help="images in one pass; default: all")
    _option(running, "device", default="cpu", help="default: cpu")
    output = _add_output(parser, "folder; what it holds already is not computed again", required=True)
    _option(output, "num_shown", type=_at_least_one, metavar="COUNT", default=6, help="images drawn; default: 6")
    return parser


def _report() -> _Parser:
    about = "Show a run, from the raw maps it saved, or several of the same images side by side."
    parser = _Parser("vit-explain report", about, _REPORT_EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run that holds `explanations`")
    _add_output(parser, "HTML file; default: report.html in the first RUN")
    return parser


def _at_least(lowest: int, text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"expected a number of at least {lowest}, but got {text[:20]}")
    return int(text)


def _at_least_one(text: str) -> int:
    return _at_least(1, text)


def _at_least_zero(text: str) -> int:
    return _at_least(0, text)

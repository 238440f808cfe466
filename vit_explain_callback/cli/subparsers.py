"""The options of `vit-explain` and its subcommands, with their help. Loads nothing but the standard library."""

from __future__ import annotations

import argparse
import importlib.metadata
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vit_explain_callback.cli.terminal import print_error, print_output

HEAD_FUSIONS = ("mean", "max", "min")
DISCARD_RATIO = 0.9  # the default of jacobgil/vit-explain
_PACKAGE = "vit-explain-callback"

_EXAMPLES = """examples:
  vit-explain photo.jpg --open
  vit-explain photos --method rollout grad_rollout --category_index "tabby cat"
  vit-explain photo.jpg --model vit_small_patch16_224 --checkpoint last.ckpt --class_names cat dog
  vit-explain compare photo.jpg

other commands, each with its own --help:
  vit-explain compare   compare methods and classes on one photograph
  vit-explain drift     measure drift over a series of checkpoints
  vit-explain report    write the HTML page of a saved run

Existing files are overwritten only if explanations.json lists them.
Exit status: 0 on success, 2 if an image or option cannot be used, 130 after Ctrl-C.
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


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog, None, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        print_error(f"{message}. See {self.prog} --help.")
        self.exit(2)


class _PrintVersion(argparse.Action):
    """Print the installed version; `argparse` itself would look it up for every call."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = importlib.metadata.version(_PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            version = f"of unknown version, as {_PACKAGE} is not installed"
        print_output(f"vit-explain {version}")
        parser.exit()


def _add_option(group: argparse._ActionsContainer, name: str, description: str, **settings: Any) -> None:
    """Add `--some_name` with the alias `--some-name`."""
    spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    group.add_argument(*spellings, help=description, **settings)


def images_parser() -> _Parser:
    """The parser of `vit-explain` without a subcommand."""
    parser = _Parser("vit-explain", "Draw where a Vision Transformer looks in photographs.", _EXAMPLES)
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    _add_images(parser)
    methods = _add_methods(parser, "rollout, or grad_rollout with --category_index", "the predicted class")
    fusions = f"heads by {', '.join(HEAD_FUSIONS)}; default without --method: max, or mean with --category_index"
    _add_option(methods, "head_fusion", fusions, choices=HEAD_FUSIONS, metavar="FUSION")
    ratio = f"share of the smallest entries set to 0, in [0, 1); default without --method: {DISCARD_RATIO}"
    _add_option(methods, "discard_ratio", ratio, type=float, metavar="RATIO")
    running = _add_model(parser)
    _add_count(running, "batch_size", "images per forward pass; default: 8", default=8)
    _add_output(parser, "folder for the results; default: explanations", default=Path("explanations"))
    return parser


def _compare() -> _Parser:
    parser = _Parser("vit-explain compare", "Compare methods and classes on one photograph.", _COMPARE_EXAMPLES)
    _add_images(parser)
    methods = _add_methods(parser, "grad_rollout rollout", "the two most probable classes")
    fusions = f"heads by {', '.join(HEAD_FUSIONS)}; default: all three"
    _add_option(methods, "head_fusion", fusions, nargs="+", choices=HEAD_FUSIONS, metavar="FUSION")
    ratios = f"shares of the smallest entries set to 0, in [0, 1); default: 0 {DISCARD_RATIO}"
    _add_option(methods, "discard_ratio", ratios, nargs="+", type=float, metavar="RATIO")
    _add_model(parser)
    _add_output(parser, "folder for the results; default: explanations", default=Path("explanations"))
    return parser


def _drift() -> _Parser:
    description = "Measure the drift of explanations over a series of checkpoints."
    parser = _Parser("vit-explain drift", description, _DRIFT_EXAMPLES)
    _add_series(parser)
    methods = parser.add_argument_group("methods and classes")
    names = "names, or MODULE:NAME for a method of your own; default: rollout grad_rollout"
    _add_option(methods, "method", names, nargs="+", default=["rollout", "grad_rollout"])
    target = "class to explain; default: the class predicted for each image at the first checkpoint"
    _add_option(methods, "category_index", target, type=_at_least_zero, metavar="INDEX")
    every = "checkpoints between two checks of noise and faithfulness; 0: no checks; default: 20"
    _add_option(methods, "check_every", every, type=_at_least_zero, metavar="COUNT", default=20)
    running = parser.add_argument_group("running")
    _add_count(running, "batch_size", "images per forward pass; default: all")
    _add_option(running, "device", "PyTorch device; default: cpu", default="cpu")
    folder = "folder for the results; snapshots already in it are not computed again"
    output = _add_output(parser, folder, required=True)
    _add_count(output, "num_shown", "images drawn; default: 6", default=6)
    return parser


def _report() -> _Parser:
    description = "Write a saved run as one HTML page, or several runs of the same images side by side."
    parser = _Parser("vit-explain report", description, _REPORT_EXAMPLES)
    folder = "folder of a run that contains `explanations`"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=folder)
    _add_output(parser, "HTML file; default: report.html in the first RUN")
    return parser


def _add_images(parser: _Parser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files and folders")
    _add_option(images, "image_path", "the same, as an option", type=Path, nargs="+", metavar="IMAGE")


def _add_methods(parser: _Parser, default: str, default_classes: str) -> argparse._ArgumentGroup:
    methods = parser.add_argument_group("methods and classes")
    names = "names such as rollout, grad_rollout or rollout_max_0.9, or MODULE:NAME for a method of your own"
    _add_option(methods, "method", f"{names}; default: {default}", nargs="+")
    classes = f"class indices or names to explain; default: {default_classes}"
    _add_option(methods, "category_index", classes, nargs="+", metavar="CLASS")
    return methods


def _add_model(parser: _Parser) -> argparse._ArgumentGroup:
    model = parser.add_argument_group("model")
    _add_option(model, "model", "timm model; default: deit_tiny_patch16_224", metavar="NAME")
    weights = "timm, Lightning or safetensors file to load instead of weights from the hub; only tensors are read"
    _add_option(model, "checkpoint", weights, type=Path, metavar="FILE")
    _add_option(model, "prefix", "prefix of the model's tensor names, if the checkpoint holds several models")
    _add_option(model, "hf", "image classifier from transformers, instead of a timm model", metavar="NAME_OR_DIR")
    names = "names of all classes, in order; default: those of the model"
    _add_option(model, "class_names", names, nargs="+", metavar="NAME")
    _add_count(model, "image_size", "side length of the model's input, if it can be chosen", metavar="PIXELS")
    running = parser.add_argument_group("running")
    devices = running.add_mutually_exclusive_group()
    devices.add_argument("--device", help="PyTorch device; default: cuda or mps if available, else cpu")
    _add_option(devices, "use_cuda", "use cuda if available, else cpu", action="store_true")
    return running


def _add_series(parser: _Parser) -> None:
    series = parser.add_argument_group("series")
    checkpoints = "timm or Lightning files, or folders of the transformers Trainer; the first is the baseline"
    series.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help=checkpoints)
    kinds = series.add_mutually_exclusive_group(required=True)
    _add_option(kinds, "model", "timm model", metavar="NAME")
    _add_option(kinds, "hf", "image classifier from transformers, instead of a timm model", metavar="NAME_OR_DIR")
    _add_option(series, "prefix", "prefix of the model's tensor names, if the checkpoints hold several models")
    _add_option(series, "images", "folder of images to explain", type=Path, required=True, metavar="FOLDER")
    _add_count(series, "num_images", "images taken from the folder; default: 16", default=16)


def _add_output(parser: _Parser, description: str, **settings: Any) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    _add_option(output, "output", description, type=Path, metavar="PATH", **settings)
    _add_option(output, "open", "show the result in the browser", action="store_true")
    return output


def _at_least(lowest: int, text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"expected a number of at least {lowest}, but got {text[:20]}")
    return int(text)


_at_least_zero = partial(_at_least, 0)


def _add_count(group: argparse._ActionsContainer, name: str, description: str, **settings: Any) -> None:
    _add_option(group, name, description, **{"type": partial(_at_least, 1), "metavar": "COUNT"} | settings)


SUBPARSERS = {"compare": _compare, "drift": _drift, "report": _report}

"""Parse the arguments of `vit-explain` with the standard library alone, so that help and errors appear at once."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vit_explain_callback.cli.terminal import complain, say

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


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments.

    Args:
        words: The arguments of the process, without its name.

    Returns:
        The options; `command` is `images`, `compare`, `drift` or `report`, and `sources` are the images to explain.

    Raises:
        FileNotFoundError: If the only image does not exist.
        SystemExit: After printing the help, the version or an error about an option.
        ValueError: If options contradict each other.
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
        # An option that takes several words also takes the images that follow it.
        swallowed = [word for name in ("method", "category_index", "class_names") for word in getattr(args, name) or []]
        file = next((word for word in swallowed if os.path.exists(word)), None)
        hint = "" if file is None else f": the option before {file} took it; images go first, or after --image_path"
        raise ValueError(f"Expected at least one image or folder{hint}. See vit-explain --help.")
    if len(sources) == 1 and not os.path.exists(sources[0]):
        raise FileNotFoundError(f"There is no file or folder {sources[0]}.")
    return sources


def _check_together(args: argparse.Namespace) -> None:
    if args.command == "compare" and len(args.sources) > 1:
        raise ValueError(f"Expected one image to compare methods on, but got {len(args.sources)}.")
    if args.hf is not None and (args.model or args.checkpoint or args.image_size):
        raise ValueError("Expected --hf without --model, --checkpoint and --image_size, as it decides all three.")
    if args.prefix is not None and args.checkpoint is None:
        raise ValueError("Expected --prefix together with --checkpoint: it selects a model in that file.")


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog, None, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        complain(f"{message}. See {self.prog} --help.")
        self.exit(2)


class _PrintVersion(argparse.Action):
    """Print the installed version; `argparse` itself would look it up for every call."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            version = importlib.metadata.version(_PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            version = f"of unknown version, as {_PACKAGE} is not installed"
        say(f"vit-explain {version}")
        parser.exit()


def _add_option(parser: argparse._ActionsContainer, name: str, **settings: Any) -> None:
    """Add `--some_name` with the alias `--some-name`."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **settings)


def _images() -> _Parser:
    parser = _Parser("vit-explain", "Draw where a Vision Transformer looks in photographs.", _EXAMPLES)
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    _add_images(parser)
    methods = _add_methods(parser, "rollout, or grad_rollout with --category_index", "the predicted class")
    _add_option(
        methods,
        "head_fusion",
        choices=HEAD_FUSIONS,
        metavar="FUSION",
        help=f"fusion of heads: {', '.join(HEAD_FUSIONS)}; default without --method: max, or mean with --category_index",
    )
    _add_option(
        methods,
        "discard_ratio",
        type=float,
        metavar="RATIO",
        help=f"share of the smallest entries set to 0, in [0, 1); default without --method: {DISCARD_RATIO}",
    )
    running = _add_model(parser)
    _add_option(
        running,
        "batch_size",
        type=_at_least_one,
        metavar="COUNT",
        default=8,
        help="images per forward pass; default: 8",
    )
    _add_output(parser, "folder for the results; default: explanations", default=Path("explanations"))
    return parser


def _compare() -> _Parser:
    parser = _Parser("vit-explain compare", "Compare methods and classes on one photograph.", _COMPARE_EXAMPLES)
    _add_images(parser)
    methods = _add_methods(parser, "grad_rollout rollout", "the two most probable classes")
    _add_option(
        methods,
        "head_fusion",
        nargs="+",
        choices=HEAD_FUSIONS,
        metavar="FUSION",
        help="fusions of heads; default: mean max min",
    )
    _add_option(
        methods,
        "discard_ratio",
        nargs="+",
        type=float,
        metavar="RATIO",
        help=f"shares of the smallest entries set to 0, in [0, 1); default: 0 {DISCARD_RATIO}",
    )
    _add_model(parser)
    _add_output(parser, "folder for the results; default: explanations", default=Path("explanations"))
    return parser


def _add_images(parser: _Parser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files and folders")
    _add_option(images, "image_path", type=Path, nargs="+", metavar="IMAGE", help="the same, as an option")


def _add_methods(parser: _Parser, default: str, classes: str) -> argparse._ArgumentGroup:
    methods = parser.add_argument_group("methods and classes")
    _add_option(
        methods,
        "method",
        nargs="+",
        help="names such as rollout, grad_rollout or rollout_max_0.9, or MODULE:NAME for a method of your own; "
        f"default: {default}",
    )
    _add_option(
        methods,
        "category_index",
        nargs="+",
        metavar="CLASS",
        help=f"class indices or names to explain; default: {classes}",
    )
    return methods


def _add_model(parser: _Parser) -> argparse._ArgumentGroup:
    model = parser.add_argument_group("model")
    _add_option(model, "model", metavar="NAME", help="timm model; default: deit_tiny_patch16_224")
    _add_option(
        model,
        "checkpoint",
        type=Path,
        metavar="FILE",
        help="timm, Lightning or safetensors file to load instead of weights from the hub; only tensors are read",
    )
    _add_option(model, "prefix", help="prefix of the model's tensor names, if the checkpoint holds several models")
    _add_option(model, "hf", metavar="NAME_OR_DIR", help="image classifier from transformers, instead of a timm model")
    _add_option(
        model,
        "class_names",
        nargs="+",
        metavar="NAME",
        help="names of all classes, in order; default: those of the model",
    )
    _add_option(
        model,
        "image_size",
        type=_at_least_one,
        metavar="PIXELS",
        help="side length of the model's input, if the model lets you choose it",
    )
    running = parser.add_argument_group("running")
    devices = running.add_mutually_exclusive_group()
    devices.add_argument("--device", help="PyTorch device; default: cuda or mps if available, else cpu")
    devices.add_argument("--use_cuda", "--use-cuda", action="store_true", help="use cuda if available, else cpu")
    return running


def _add_output(parser: _Parser, description: str, **settings: Any) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    _add_option(output, "output", type=Path, metavar="PATH", help=description, **settings)
    _add_option(output, "open", action="store_true", help="show the result in the browser")
    return output


def _drift() -> _Parser:
    parser = _Parser(
        "vit-explain drift", "Measure the drift of explanations over a series of checkpoints.", _DRIFT_EXAMPLES
    )
    series = parser.add_argument_group("series")
    series.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="timm or Lightning files, or folders of the transformers Trainer; the first is the baseline",
    )
    kinds = series.add_mutually_exclusive_group(required=True)
    _add_option(kinds, "model", metavar="NAME", help="timm model")
    _add_option(kinds, "hf", metavar="NAME_OR_DIR", help="image classifier from transformers, instead of a timm model")
    _add_option(series, "prefix", help="prefix of the model's tensor names, if the checkpoints hold several models")
    _add_option(series, "images", type=Path, required=True, metavar="FOLDER", help="folder of images to explain")
    _add_option(
        series,
        "num_images",
        type=_at_least_one,
        metavar="COUNT",
        default=16,
        help="images taken from the folder; default: 16",
    )
    methods = parser.add_argument_group("methods and classes")
    _add_option(
        methods,
        "method",
        nargs="+",
        default=["rollout", "grad_rollout"],
        help="names, or MODULE:NAME for a method of your own; default: rollout grad_rollout",
    )
    _add_option(
        methods,
        "category_index",
        type=_at_least_zero,
        metavar="INDEX",
        help="class to explain; default: the class predicted at the first checkpoint, for each image",
    )
    _add_option(
        methods,
        "check_every",
        type=_at_least_zero,
        metavar="COUNT",
        default=20,
        help="checkpoints between two checks of noise and faithfulness; 0: no checks; default: 20",
    )
    running = parser.add_argument_group("running")
    _add_option(
        running, "batch_size", type=_at_least_one, metavar="COUNT", help="images per forward pass; default: all"
    )
    _add_option(running, "device", default="cpu", help="PyTorch device; default: cpu")
    output = _add_output(
        parser, "folder for the results; snapshots already in it are not computed again", required=True
    )
    _add_option(output, "num_shown", type=_at_least_one, metavar="COUNT", default=6, help="images drawn; default: 6")
    return parser


def _report() -> _Parser:
    description = "Write a saved run as one HTML page, or several runs of the same images side by side."
    parser = _Parser("vit-explain report", description, _REPORT_EXAMPLES)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run that contains `explanations`"
    )
    _add_output(parser, "HTML file; default: report.html in the first RUN")
    return parser


def _at_least(lowest: int, text: str) -> int:
    if not text.isdecimal() or len(text) > 18 or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"expected a number of at least {lowest}, but got {text[:20]}")
    return int(text)


_at_least_zero, _at_least_one = partial(_at_least, 0), partial(_at_least, 1)

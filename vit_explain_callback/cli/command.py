"""The command `vit-explain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch

from vit_explain_callback._files import write_text
from vit_explain_callback.cli.classifier import Classifier
from vit_explain_callback.cli.compare import compare
from vit_explain_callback.cli.drift import explain_series, read_images
from vit_explain_callback.cli.images import INDEX, explain_gallery
from vit_explain_callback.methods.base import Method
from vit_explain_callback.methods.fusion import HEAD_FUSIONS, HeadFusion
from vit_explain_callback.methods.grad_rollout import GradRollout
from vit_explain_callback.methods.names import method_from_name, resolve_methods
from vit_explain_callback.methods.rollout import Rollout
from vit_explain_callback.tracking.html import page

_DISCARD_RATIO = 0.9  # vit-explain's own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 if something the user gave cannot be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"compare": _compare_parser, "drift": _drift_parser, "report": _report_parser}
    parser = commands[words.pop(0)]() if words and words[0] in commands else _images_parser()
    args = parser.parse_args(words)
    try:
        return int(args.run(args) or 0)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"vit-explain: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _images(args: argparse.Namespace) -> int:
    sources = _sources(args)
    classifier = _classifier(args)
    methods = _chosen_methods(args.method, args.head_fusion, args.discard_ratio, bool(args.category_index))
    classes = _classes(classifier, args.category_index)
    failed = explain_gallery(classifier, methods, sources, args.output, classes, args.batch_size)
    print(args.output / INDEX)
    return 2 if failed else 0


def _compare(args: argparse.Namespace) -> None:
    sources = _sources(args)
    if len(sources) > 1:
        raise ValueError(f"Expected one image to compare methods on, but got {len(sources)}.")
    classifier = _classifier(args)
    fusions, ratios = args.head_fusion or list(HEAD_FUSIONS), args.discard_ratio or [0.0, _DISCARD_RATIO]
    methods = [
        method
        for name in args.method or ["grad_rollout", "rollout"]
        for fusion in fusions
        for ratio in ratios
        for method in _chosen_methods([name], fusion, ratio, False)
    ]
    distinct = list({method.name: method for method in methods}.values())
    for file in compare(classifier, distinct, sources[0], args.output, _classes(classifier, args.category_index)):
        print(file)


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
    _write_page([args.output], args.output / "report.html")


def _report(args: argparse.Namespace) -> None:
    _write_page(args.runs, args.output or args.runs[0] / "report.html")


def _write_page(runs: Sequence[Path], file: Path) -> None:
    write_text(file, page(runs))
    print(file)


def _sources(args: argparse.Namespace) -> list[Path]:
    sources = [*args.images, *(args.image_path or [])]
    if not sources:
        # An option that takes several words takes the images after it as well.
        swallowed = [word for name in ("method", "category_index", "class_names") for word in getattr(args, name) or []]
        file = next((word for word in swallowed if Path(word).exists()), None)
        hint = "" if file is None else f": {file} went to the option before it; images go first, or after --image_path"
        raise ValueError(f"Expected at least one image or folder{hint}. See vit-explain --help.")
    for source in sources:
        if not source.exists() and len(sources) == 1:
            raise FileNotFoundError(f"There is no file or folder {source}.")
    return sources


def _classifier(args: argparse.Namespace) -> Classifier:
    if args.hf is None:
        name = args.model or "deit_tiny_patch16_224"
        classifier = Classifier.from_timm(name, args.checkpoint, args.image_size, args.class_names)
    elif args.model or args.checkpoint or args.image_size:
        raise ValueError("Expected --hf to stand without --model, --checkpoint and --image_size: it says all of them.")
    else:
        classifier = Classifier.from_hugging_face(args.hf, args.class_names)
    device = _device(args.device, args.use_cuda)
    try:
        classifier.model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"Expected `device` to be one that is there, but got {device}: {error}") from error
    return classifier


def _device(asked: str | None, use_cuda: bool) -> str:
    if asked is not None:
        return asked
    if torch.cuda.is_available():
        return "cuda"
    if use_cuda:
        print("vit-explain: there is no CUDA device; using the CPU", file=sys.stderr)
        return "cpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _classes(classifier: Classifier, asked: Sequence[str] | None) -> list[int]:
    return list(dict.fromkeys(classifier.class_index(text) for text in asked or []))


def _chosen_methods(
    names: Sequence[str] | None, fusion: HeadFusion | None, ratio: float | None, of_class: bool
) -> tuple[Method, ...]:
    """The methods asked for; without names vit-explain's own choice, for names without options the options given."""
    if not names:
        discard = _DISCARD_RATIO if ratio is None else ratio
        return (GradRollout(fusion or "mean", discard) if of_class else Rollout(fusion or "max", discard),)
    given: dict[str, Any] = {"head_fusion": fusion, "discard_ratio": ratio}
    options = {name: value for name, value in given.items() if value is not None}
    methods = [method_from_name(name) for name in names]
    return resolve_methods([replace(m, **options) if m.name == m.kind else m for m in methods])


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; takes every option in both spellings."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vit-explain: {message}. See {self.prog} --help.\n")

    def option(self, name: str, **how: Any) -> None:
        """Add `--some_name`, which is `--some-name` too."""
        self.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **how)


def _images_parser() -> _Parser:
    parser = _Parser(
        prog="vit-explain",
        description="Draw where Vision Transformers look in photographs.",
        epilog="Other commands: vit-explain compare | drift | report; each has its own --help.",
    )
    _add_image_options(parser)
    fusions = ", ".join(HEAD_FUSIONS)
    parser.option(
        "head_fusion", choices=HEAD_FUSIONS, metavar="FUSION", help=f"{fusions}; default: max, with a class mean"
    )
    parser.option("discard_ratio", type=float, help="share of the lowest attention dropped; default: 0.9")
    parser.option("batch_size", type=_count, default=8, help="images in one pass; default: 8")
    parser.set_defaults(run=_images)
    return parser


def _compare_parser() -> _Parser:
    parser = _Parser(prog="vit-explain compare", description="Compare methods and classes on one photograph.")
    _add_image_options(parser)
    parser.option("head_fusion", nargs="+", choices=HEAD_FUSIONS, metavar="FUSION", help="default: mean max min")
    parser.option("discard_ratio", nargs="+", type=float, help="default: 0 0.9")
    parser.set_defaults(run=_compare)
    return parser


def _add_image_options(parser: _Parser) -> None:
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files and folders")
    parser.option("image_path", type=Path, nargs="+", metavar="IMAGE", help="the same")
    parser.option(
        "method",
        nargs="+",
        help="such as rollout, grad_rollout, rollout_max_0.9; default: rollout, with a class grad_rollout",
    )
    parser.option("category_index", nargs="+", metavar="CLASS", help="indices or names; default: the predicted class")
    parser.option(
        "class_names", nargs="+", metavar="NAME", help="of the classes, in order, for a checkpoint of your own"
    )
    parser.option("model", help="name of a timm model; default: deit_tiny_patch16_224")
    parser.option("checkpoint", type=Path, help="file of timm, Lightning or safetensors, instead of the hub")
    parser.option("hf", metavar="NAME_OR_DIR", help="image classifier of transformers, instead of timm")
    parser.option("image_size", type=_count, help="side of the model's images in pixels, where it can be chosen")
    parser.option("output", type=Path, default=Path("explanations"), help="folder; default: explanations")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--device", help="default: cuda or mps if there, else cpu")
    devices.add_argument("--use_cuda", "--use-cuda", action="store_true", help="cuda if there, else cpu")


def _drift_parser() -> _Parser:
    parser = _Parser(prog="vit-explain drift", description="Measure the drift of a series of checkpoints.")
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="timm or Lightning; first = baseline"
    )
    parser.option("images", type=Path, required=True, help="folder of images to explain")
    parser.option("model", required=True, help="name of the timm model")
    parser.option("output", type=Path, required=True, help="folder; what it holds already is not computed again")
    parser.option("method", nargs="+", default=["rollout", "grad_rollout"])
    parser.option("category_index", type=int, help="class that the gradients are of")
    parser.option("num_images", type=int, default=16, help="images taken from the folder")
    parser.option("num_shown", type=int, default=6, help="images drawn")
    parser.option("check_every", type=int, default=5, help="checkpoints between checks of faithfulness; 0: none")
    parser.option("batch_size", type=int)
    parser.option("device", default="cpu")
    parser.set_defaults(run=_drift)
    return parser


def _report_parser() -> _Parser:
    parser = _Parser(
        prog="vit-explain report",
        description="Show a run, from the raw maps it saved; several runs of the same probe images side by side.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run that holds `explanations`")
    parser.option("output", type=Path, help="HTML file; default: report.html in the first RUN")
    parser.set_defaults(run=_report)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, but got {text}")
    return int(text)

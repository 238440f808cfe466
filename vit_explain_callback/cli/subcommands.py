"""Run the subcommand that the parsed options name, and print its results."""

from __future__ import annotations

import argparse
import itertools
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vit_explain_callback.cli.classifier import Classifier
from vit_explain_callback.cli.compare import compare
from vit_explain_callback.cli.drift import Architecture, explain_series, read_images
from vit_explain_callback.cli.images import explain_gallery
from vit_explain_callback.cli.results import INDEX
from vit_explain_callback.cli.subparsers import DISCARD_RATIO, HEAD_FUSIONS
from vit_explain_callback.cli.terminal import print_error, print_output, table
from vit_explain_callback.cli.user_methods import parse_methods
from vit_explain_callback.methods.attention_rollout import AttentionRollout
from vit_explain_callback.methods.gradient_rollout import GradientRollout
from vit_explain_callback.methods.heads import HeadFusion
from vit_explain_callback.methods.map_function import AnyMethod, of_attention
from vit_explain_callback.methods.names import resolve_methods
from vit_explain_callback.page.document import render_page
from vit_explain_callback.system.files import write_text

_FAILED = 2
_MAX_ROWS = 20  # of the table
_PAGE_TITLE = b"<title>Explanation drift"
_PAGE_HEAD = 10_000  # bytes searched for the title


def run(args: argparse.Namespace) -> int:
    """Run the subcommand that `args.command` names, and return its exit status.

    Raises:
        ImportError: If an optional package is needed but not installed.
        OSError: If a file cannot be read or written.
        RuntimeError: If the model or the device fails.
        TypeError: If the model returns no logits.
        ValueError: If an option cannot be used.
    """
    subcommands = {"images": _images, "compare": _compare, "drift": _drift, "report": _report}
    return subcommands[args.command](args)


def _images(args: argparse.Namespace) -> int:
    methods = _chosen_methods(args.method, args.head_fusion, args.discard_ratio, bool(args.category_index))
    classifier = _classifier(args, methods)
    classes = _classes(classifier, args.category_index)
    index = explain_gallery(classifier, methods, args.sources, args.output, classes, args.batch_size)
    images = index["images"]
    for line in _summary(images, args.output):
        print_output(line)
    print_output(str(args.output / INDEX))
    if args.open and images:
        _open(args.output / _first_picture(images[0]) if len(images) == 1 else args.output)
    return _FAILED if index["failed"] else 0


def _summary(images: Sequence[dict[str, Any]], output: Path) -> list[str]:
    """Format a table with a line for each of the first 20 images."""
    rows = [["image", "prediction", "p", "file"]]
    for image in images[:_MAX_ROWS]:
        predicted = image.get("prediction")
        name, probability = (predicted["name"], f"{predicted['probability']:.2f}") if predicted else ("-", "-")
        rows.append([Path(image["file"]).name, name, probability, str(output / _first_picture(image))])
    left = len(images) - _MAX_ROWS
    return [*table(rows), *([f"and {left} more"] if left > 0 else [])] if images else []


def _first_picture(image: dict[str, Any]) -> str:
    return str(image["explanations"][0]["overlay"])


def _compare(args: argparse.Namespace) -> int:
    fusions, ratios = args.head_fusion or list(HEAD_FUSIONS), args.discard_ratio or [0.0, DISCARD_RATIO]
    named = parse_methods(args.method or ["grad_rollout", "rollout"])
    methods = [variant for method in named for variant in _variants(method, fusions, ratios)]
    distinct = list({method.name: method for method in methods}.values())
    classifier = _classifier(args, distinct)
    files = compare(classifier, distinct, args.sources[0], args.output, _classes(classifier, args.category_index))
    for file in files:
        print_output(str(file))
    if args.open:
        _open(files[0])
    return 0


def _drift(args: argparse.Namespace) -> int:
    methods = resolve_methods(parse_methods(args.method))
    architecture = Architecture.of_timm(args.model) if args.hf is None else Architecture.of_hugging_face(args.hf)
    images, unreadable = read_images(args.images, architecture.transform, args.num_images)
    for line in unreadable:
        print_error(f"left out {line}")
    explain_series(
        architecture,
        args.checkpoints,
        images,
        methods,
        args.output,
        target=args.category_index,
        num_shown=args.num_shown,
        batch_size=args.batch_size,
        device=args.device,
        check_every=args.check_every or None,
        prefix=args.prefix,
    )
    _write_page([args.output], args.output / "report.html", args.open)
    return 0


def _report(args: argparse.Namespace) -> int:
    _write_page(args.runs, args.output or args.runs[0] / "report.html", args.open)
    return 0


def _write_page(runs: Sequence[Path], file: Path, show: bool) -> None:
    html = render_page(runs)
    if file.is_file() and _PAGE_TITLE not in file.read_bytes()[:_PAGE_HEAD]:
        raise FileExistsError(f"{file} is not a page of a run and is not overwritten; choose another --output.")
    write_text(file, html)
    print_output(str(file))
    if show:
        _open(file)


def _open(path: Path) -> None:
    if not webbrowser.open(path.resolve().as_uri()):
        print_error(f"no browser can be opened to show {path}")


def _classifier(args: argparse.Namespace, methods: Sequence[AnyMethod]) -> Classifier:
    if args.hf is None:
        name = args.model or "deit_tiny_patch16_224"
        any_model = not of_attention(methods)
        classifier = Classifier.from_timm(
            name, args.checkpoint, args.image_size, args.class_names, args.prefix, any_model
        )
    else:
        classifier = Classifier.from_hugging_face(args.hf, args.class_names)
    device = _device(args.device, args.use_cuda)
    try:
        classifier.model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"Expected `device` to be available, but got {device}: {error}") from error
    return classifier


def _device(requested: str | None, use_cuda: bool) -> str:
    if requested is not None:
        return requested
    if torch.cuda.is_available():
        return "cuda"
    if use_cuda:
        print_error("no CUDA device is available; using the CPU")
        return "cpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _classes(classifier: Classifier, requested: Sequence[str] | None) -> list[int]:
    return list(dict.fromkeys(classifier.class_index(text) for text in requested or []))


def _chosen_methods(
    names: Sequence[str] | None, fusion: HeadFusion | None, ratio: float | None, of_class: bool
) -> tuple[AnyMethod, ...]:
    """The methods to run: the default of jacobgil/vit-explain without names, else the named ones.

    The options apply to names that state none.
    """
    if not names:
        discard = DISCARD_RATIO if ratio is None else ratio
        return (GradientRollout(fusion or "mean", discard) if of_class else AttentionRollout(fusion or "max", discard),)
    options: dict[str, Any] = {"head_fusion": fusion, "discard_ratio": ratio}
    stated = {name: value for name, value in options.items() if value is not None}
    methods = parse_methods(names)
    return resolve_methods([_with_options(m, stated) if m.name == m.kind else m for m in methods])


def _with_options(method: AnyMethod, options: Mapping[str, Any]) -> AnyMethod:
    unsupported = sorted(options.keys() - _option_names(method))
    if unsupported:
        raise ValueError(f"Expected no --{unsupported[0]} with --method {method.kind}, which has no such option.")
    return replace(method, **options)


def _variants(method: AnyMethod, fusions: Sequence[str], ratios: Sequence[float]) -> list[AnyMethod]:
    """Combine all values of the options that a method has; a method whose name states options stays as it is."""
    all_values = {"head_fusion": fusions, "discard_ratio": ratios} if method.name == method.kind else {}
    grid = {name: values for name, values in all_values.items() if name in _option_names(method)}
    options: list[dict[str, Any]] = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    return [replace(method, **variant) for variant in options]


def _option_names(method: AnyMethod) -> set[str]:
    return {field.name for field in fields(method)}

"""Parse the arguments of `vit-explain` with the standard library alone, so that help and errors appear at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vit_explain_callback.cli.subparsers import SUBPARSERS, images_parser


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
    command = words[0] if words and words[0] in SUBPARSERS else None
    args = SUBPARSERS[command]().parse_args(words[1:]) if command else images_parser().parse_args(words)
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

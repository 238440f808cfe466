"""Explain any number of photographs, some at a time: overlays, raw maps and one JSON file in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vit_explain_callback.cli.classifier import Classifier
from vit_explain_callback.cli.photograph import Photograph, image_files
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.base import Method
from vit_explain_callback.metrics.maps import is_degenerate
from vit_explain_callback.visualization.captions import DEGENERATE, class_caption
from vit_explain_callback.visualization.overlay import Picture, colour_limit
from vit_explain_callback.visualization.text import colour_bar, with_strip

INDEX = "explanations.json"
_TOP = 5
_NARROWEST = 240  # pixels that the text under a picture needs


def explain_gallery(
    classifier: Classifier,
    methods: Sequence[Method],
    sources: Sequence[Path],
    output: Path,
    classes: Sequence[int] = (),
    batch_size: int = 8,
) -> list[str]:
    """Write overlay and raw map of each image, method and class, and `explanations.json` when all is done.

    The files are `NAME.METHOD.png` and `NAME.METHOD.npy`, for methods that depend on the class
    `NAME.METHOD.classINDEX.png` and so on. NAME is the image's own without its ending, for an image out of a folder
    with the way to it from there; the second of the same name is `NAME-2`.

    Args:
        classifier: Model, transform and names.
        methods: Methods.
        sources: Image files, and folders of them.
        output: Folder of the results; images in it are not explained.
        classes: To explain, for all images; none: the class predicted for each.
        batch_size: Images in one pass, and in memory.

    Returns:
        A line for each image that could not be read.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If the model cannot be explained.
    """
    named = _named_files(sources, output)
    if not named:
        raise FileNotFoundError(f"There is no image in {', '.join(map(str, sources))}.")
    explainer = Explainer(classifier.model, methods)
    output.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    about = {"model": classifier.name, "methods": [method.name for method in explainer.methods]}
    with (
        _index(output / INDEX, about, failed) as index,
        tqdm(total=len(named), unit="image", file=sys.stderr, disable=len(named) < 2) as progress,
    ):
        for names, photographs, images in _batches(classifier, named, batch_size, progress, failed):
            found = explainer.for_targets(images, list(classes) or [None], batch_size)
            found = [explanation.cpu() for explanation in found]
            for place, (name, photograph) in enumerate(zip(names, photographs, strict=True)):
                index(_write(classifier, explainer.methods, name, photograph, found, place, output))
                progress.update()
    return failed


def _named_files(sources: Sequence[Path], output: Path) -> list[tuple[str, Path]]:
    """Each image with the name of its results."""
    named: list[tuple[str, Path]] = []
    taken: set[str] = set()
    own = output.resolve()
    for source in sources:
        if source.is_dir():
            files = [path for path in image_files(source) if own not in path.resolve().parents]
            names = [path.relative_to(source).with_suffix("").as_posix() for path in files]
        else:
            files, names = [source], [source.stem]
        for path, name in zip(files, names, strict=True):
            free, count = name, 1
            while free.casefold() in taken:  # some file systems do not tell A from a
                count += 1
                free = f"{name}-{count}"
            taken.add(free.casefold())
            named.append((free, path))
    return named


def _batches(
    classifier: Classifier, named: Sequence[tuple[str, Path]], size: int, progress: Any, failed: list[str]
) -> Iterator[tuple[list[str], list[Photograph], Tensor]]:
    """Read images of one shape, `size` at a time; what cannot be read is said at once and added to `failed`."""
    waiting: list[tuple[str, Photograph, Tensor]] = []

    def batch() -> tuple[list[str], list[Photograph], Tensor]:
        names, photographs, images = zip(*waiting, strict=True)
        waiting.clear()
        return list(names), list(photographs), torch.stack(images)

    for name, path in named:
        try:
            photograph, image = Photograph.read(path, classifier.view)
        except OSError as error:
            failed.append(str(error))
            progress.write(f"vit-explain: {error}", file=sys.stderr)
            progress.update()
            continue
        if waiting and (len(waiting) == size or waiting[0][2].shape != image.shape):
            yield batch()
        waiting.append((name, photograph, image))
    if waiting:
        yield batch()


def _write(
    classifier: Classifier,
    methods: Sequence[Method],
    name: str,
    photograph: Photograph,
    found: Sequence[Explanation],
    place: int,
    output: Path,
) -> dict[str, Any]:
    """Write the files of one image; its entry in the index."""
    first = found[0]
    probabilities = first.probabilities[place]

    def described(index: int) -> dict[str, Any]:
        return {
            "index": index,
            "name": classifier.class_name(index),
            "probability": round(probabilities[index].item(), 6),
        }

    top = [described(index) for index in probabilities.topk(min(_TOP, len(probabilities))).indices.tolist()]
    targets = [int(explanation.target[place]) for explanation in found]
    files: list[dict[str, Any]] = []
    for method in methods:
        of_class = method.needs_target
        for target, explanation in list(zip(targets, found, strict=True))[: None if of_class else 1]:
            relevance = explanation.maps[method.name][place]
            degenerate = bool(is_degenerate(relevance[None]))
            limit = colour_limit(relevance[None])
            stem = f"{name}.{method.name}" + (f".class{target}" if of_class else "")
            (output / stem).parent.mkdir(parents=True, exist_ok=True)
            shown = target if of_class else top[0]["index"]
            about = "target" if of_class else "predicted"
            line = f"{about} {class_caption(shown, probabilities, classifier.class_names)}"
            lines = [line if classifier.num_classes else photograph.path.name, method.name]
            if degenerate:
                lines.append(f"{DEGENERATE}: nothing to show")
            picture = _captioned(photograph.overlay(relevance, limit), lines, limit, bool((relevance < 0).any()))
            Image.fromarray(picture).save(output / f"{stem}.png")
            np.save(output / f"{stem}.npy", relevance.numpy())
            files.append(
                {
                    "method": method.name,
                    "target": target if of_class else None,
                    "overlay": f"{stem}.png",
                    "map": f"{stem}.npy",
                    "limit": None if degenerate else limit,
                }
            )
    entry: dict[str, Any] = {"file": str(photograph.path), "size": photograph.size, "seen": photograph.seen}
    if classifier.num_classes:
        entry |= {"prediction": top[0], "top5": top, "targets": [described(target) for target in targets]}
    return entry | {"explanations": files}


def _captioned(picture: Picture, lines: Sequence[str], limit: float, signed: bool) -> Picture:
    width = picture.shape[1]
    if width < _NARROWEST:
        picture = np.pad(picture, ((0, 0), (0, _NARROWEST - width), (0, 0)), constant_values=255)
    for line in lines:
        picture = with_strip(picture, line)
    return np.concatenate([picture, colour_bar(limit, picture.shape[1], signed)])


@contextmanager
def _index(path: Path, about: dict[str, Any], failed: Sequence[str]) -> Iterator[Any]:
    """Write a JSON file entry by entry; it appears when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(about, ensure_ascii=False)[:-1] + ', "images": [')
            count = 0

            def add(entry: dict[str, Any]) -> None:
                nonlocal count
                _add(file, entry, count)
                count += 1

            yield add
            file.write(f'\n], "failed": {json.dumps(list(failed), ensure_ascii=False)}}}\n')
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _add(file: IO[str], entry: dict[str, Any], count: int) -> None:
    file.write((",\n" if count else "\n") + json.dumps(entry, ensure_ascii=False))

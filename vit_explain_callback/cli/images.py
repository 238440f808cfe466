"""Explain any number of photographs in batches: overlays, raw maps and one JSON file in a folder."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vit_explain_callback.cli.classifier import Classifier
from vit_explain_callback.cli.photograph import Photograph, image_files
from vit_explain_callback.cli.results import ResultFolder, result_name
from vit_explain_callback.cli.terminal import print_error, print_output
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.map_function import AnyMethod
from vit_explain_callback.metrics.maps import is_degenerate
from vit_explain_callback.system.terminal import printable
from vit_explain_callback.visualization.captions import DEGENERATE, class_caption
from vit_explain_callback.visualization.encode import png
from vit_explain_callback.visualization.overlay import Picture, colour_limit
from vit_explain_callback.visualization.text import colour_bar, with_strip

_TOP = 5
_MIN_WIDTH = 240  # pixels that the text under a picture needs
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def explain_gallery(
    classifier: Classifier,
    methods: Sequence[AnyMethod],
    sources: Sequence[Path],
    output: Path,
    classes: Sequence[int] = (),
    batch_size: int = 8,
) -> dict[str, Any]:
    """Write the overlay and the raw map of each image, method and class, and `explanations.json` at the end.

    The files are `NAME.METHOD.png` and `NAME.METHOD.npy`, or `NAME.METHOD.classINDEX.png` and so on for methods that
    depend on the class. NAME is the file name without its suffix, after the path within its folder for an image from a
    folder; a second image of the same name becomes `NAME-2`. Long names are cut, and unprintable characters become
    `_`. A file that cannot be explained is reported; the others are still explained.

    Args:
        classifier: Model, transform and class names.
        methods: Methods.
        sources: Image files and folders of images.
        output: Folder for the results; images in it are not explained.
        classes: Classes to explain for all images; if empty, the class predicted for each.
        batch_size: Images per forward pass, and in memory.

    Returns:
        The content of `explanations.json`: `model`, `methods`, an entry in `images` for each explained image, and a
        message in `failed` for each other one.

    Raises:
        FileNotFoundError: If there is no image.
        OSError: If the folder cannot be written.
        ValueError: If the model cannot be explained.
    """
    named = _named_files(sources, output)
    if not named:
        raise FileNotFoundError(f"There is no image in {', '.join(map(str, sources))} that is not in {output}.")
    explainer = Explainer(classifier.model, methods)
    folder = ResultFolder(output, [path for _, path in named])
    images: list[dict[str, Any]] = []
    failed: list[str] = []
    index = {
        "model": classifier.name,
        "methods": [method.name for method in explainer.methods],
        "images": images,
        "failed": failed,
    }
    silent = len(named) < 2 or sys.stderr is None
    try:
        with tqdm(total=len(named), unit="image", file=sys.stderr, disable=silent) as progress:
            for entry in _explain_images(classifier, explainer, named, classes, batch_size, folder):
                with progress.external_write_mode():
                    if isinstance(entry, str):
                        failed.append(entry)
                        print_error(entry)
                    else:
                        images.append(entry)
                        if len(images) == 1:
                            _print_path(output / entry["explanations"][0]["overlay"])
                progress.update()
    except BaseException:
        if images:
            folder.write_index(index)  # keeps the results so far
        raise
    folder.write_index(index)
    return index


def _print_path(picture: Path) -> None:
    with suppress(OSError):  # the table repeats it, and raises, once all results are written
        print_output(str(picture))


def _named_files(sources: Sequence[Path], output: Path) -> list[tuple[str, Path]]:
    """List each image after the unique name of its results."""
    named: list[tuple[str, Path]] = []
    used_names: set[str] = set()
    results = Path(os.path.realpath(output))
    for source in sources:
        if os.path.isdir(source):
            files = [path for path in image_files(source) if results not in Path(os.path.realpath(path)).parents]
            names = [result_name(path.relative_to(source).with_suffix("")) for path in files]
        else:
            files, names = [source], [result_name(Path(source.stem))]
        for path, name in zip(files, names, strict=True):
            unique_name, count = name, 1
            while unique_name.casefold() in used_names:  # some file systems ignore case
                count += 1
                unique_name = f"{name}-{count}"
            used_names.add(unique_name.casefold())
            named.append((unique_name, path))
    return named


def _explain_images(
    classifier: Classifier,
    explainer: Explainer,
    named: Sequence[tuple[str, Path]],
    classes: Sequence[int],
    batch_size: int,
    folder: ResultFolder,
) -> Iterator[dict[str, Any] | str]:
    """Yield the entry of each image once its files are written, or a message if it cannot be explained."""
    for batch in _batches(classifier, named, batch_size):
        if isinstance(batch, str):
            yield batch
            continue
        names, photographs, images = batch
        explanations = explainer.for_targets(images, list(classes) or [None], batch_size=batch_size)
        explanations = [explanation.cpu() for explanation in explanations]
        for place, (name, photograph) in enumerate(zip(names, photographs, strict=True)):
            image = _ExplainedImage(classifier, photograph, explanations, place)
            try:
                entry: dict[str, Any] | str = image.write(name, explainer.methods, folder)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                entry = f"{photograph.path}: {error}"
            yield entry


def _batches(
    classifier: Classifier, named: Sequence[tuple[str, Path]], size: int
) -> Iterator[tuple[list[str], list[Photograph], Tensor] | str]:
    """Yield batches of at most `size` images of one shape, and a message for each file that cannot be read."""
    waiting: list[tuple[str, Photograph, Tensor]] = []

    def batch() -> tuple[list[str], list[Photograph], Tensor]:
        names, photographs, images = zip(*waiting, strict=True)
        waiting.clear()
        return list(names), list(photographs), torch.stack(images)

    for name, path in named:
        try:
            photograph, image = Photograph.read(path, classifier.view)
        except OSError as error:
            yield str(error)
            continue
        except ValueError as error:  # a shape that the model's transform does not support
            yield f"{path}: {error}"
            continue
        if waiting and (len(waiting) == size or waiting[0][2].shape != image.shape):
            yield batch()
        waiting.append((name, photograph, image))
    if waiting:
        yield batch()


class _ExplainedImage:
    """One image of a batch, with its explanation for each target class."""

    def __init__(
        self, classifier: Classifier, photograph: Photograph, explanations: Sequence[Explanation], place: int
    ) -> None:
        self._classifier, self._photograph = classifier, photograph
        self._probabilities = explanations[0].probabilities[place]
        self._maps = [
            (int(each.target[place]), {name: maps[place] for name, maps in each.maps.items()}) for each in explanations
        ]

    def write(self, name: str, methods: Sequence[AnyMethod], folder: ResultFolder) -> dict[str, Any]:
        """Write the overlay and the map of each method and class, and return the image's entry in the index.

        Raises:
            OSError: If a file cannot be written.
        """
        files: list[dict[str, Any]] = []
        for method in methods:
            for target, maps in self._maps if method.needs_target else self._maps[:1]:
                of_class = target if method.needs_target else None
                stem = f"{name}.{method.name}" + ("" if of_class is None else f".class{of_class}")
                relevance = maps[method.name]
                degenerate = bool(is_degenerate(relevance[None]))
                limit = colour_limit(relevance[None])
                lines = [self._caption(of_class), method.name]
                if degenerate:
                    lines.append(f"{DEGENERATE}: nothing to show")
                signed = bool((relevance < 0).any())
                picture = _captioned(self._photograph.overlay(relevance, limit), lines, limit, signed)
                folder.write(f"{stem}.png", png(picture))
                folder.write(f"{stem}.npy", _npy(relevance))
                paths = {"overlay": f"{stem}.png", "map": f"{stem}.npy", "limit": None if degenerate else limit}
                files.append({"method": method.name, "target": of_class} | paths)
        return self._entry() | {"explanations": files}

    def _entry(self) -> dict[str, Any]:
        photograph = self._photograph
        entry: dict[str, Any] = {
            "file": str(photograph.path),
            "size": photograph.size,
            "seen": photograph.visible_pixels,
        }
        if self._classifier.num_classes:
            top = self._top_classes()
            targets = [self._class_entry(target) for target, _ in self._maps]
            entry |= {"prediction": top[0] if top else None, "top5": top, "targets": targets}
        return entry

    def _top_classes(self) -> list[dict[str, Any]]:
        """The most probable classes, best first; empty if the logits are not finite."""
        if not self._probabilities.isfinite().all():
            return []
        count = min(_TOP, len(self._probabilities))
        return [self._class_entry(index) for index in self._probabilities.topk(count).indices.tolist()]

    def _class_entry(self, index: int) -> dict[str, Any]:
        probability = round(self._probabilities[index].item(), 6)
        return {"index": index, "name": self._classifier.class_name(index), "probability": probability}

    def _caption(self, target: int | None) -> str:
        if not self._classifier.num_classes:
            return printable(self._photograph.path.name)
        top = self._top_classes()
        if target is None and not top:
            return "no prediction: the logits are not finite"
        shown, role = (top[0]["index"], "predicted") if target is None else (target, "target")
        return f"{role} {class_caption(shown, self._probabilities, self._classifier.class_names)}"


def _captioned(picture: Picture, lines: Sequence[str], limit: float, signed: bool) -> Picture:
    width = picture.shape[1]
    if width < _MIN_WIDTH:
        picture = np.pad(picture, ((0, 0), (0, _MIN_WIDTH - width), (0, 0)), constant_values=255)
    for line in lines:
        picture = with_strip(picture, line)
    return np.concatenate([picture, colour_bar(limit, picture.shape[1], signed)])


def _npy(relevance: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, relevance.numpy())
    return file.getvalue()

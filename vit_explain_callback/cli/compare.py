"""Compare methods on one photograph: a figure, and an animation that sweeps the discard ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vit_explain_callback.cli.classifier import Classifier
from vit_explain_callback.cli.photograph import Photograph
from vit_explain_callback.cli.results import ResultFolder, result_name
from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.methods.base import FusedMethod
from vit_explain_callback.methods.map_function import AnyMethod
from vit_explain_callback.visualization.captions import class_caption, range_caption
from vit_explain_callback.visualization.encode import animation, png, rendered
from vit_explain_callback.visualization.grid import Cell, draw_grid
from vit_explain_callback.visualization.overlay import colour_limit
from vit_explain_callback.visualization.text import colour_bar, with_strip

_SWEEP = [*(step / 10 for step in range(10)), 0.95]


def compare(
    classifier: Classifier, methods: Sequence[AnyMethod], path: Path, output: Path, classes: Sequence[int] = ()
) -> list[Path]:
    """Write `NAME.compare.png` and `NAME.sweep.gif`, from one forward pass and one backward pass per class.

    The figure has a row for each set of options and a column for each kind of method, or for each class of a kind that
    depends on it. The animation sweeps the discard ratio of the first method that has one; without such a method there
    is no animation.

    Args:
        classifier: Model, transform and class names.
        methods: Methods to compare.
        path: The photograph.
        output: Folder for the results.
        classes: Classes to explain; if empty, the two most probable ones, at the cost of another forward pass.

    Returns:
        The paths of the files.

    Raises:
        OSError: If the photograph cannot be read or a result cannot be written.
        ValueError: If the model cannot be explained or has no classifier.
    """
    photograph, image = Photograph.read(path, classifier.view)
    swept = next((method for method in methods if isinstance(method, FusedMethod)), None)
    sweep = [] if swept is None else [replace(swept, discard_ratio=ratio) for ratio in _SWEEP]
    explainer = Explainer(classifier.model, list({method.name: method for method in [*methods, *sweep]}.values()))
    images = image[None]
    if not classes:
        logits = explainer.logits(images)[0]
        classes = logits.topk(min(2, len(logits))).indices.tolist()
    explanations = [explanation.cpu() for explanation in explainer.for_targets(images, list(classes))]
    name = result_name(Path(path.stem))
    folder = ResultFolder(output, [path])
    files = [folder.write(f"{name}.compare.png", _figure(classifier, methods, photograph, explanations))]
    if sweep:
        files.append(folder.write(f"{name}.sweep.gif", _sweep(classifier, sweep, photograph, explanations)))
    folder.write_index({})
    return files


def _figure(
    classifier: Classifier, methods: Sequence[AnyMethod], photograph: Photograph, explanations: Sequence[Explanation]
) -> bytes:
    column_methods = {method.kind: method for method in methods}.values()
    columns = [
        (method, explanation)
        for method in column_methods
        for explanation in _distinct_explanations(method, explanations)
    ]
    variants = list(dict.fromkeys(_options_caption(method) for method in methods))
    by_place = {(_options_caption(method), method.kind): method for method in methods}
    rows: list[list[Cell | None]] = []
    for variant in variants:
        row: list[Cell | None] = []
        for column_method, explanation in columns:
            method = by_place.get((variant, column_method.kind))
            if method is None:
                row.append(None)
                continue
            # The classes of a method are compared along a row, so they share a scale.
            limit = colour_limit(
                torch.cat([each.maps[method.name] for each in _distinct_explanations(method, explanations)])
            )
            relevance = explanation.maps[method.name][0]
            row.append(Cell(photograph.overlay(relevance, limit), range_caption(limit)))
        rows.append(row)
    headings = [
        f"{method.kind}\n{_target_caption(classifier, explanation) if method.needs_target else 'any class'}"
        for method, explanation in columns
    ]
    labels = [variant.replace(", ", "\n") for variant in variants]
    return png(rendered(draw_grid(rows, headings, labels, limit_meaning="the limit under each map")))


def _sweep(
    classifier: Classifier, sweep: Sequence[FusedMethod], photograph: Photograph, explanations: Sequence[Explanation]
) -> bytes:
    shown = _distinct_explanations(sweep[0], explanations)
    # One limit for all ratios, so that colours mean the same in every frame.
    limit = colour_limit(torch.cat([each.maps[method.name] for each in shown for method in sweep]))
    frames = []
    for method in sweep:
        panels = []
        for each in shown:
            what = _target_caption(classifier, each) if method.needs_target else method.kind
            panel = photograph.overlay(each.maps[method.name][0], limit)
            panel = with_strip(with_strip(panel, what), f"{method.kind} · discard {method.discard_ratio:g}")
            panels.append(panel)
        frame = np.concatenate(panels, axis=1)
        frames.append(np.concatenate([frame, colour_bar(limit, frame.shape[1])]))
    return animation(frames)


def _distinct_explanations(method: AnyMethod, explanations: Sequence[Explanation]) -> Sequence[Explanation]:
    """One explanation per class, or the first alone for a method that does not depend on the class."""
    return explanations if method.needs_target else explanations[:1]


def _target_caption(classifier: Classifier, explanation: Explanation) -> str:
    return class_caption(int(explanation.target[0]), explanation.probabilities[0], classifier.class_names)


def _options_caption(method: AnyMethod) -> str:
    if not isinstance(method, FusedMethod):
        return ", ".join(method.name.removeprefix(method.kind).split("_")[1:]) or "default"
    text = f"{method.head_fusion}, discard {method.discard_ratio:g}"
    return text if method.start_block == 1 else f"{text}, from {method.start_block}"

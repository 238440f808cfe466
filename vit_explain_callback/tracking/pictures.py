"""The pictures of a run's history, by TensorBoard tag."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.captions import caption, quantity_caption, title
from vit_explain_callback.visualization.encode import animation
from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.overlay import Picture, colour_limit, difference, overlay
from vit_explain_callback.visualization.text import with_strip

_FILMSTRIP_MAPS = 4


def figures(history: History, probe: Probe) -> Iterator[tuple[str, Picture]]:
    """Tag and picture of each figure of the latest snapshot: filmstrips, overlays and differences."""
    now, baseline = history.now, history.baseline
    columns = history.columns(_FILMSTRIP_MAPS)
    steps = [snapshot.step for snapshot in columns]
    shown = probe.shown
    pictures = [probe.pictures[index] for index in shown]
    captions = [[_caption(probe, snapshot, row, "\n") for row in shown] for snapshot in columns]
    targets = [None if probe.regression else int(now.target[row]) for row in shown]
    titles = [
        title(target, _label(probe, row), probe.class_names, "\n") for target, row in zip(targets, shown, strict=True)
    ]
    masks = [of_images[shown] for of_images in probe.regions.values()]
    for method, maps in now.maps.items():
        limit = colour_limit(baseline.maps[method])
        over_time = [snapshot.maps[method][shown] for snapshot in columns]
        drift = [spearman(maps_then, over_time[0]).tolist() for maps_then in over_time]
        levels = baseline.scale(method, "spearman") or (math.nan, math.nan)
        strip = filmstrip(pictures, titles, steps, over_time, captions, drift, method, limit, *levels, masks)
        yield f"explain_filmstrip/{method}", strip
        for index, picture in zip(shown, pictures, strict=True):
            text = f"step {now.step} · {_caption(probe, now, index)}"
            yield f"explain_overlay/{method}/{index}", with_strip(overlay(picture, maps[index], limit), text)
            if now is not baseline:
                change = difference(picture, maps[index], baseline.maps[method][index], limit)
                yield f"explain_diff/{method}/{index}", with_strip(change, text)


def animations(history: History, probe: Probe) -> Iterator[tuple[str, bytes]]:
    """Tag and GIF file of each shown image: its overlays over the run."""
    for method, maps in history.baseline.maps.items():
        limit = colour_limit(maps)
        for index in probe.shown:
            frames = [
                with_strip(
                    overlay(probe.pictures[index], snapshot.maps[method][index], limit),
                    f"step {snapshot.step} · {_caption(probe, snapshot, index)}",
                )
                for snapshot in history.snapshots
            ]
            yield f"explain_gif/{method}/{index}", animation(frames)


def _caption(probe: Probe, snapshot: Snapshot, row: int, separator: str = " · ") -> str:
    if probe.regression:
        return quantity_caption(snapshot.logits[row, snapshot.target[row]].item())
    probabilities = snapshot.explanation.probabilities[row]
    prediction, target = int(snapshot.prediction[row]), int(snapshot.target[row])
    return caption(prediction, target, _label(probe, row), probabilities, probe.class_names, separator)


def _label(probe: Probe, row: int) -> int | None:
    return None if probe.labels is None else int(probe.labels[row])

"""The pictures of a run's history, by TensorBoard tag.

TensorBoard sorts tags alphabetically: filmstrips first, then the heat map, then the overlays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.probability import class_probabilities
from vit_explain_callback.tracking import tags
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.settings import Level
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.captions import CHANGED_MOST, caption, quantity_caption, title
from vit_explain_callback.visualization.encode import animation
from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.heatmap import block_heatmap
from vit_explain_callback.visualization.overlay import Picture, colour_limit, difference, overlay
from vit_explain_callback.visualization.selection import most_changed
from vit_explain_callback.visualization.text import with_strip

_FILMSTRIP_MAPS = 4
_ADDED = 2


def figures(history: History, probe: Probe, level: Level = "full") -> Iterator[tuple[str, Picture]]:
    """Tag and picture of each figure of the latest snapshot: filmstrips, heat map; at level full also overlays."""
    for method in history.now.maps:
        yield tags.filmstrip(method), _filmstrip(history, probe, method)
    if history.block_drift:
        steps = [one.step for one in history.snapshots if one.step in history.block_drift]
        yield tags.HEAT_MAP, block_heatmap(torch.stack([history.block_drift[step] for step in steps], dim=1), steps)
    if level == "full":
        for method in history.now.maps:
            yield from _overlays(history, probe, method)


def last_filmstrips(history: History, probe: Probe) -> Iterator[tuple[str, Picture]]:
    """Tag and filmstrip of each method with the images that changed most added; none if all images are shown."""
    for method in history.now.maps:
        change = 1 - history.now.drift_from(history.baseline, method, "spearman")
        change[probe.shown] = math.nan
        added = most_changed(change, _ADDED)
        if added:
            yield tags.filmstrip(method), _filmstrip(history, probe, method, added)


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
            yield tags.overlay(method, index, "_animation"), animation(frames)


def _filmstrip(history: History, probe: Probe, method: str, added: Sequence[int] = ()) -> Picture:
    """A filmstrip of the shown images and of added ones."""
    baseline = history.baseline
    columns = history.columns(_FILMSTRIP_MAPS)
    rows = [*probe.shown, *added]
    over_time = [snapshot.maps[method][rows] for snapshot in columns]
    return filmstrip(
        [probe.pictures[row] for row in rows],
        [_title(history, probe, row, row in added) for row in rows],
        [snapshot.step for snapshot in columns],
        over_time,
        [[_caption(probe, snapshot, row, "\n") for row in rows] for snapshot in columns],
        [spearman(maps, over_time[0]).tolist() for maps in over_time],
        method,
        colour_limit(baseline.maps[method]),
        *(baseline.scale(method, "spearman") or (math.nan, math.nan)),
        [masks[rows] for masks in probe.regions.values()],
    )


def _overlays(history: History, probe: Probe, method: str) -> Iterator[tuple[str, Picture]]:
    """The map of each shown image, and what changed in it since the baseline."""
    now, baseline = history.now, history.baseline
    limit = colour_limit(baseline.maps[method])
    for index in probe.shown:
        picture, maps = probe.pictures[index], now.maps[method][index]
        text = f"step {now.step} · {_caption(probe, now, index)}"
        yield tags.overlay(method, index), with_strip(overlay(picture, maps, limit), text)
        if now is not baseline:
            change = difference(picture, maps, baseline.maps[method][index], limit)
            yield tags.overlay(method, index, "_change"), with_strip(change, text)


def _title(history: History, probe: Probe, row: int, added: bool) -> str:
    target = None if probe.regression else int(history.now.target[row])
    words = title(target, _label(probe, row), probe.class_names, "\n")
    if not added or "\n" in words:  # there is room for two lines
        return words
    return f"{words}\n{CHANGED_MOST}" if words else CHANGED_MOST


def _caption(probe: Probe, snapshot: Snapshot, row: int, separator: str = " · ") -> str:
    if probe.regression:
        return quantity_caption(snapshot.logits[row, snapshot.target[row]].item())
    probabilities = class_probabilities(snapshot.logits[row], probe.multilabel)
    prediction, target = int(snapshot.prediction[row]), int(snapshot.target[row])
    return caption(prediction, target, _label(probe, row), probabilities, probe.class_names, separator)


def _label(probe: Probe, row: int) -> int | None:
    return None if probe.labels is None else int(probe.labels[row])

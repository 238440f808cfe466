"""The pictures of a run's history, by TensorBoard tag."""

from __future__ import annotations

from collections.abc import Iterator

from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.encode import animation
from vit_explain_callback.visualization.filmstrip import filmstrip
from vit_explain_callback.visualization.overlay import Picture, colour_limit, difference, overlay, with_strip

_FILMSTRIP_MAPS = 9


def figures(history: History, probe: Probe) -> Iterator[tuple[str, Picture]]:
    """Tag and picture of each figure of the latest snapshot: filmstrips, overlays and differences."""
    now, baseline = history.now, history.baseline
    columns = history.columns(_FILMSTRIP_MAPS)
    steps = [snapshot.step for snapshot in columns]
    shown = range(probe.num_shown)
    pictures = [probe.pictures[index] for index in shown]
    captions = [[_caption(probe, snapshot, row) for row in shown] for snapshot in columns]
    titles = [f"target {_class_name(probe, target)}" for target in now.target[: len(shown)].tolist()]
    for method, maps in now.maps.items():
        limit = colour_limit(baseline.maps[method])
        over_time = [snapshot.maps[method][: len(shown)] for snapshot in columns]
        drift = [spearman(maps_then, over_time[0]).tolist() for maps_then in over_time]
        yield f"explain_filmstrip/{method}", filmstrip(pictures, titles, steps, over_time, captions, drift, limit)
        for index, picture in enumerate(pictures):
            text = f"step {now.step} · {_caption(probe, now, index)}"
            yield f"explain_overlay/{method}/{index}", with_strip(overlay(picture, maps[index], limit), text)
            if now is not baseline:
                change = difference(picture, maps[index], baseline.maps[method][index], limit)
                yield f"explain_diff/{method}/{index}", with_strip(change, text)


def animations(history: History, probe: Probe) -> Iterator[tuple[str, bytes]]:
    """Tag and GIF file of each shown image: its overlays over the run."""
    for method, maps in history.baseline.maps.items():
        limit = colour_limit(maps)
        for index in range(probe.num_shown):
            frames = [
                with_strip(
                    overlay(probe.pictures[index], snapshot.maps[method][index], limit),
                    f"step {snapshot.step} · {_caption(probe, snapshot, index)}",
                )
                for snapshot in history.snapshots
            ]
            yield f"explain_gif/{method}/{index}", animation(frames)


def _caption(probe: Probe, snapshot: Snapshot, row: int) -> str:
    prediction = _class_name(probe, int(snapshot.prediction[row]))
    return f"{prediction} · p={snapshot.target_probability[row].item():.2f}"


def _class_name(probe: Probe, index: int) -> str:
    names = probe.class_names
    return str(names[index]) if names is not None and index < len(names) else f"class {index}"

"""Store runs for a page, as JSON: maps in 8 bits, pictures as JPEG, curves and scalars as numbers."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.localisation import lift
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.metrics.probability import class_probabilities
from vit_explain_callback.page.charts import block_values, charts, curve, number
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import Run
from vit_explain_callback.visualization.captions import class_name
from vit_explain_callback.visualization.overlay import FLOOR, NEGATIVE, POSITIVE, colour_limit, times_uniform

_QUALITY = 90


@dataclass(frozen=True)
class Shown:
    """What a page shows of a run.

    Attributes:
        name: Name of the run.
        run: The run with the snapshots that are shown.
        num_snapshots: Number of its snapshots, shown or not.
        summary: Summary of all snapshots.
    """

    name: str
    run: Run
    num_snapshots: int
    summary: str


def page_data(runs: Sequence[Shown]) -> dict[str, Any]:
    """The data that the page's script reads; its JSDoc describes each entry."""
    probe = runs[0].run.probe
    first, *others = ({*shown.run.snapshots[0].maps} for shown in runs)
    methods = [method for method in runs[0].run.snapshots[0].maps if method in first.intersection(*others)]
    height, width = probe.pictures[0].shape[:2]
    return {
        "written": time.time(),
        "images": len(probe),
        "size": [height, width],
        "pictures": [_encoded(Image.fromarray(picture), "JPEG") for picture in probe.pictures],
        "labels": None if probe.labels is None else [None if label < 0 else label for label in probe.labels.tolist()],
        "classes": _classes(runs),
        "regions": {name: [_mask(mask, (height, width)) for mask in masks] for name, masks in probe.regions.items()},
        "colours": _text(colour_table()),
        "floor": FLOOR,
        "runs": [_run(shown, methods) for shown in runs],
    }


def _classes(runs: Sequence[Shown]) -> dict[int, str]:
    """Names of the classes that occur."""
    probe = runs[0].run.probe
    indices = [] if probe.labels is None else [probe.labels[probe.labels >= 0]]
    indices += [one for shown in runs for one in (shown.run.targets, shown.run.logits.argmax(dim=2).flatten())]
    used = sorted(set(torch.cat(indices).tolist()))
    return {index: class_name(index, probe.class_names) for index in used}


def _run(shown: Shown, methods: Sequence[str]) -> dict[str, Any]:
    run, logits, targets = shown.run, shown.run.logits, shown.run.targets
    probability = class_probabilities(logits, run.probe.multilabel)
    rows = [{tag: value for tag, value in row.items() if tag != "step"} for row in run.scalars]
    return {
        "name": shown.name,
        "taken": shown.num_snapshots,
        "steps": run.steps,
        "output": _numbers(logits[:, torch.arange(len(targets)), targets]) if run.probe.regression else None,
        "prediction": logits.argmax(dim=2).tolist(),
        "confidence": _numbers(probability.amax(dim=2)),
        "target": targets.tolist(),
        "target_probability": _numbers(probability[:, torch.arange(len(targets)), targets]),
        "methods": {method: _method(maps, run.probe) for method, maps in run.maps.items() if method in methods},
        "charts": charts(rows, methods, list(run.probe.regions), [metric.name for metric in run.metrics]),
        "blocks": block_values(rows),
        "scalars": {tag: curve(rows, tag) for tag in sorted(set().union(*rows))},
    }


def _method(maps: Tensor, probe: Probe) -> dict[str, Any]:
    """Data of maps (T, B, grid_h, grid_w), pooled: pixel maps would make the page too large for a browser."""
    maps = torch.stack([pooled(each) for each in maps])
    return {
        "grid": list(maps.shape[2:]),
        "limit": colour_limit(maps[0]),
        "signed": bool((maps < 0).any()),
        "maps": [_text(quantised(times_uniform(each))) for each in maps],
        "drift": [_numbers(spearman(each, maps[0])) for each in maps],
        "lift": {region: [_numbers(lift(each, masks)) for each in maps] for region, masks in probe.regions.items()},
    }


def _mask(mask: Tensor, size: tuple[int, int]) -> str:
    picture = Image.fromarray(mask.cpu().bool().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    return _encoded(picture, "PNG")


def _encoded(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    # Colours at full resolution: the edges of drawings stay sharp.
    picture.save(file, kind, **({"quality": _QUALITY, "subsampling": 0} if kind == "JPEG" else {}))
    return _text(file.getvalue())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _numbers(values: Tensor) -> Any:
    """Nested lists of numbers with three digits, None if not finite."""
    return [_numbers(each) for each in values] if values.ndim > 1 else [number(value, 3) for value in values.tolist()]


def colour_table() -> bytes:
    """The colours of −1, −254/255, …, 1 as RGBA bytes; A is the opacity. The value v has the index round(255 (v + 1)).

    Example:
        >>> len(colour_table()) // 4, list(colour_table()[255 * 4 :][:4])
        (511, [224, 112, 255, 0])
    """
    table = np.concatenate([NEGATIVE[:0:-1], POSITIVE])
    return (table * 255).round().astype(np.uint8).tobytes()


def quantised(maps: Tensor) -> bytes:
    """Maps (B, grid_h, grid_w) as one record of 8 + P bytes each.

    A record is the map's lowest and highest value as little-endian float32, then one byte q per patch, row by row: the
    value is low + (high − low) · q / 255, with an error of at most 1/510 of the range and the rounding of float32. If a
    value is not finite, low and high are NaN.

    Example:
        >>> import torch
        >>> list(quantised(torch.tensor([[[0.0, 0.5, 2.0]]])))
        [0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 255]
    """
    flat = maps.detach().cpu().double().flatten(1).numpy()
    useful = np.isfinite(flat).all(axis=1)
    flat = np.where(useful[:, None], flat, 0.0)
    ends = np.stack([flat.min(axis=1), flat.max(axis=1)], axis=1).astype("<f4")
    low, high = ends.astype(np.float64).T
    spread = np.where(high > low, high - low, 1.0)
    levels = np.clip(np.rint((flat - low[:, None]) / spread[:, None] * 255), 0, 255).astype(np.uint8)
    ends[~useful] = np.nan
    return np.concatenate([ends.view(np.uint8), levels], axis=1).tobytes()

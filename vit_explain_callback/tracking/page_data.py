"""What a page stores of its runs, as JSON: maps in 8 bits, pictures as JPEG, curves and scalars as numbers."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.tracking.charts import block_values, charts, curve, number
from vit_explain_callback.tracking.report import Report
from vit_explain_callback.visualization.overlay import DIFFERENCE_COLOURS, MAP_COLOURS, Picture, colour_limit
from vit_explain_callback.visualization.quantise import colour_table, quantised, times_uniform

_QUALITY = 90


@dataclass(frozen=True)
class Recorded:
    """What a page shows of a run. T snapshots are shown.

    Attributes:
        name: Of the run.
        taken: Snapshots in the folder, of which at most `most_snapshots` are shown.
        steps: T.
        maps: Raw maps by method name, (T, B, grid_h, grid_w).
        logits: (T, B, C).
        target: (B,) classes that the gradients are of, in the last snapshot.
        report: Pictures, labels, regions and class names.
        scalars: Of each snapshot, by tag.
        summary: The run in words.
    """

    name: str
    taken: int
    steps: list[int]
    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor
    report: Report
    scalars: list[dict[str, float]]
    summary: str


def page_data(runs: Sequence[Recorded]) -> dict[str, Any]:
    """What the page's script reads; its JSDoc says what each entry is."""
    report = runs[0].report
    names = report.class_names or ()
    used = {index for run in runs for index in [*run.target.tolist(), *run.logits.argmax(dim=2).flatten().tolist()]}
    used |= set() if report.labels is None else set(report.labels.tolist())
    methods = [method for method in runs[0].maps if all(method in run.maps for run in runs)]
    height, width = report.pictures[0].shape[:2] if report.pictures else (224, 224)
    return {
        "written": time.time(),
        "images": len(runs[0].target),
        "size": [height, width],
        "pictures": [_encoded(picture, "JPEG") for picture in report.pictures],
        "labels": None if report.labels is None else report.labels.tolist(),
        "classes": {index: str(names[index]) if index < len(names) else f"class {index}" for index in sorted(used)},
        "regions": {name: [_mask(mask, (height, width)) for mask in masks] for name, masks in report.regions.items()},
        "colours": {
            "sequential": _text(colour_table(MAP_COLOURS)),
            "diverging": _text(colour_table(DIFFERENCE_COLOURS)),
        },
        "saturation": 0.0,
        "runs": [_run(run, methods) for run in runs],
    }


def _run(run: Recorded, methods: Sequence[str]) -> dict[str, Any]:
    regression = run.logits.shape[2] == 1
    probability = run.logits.double().softmax(dim=2)
    tags = sorted({tag for row in run.scalars for tag in row})
    return {
        "name": run.name,
        "taken": run.taken,
        "steps": run.steps,
        "output": _numbers(run.logits[:, :, 0]) if regression else None,
        "prediction": run.logits.argmax(dim=2).tolist(),
        "confidence": _numbers(probability.amax(dim=2)),
        "target": run.target.tolist(),
        "target_probability": _numbers(probability[:, torch.arange(len(run.target)), run.target]),
        "methods": {method: _method(run, method) for method in methods},
        "charts": charts(run.scalars, methods, list(run.report.regions)),
        "blocks": block_values(run.scalars),
        "scalars": {tag: curve(run.scalars, tag) for tag in tags},
    }


def _method(run: Recorded, method: str) -> dict[str, Any]:
    maps = run.maps[method]
    return {
        "grid": list(maps.shape[2:]),
        "limit": colour_limit(maps[0].abs()),
        "signed": bool((maps < 0).any()),
        "maps": [_text(quantised(times_uniform(each))) for each in maps],
        "drift": [_numbers(spearman(each, maps[0])) for each in maps],
        "lift": {
            region: [_numbers(_lift(each, masks)) for each in maps] for region, masks in run.report.regions.items()
        },
    }


def _lift(maps: Tensor, masks: Tensor) -> Tensor:
    """The `lift` of `region_statistics`, (B,), without the ranks that take it a hundred times as long."""
    covered = F.adaptive_avg_pool2d(masks.double()[:, None], (maps.shape[1], maps.shape[2]))[:, 0]
    # A uniform map has the mean 1, and a region's share of the image is the mean of what it covers.
    return (times_uniform(maps) * covered).mean(dim=(1, 2)) / covered.mean(dim=(1, 2))


def _mask(mask: Tensor, size: tuple[int, int]) -> str:
    picture = Image.fromarray(mask.cpu().bool().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    return _encoded(picture, "PNG")


def _encoded(picture: Picture | Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    # Colours at full resolution: what another decoder makes of them differs by rounding only.
    image.save(file, kind, **({"quality": _QUALITY, "subsampling": 0} if kind == "JPEG" else {}))
    return _text(file.getvalue())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _numbers(values: Tensor) -> Any:
    """The values as nested lists of numbers with three digits, None where they are not finite."""
    return [_numbers(each) for each in values] if values.ndim > 1 else [number(value, 3) for value in values.tolist()]

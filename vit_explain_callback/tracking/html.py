"""Runs as one self-contained HTML page with a slider over their steps, from the raw maps that they saved."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vit_explain_callback._files import write_text
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.tracking.charts import block_values, charts, curve, number
from vit_explain_callback.tracking.report import Report
from vit_explain_callback.tracking.snapshot import History, Snapshot
from vit_explain_callback.tracking.summary import verdict
from vit_explain_callback.visualization.overlay import DIFFERENCE_COLOURS, MAP_COLOURS, Picture, colour_limit
from vit_explain_callback.visualization.quantise import colour_table, quantised, times_uniform

FILE = "report.html"
_SCRIPTS = ("page_maps.js", "page_curves.js", "page_tiles.js", "page_charts.js", "page_large.js", "page.js")
_MOST_BYTES = 96 * 2**20  # of maps; a browser opens more, but no longer at once
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

    @classmethod
    def read(cls, run: Path, most_snapshots: int) -> Recorded:
        """Read a run's folder, or the folder `explanations` in it.

        Raises:
            FileNotFoundError: If nothing was saved there.
        """
        paths, report = _saved(run)
        first = Snapshot.load(paths[0])
        fitting = _MOST_BYTES // sum(maps.numel() for maps in first.maps.values())
        shown = thinned([int(path.stem.removeprefix("step_")) for path in paths], min(most_snapshots, fitting))
        history, snapshots, rows = History(), [], []
        for index in shown:
            snapshots.append(Snapshot.load(paths[index]))
            history.add(snapshots[-1])
            rows.append(report.scalars(history))
        maps = {method: torch.stack([each.maps[method] for each in snapshots]) for method in first.maps}
        folder = run.resolve()
        return cls(
            folder.parent.name if folder.name == "explanations" else folder.name,
            len(paths),
            [snapshot.step for snapshot in snapshots],
            maps,
            torch.stack([snapshot.logits for snapshot in snapshots]),
            snapshots[-1].target,
            report,
            rows,
            verdict(history, report.labels, report.regions, report.class_names),
        )


def load_run(run: Path) -> tuple[Report, Iterator[tuple[History, dict[str, float]]]]:
    """What a run saved: the report on its probe images, and its history and scalars after each snapshot.

    Args:
        run: The run's folder, or the folder `explanations` in it.

    Raises:
        FileNotFoundError: If nothing was saved there.
    """
    paths, report = _saved(run)

    def snapshots() -> Iterator[tuple[History, dict[str, float]]]:
        history = History()
        for path in paths:
            history.add(Snapshot.load(path))
            yield history, report.scalars(history)

    return report, snapshots()


def page(runs: Path | Sequence[Path], most_snapshots: int = 300) -> str:
    """The HTML page of a run, or of several that explain the same probe images, side by side.

    It needs no network and no other file. Maps are stored in 8 bits, pictures as JPEG.

    Args:
        runs: Folders of runs, or the folders `explanations` in them.
        most_snapshots: Of each run, at least 2. Those of longer runs are thinned out evenly in the logarithm of the
            step, and so are those of more than 96 MiB of maps.

    Raises:
        FileNotFoundError: If nothing was saved in a folder.
        ValueError: If a run explains other images than the first, or no method in common with it.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    if not folders or most_snapshots < 2:
        raise ValueError(
            f"Expected at least one of `runs` and 2 of `most_snapshots`, but got {len(folders)} and {most_snapshots}."
        )
    read = [Recorded.read(folder, most_snapshots) for folder in folders]
    for other, folder in zip(read[1:], folders[1:], strict=True):
        _check_same_probe(read[0], other, folder)
    return document(read)


def document(runs: Sequence[Recorded]) -> str:
    """The HTML page of runs that explain the same probe images."""
    style, *scripts = (_asset(name) for name in ("page.css", *_SCRIPTS))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hashed(style)}; "
        f"script-src {' '.join(map(_hashed, scripts))}; base-uri 'none'; form-action 'none'"
    )
    # What stands in a script element ends at the first </script.
    text = json.dumps(_data(runs), allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "policy": policy,
        "title": html.escape(", ".join(run.name for run in runs)),
        "style": f"<style>{style}</style>",
        "summary": "".join(map(_summary, runs)),
        "data": f'<script type="application/json" id="data">{text}</script>',
        "scripts": "".join(f"<script>{script}</script>" for script in scripts),
    }
    document = _asset("page.html")
    for name, part in parts.items():
        document = document.replace(f"<!--{name}-->", part)
    return document


def write_page(folder: Path, most_snapshots: int = 48) -> Path:
    """Write `report.html`, the page of the run so far, into its folder `explanations`; whole or not at all.

    Args:
        folder: The run's folder, or the folder `explanations` in it.
        most_snapshots: Shown at most, which bounds the file's size and the time that it takes.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If nothing was saved there.
        OSError: If it cannot be written.
    """
    file = (folder / "explanations" if (folder / "explanations").is_dir() else folder) / FILE
    write_text(file, page(folder, most_snapshots))
    return file


def thinned(steps: Sequence[int], count: int) -> list[int]:
    """Indices of at most `count` ascending steps, spaced by the logarithm: the first and the last two among them.

    Example:
        >>> thinned([0, 1, 2, 4, 8, 16, 17], 5)
        [0, 2, 4, 5, 6]
    """
    kept = list(range(len(steps)))
    place = [math.log1p(step - steps[0]) for step in steps]
    while len(kept) > max(3, count):
        between = range(1, len(kept) - 2)
        del kept[min(between, key=lambda index: place[kept[index + 1]] - place[kept[index - 1]])]
    return kept


def _saved(run: Path) -> tuple[list[Path], Report]:
    folder = run / "explanations" if (run / "explanations").is_dir() else run
    paths = sorted(folder.glob("step_*.safetensors"))
    if not paths or not (folder / "probe.safetensors").is_file():
        raise FileNotFoundError(
            f"There are no explanations in {run}: expected step_*.safetensors and probe.safetensors, as "
            "`ViTExplainCallback(save_maps=True)` writes them to the run's folder."
        )
    return paths, Report.load(folder / "probe.safetensors")


def _check_same_probe(one: Recorded, other: Recorded, folder: Path) -> None:
    def pictures(run: Recorded) -> list[bytes]:
        return [picture.tobytes() for picture in run.report.pictures]

    def labels(run: Recorded) -> list[int] | None:
        return None if run.report.labels is None else run.report.labels.tolist()

    different = {
        "number of images": len(one.target) != len(other.target),
        "pictures": pictures(one) != pictures(other),
        "labels": labels(one) != labels(other),
        "methods": not set(one.maps) & set(other.maps),
    }
    names = [name for name, differs in different.items() if differs]
    if names:
        raise ValueError(
            f"Expected runs that explain the same probe images with a method in common, but {folder} differs from "
            f"{one.name} in its {', '.join(names)}: make a page of its own for it."
        )


def _data(runs: Sequence[Recorded]) -> dict[str, Any]:
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


def _summary(run: Recorded) -> str:
    heading, *lines = run.summary.splitlines()
    items = "".join(
        f"<li{' class=detail' if line.startswith(' ') else ''}>{html.escape(line.strip())}</li>" for line in lines
    )
    name = html.escape(run.name)
    return f"<section><p class=eyebrow>{name}</p><h1>{html.escape(heading)}</h1><ul>{items}</ul></section>"


def _asset(name: str) -> str:
    return resources.files("vit_explain_callback.visualization").joinpath(name).read_text("utf-8")


def _hashed(text: str) -> str:
    return f"'sha256-{_text(hashlib.sha256(text.encode()).digest())}'"


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

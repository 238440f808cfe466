"""Runs as one self-contained HTML page with a slider over their steps, from the raw maps that they saved."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import torch

from vit_explain_callback._files import write_text
from vit_explain_callback.tracking.page_data import Recorded, page_data
from vit_explain_callback.tracking.report import Report
from vit_explain_callback.tracking.snapshot import History, Snapshot
from vit_explain_callback.tracking.summary import verdict

REPORT = "report.html"
_SCRIPTS = ("page_maps.js", "page_curves.js", "page_tiles.js", "page_charts.js", "page_large.js", "page.js")
_MOST_BYTES = 96 * 2**20  # of maps; a browser opens more, but no longer at once


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


def read_run(run: Path, most_snapshots: int) -> Recorded:
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
    return Recorded(
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


def page(runs: Path | Sequence[Path], most_snapshots: int = 300) -> str:
    """The HTML page of a run, or of several that explain the same probe images, side by side.

    It needs no network and no other file. Maps are stored in 8 bits, pictures as JPEG.

    Args:
        runs: Folders of runs, or the folders `explanations` in them.
        most_snapshots: Of each run, at least 3. Those of longer runs are thinned out evenly in the logarithm of the
            step, and so are those of more than 96 MiB of maps.

    Raises:
        FileNotFoundError: If nothing was saved in a folder.
        ValueError: If a run explains other images than the first, or no method in common with it.
    """
    folders = [runs] if isinstance(runs, Path) else list(runs)
    if not folders or most_snapshots < 3:
        raise ValueError(
            f"Expected at least one of `runs` and 3 of `most_snapshots`, but got {len(folders)} and {most_snapshots}."
        )
    read = [read_run(folder, most_snapshots) for folder in folders]
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
    text = json.dumps(page_data(runs), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
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
        most_snapshots: Shown at most, which bounds the file's size and the time that it takes; at least 3.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If nothing was saved there.
        OSError: If it cannot be written.
    """
    file = (folder / "explanations" if (folder / "explanations").is_dir() else folder) / REPORT
    write_text(file, page(folder, most_snapshots))
    return file


def thinned(steps: Sequence[int], count: int) -> list[int]:
    """Indices of at most `count` (3 or more) ascending steps: the first, the last two, others apart in the logarithm.

    Example:
        >>> thinned([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 6)
        [0, 1, 3, 6, 8, 9]
    """
    places = [math.log1p(step - steps[0]) for step in steps]
    if len(places) <= count:
        return list(range(len(places)))
    # The narrowest gap, by halving, that leaves so few.
    narrow, wide = 0.0, places[-1]
    for _ in range(30):
        middle = (narrow + wide) / 2
        narrow, wide = (narrow, middle) if len(_apart(places, middle)) <= count else (middle, wide)
    return _apart(places, wide)


def _apart(places: Sequence[float], gap: float) -> list[int]:
    kept = [0]
    for index in range(1, len(places) - 2):
        if places[index] - places[kept[-1]] >= gap:
            kept.append(index)
    return [*kept, len(places) - 2, len(places) - 1]


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
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

"""Render runs as one self-contained HTML page with a slider over the steps, from their raw maps."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vit_explain_callback.page.data import Shown, page_data
from vit_explain_callback.system.files import write_text
from vit_explain_callback.tracking.run import Run, load_run
from vit_explain_callback.tracking.thinning import thinned

REPORT = "report.html"
_SCRIPTS = ("page_maps.js", "page_curves.js", "page_tiles.js", "page_charts.js", "page_large.js", "page.js")
_MOST_BYTES = 96 * 2**20  # of maps; a browser opens more, but slowly


def render_page(runs: Path | Run | Sequence[Path | Run], most_snapshots: int = 300) -> str:
    """Render the HTML page of a run, or of several runs of the same probe images side by side.

    It needs no network and no other file. Maps are stored in 8 bits, pixel maps pooled to at most 64 cells a side, and
    pictures as JPEG.

    Args:
        runs: Runs, or their folders.
        most_snapshots: Snapshots shown of each run, at least 3. Longer runs, and those with more than 96 MiB of maps,
            are thinned out evenly in the logarithm of the step.

    Raises:
        FileNotFoundError: If nothing was saved in a folder.
        ValueError: If a run explains other images than the first, or no method in common with it.
    """
    all_runs = [runs] if isinstance(runs, (Path, Run)) else list(runs)
    if not all_runs or most_snapshots < 3:
        raise ValueError(
            f"Expected at least one of `runs` and 3 of `most_snapshots`, but got {len(all_runs)} and {most_snapshots}."
        )
    read = [run if isinstance(run, Run) else load_run(run) for run in all_runs]
    for other in read[1:]:
        _check_same_probe(read[0], other)
    return _document([_shown(run, most_snapshots) for run in read])


def _shown(run: Run, most_snapshots: int) -> Shown:
    fitting = _MOST_BYTES // sum(maps.numel() for maps in run.snapshots[0].pooled().maps.values())
    indices = thinned(run.steps, min(most_snapshots, fitting), last=2)
    folder = run.folder.resolve()
    name = folder.parent.name if folder.name == "explanations" else folder.name
    rows = None if run.rows is None else [run.rows[index] for index in indices]
    shown = Run(run.folder, run.probe, [run.snapshots[index] for index in indices], rows, run.metrics)
    return Shown(name, shown, len(run.snapshots), run.summary)


def _document(runs: Sequence[Shown]) -> str:
    style, *scripts = (_asset(name) for name in ("page.css", *_SCRIPTS))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hashed(style)}; "
        f"script-src {' '.join(map(_hashed, scripts))}; base-uri 'none'; form-action 'none'"
    )
    # A script element ends at the first </script.
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


def write_page(run: Path | Run, most_snapshots: int = 48) -> Path:
    """Write `report.html`, the page of the run so far, beside its maps; atomically.

    Args:
        run: The run, or its folder.
        most_snapshots: Maximum number of snapshots shown, at least 3; it bounds the size of the file and the time.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If nothing was saved there.
        OSError: If it cannot be written.
    """
    read = run if isinstance(run, Run) else load_run(run)
    write_text(read.folder / REPORT, render_page(read, most_snapshots))
    return read.folder / REPORT


class LivePage:
    """Keeps the page of a run up to date, as often as that costs less than a tenth of the run's time."""

    def __init__(self) -> None:
        self._written, self._seconds = -math.inf, 0.0

    def write(self, run: Run, is_last: bool) -> Path | None:
        """Write the page unless it was written very recently; always write the last one. Returns the file if written.

        Raises:
            OSError: If it cannot be written.
        """
        begun = time.monotonic()
        if is_last or begun - self._written > 10 * self._seconds:
            file = write_page(run)
            self._written = time.monotonic()
            self._seconds = self._written - begun
            return file
        return None


def _check_same_probe(one: Run, other: Run) -> None:
    def pictures(run: Run) -> list[bytes]:
        return [picture.tobytes() for picture in run.probe.pictures]

    def labels(run: Run) -> list[int] | None:
        return None if run.probe.labels is None else run.probe.labels.tolist()

    different = {
        "number of images": len(one.probe) != len(other.probe),
        "pictures": pictures(one) != pictures(other),
        "labels": labels(one) != labels(other),
        "methods": not set(one.snapshots[0].maps) & set(other.snapshots[0].maps),
    }
    names = [name for name, differs in different.items() if differs]
    if names:
        raise ValueError(
            f"Expected runs that explain the same probe images with a method in common, but {other.folder} differs "
            f"from {one.folder} in its {', '.join(names)}: make a page of its own for it."
        )


def _summary(shown: Shown) -> str:
    heading, *lines = shown.summary.splitlines()
    items = "".join(
        f"<li{' class=detail' if line.startswith(' ') else ''}>{html.escape(line.strip())}</li>" for line in lines
    )
    name = html.escape(shown.name)
    return f"<section><p class=eyebrow>{name}</p><h1>{html.escape(heading)}</h1><ul>{items}</ul></section>"


def _asset(name: str) -> str:
    return resources.files("vit_explain_callback.page").joinpath("assets", name).read_text("utf-8")


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

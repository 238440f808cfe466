"""Measure a run's page: seconds to write it, its bytes, and how smoothly it slides in Chromium.

Runs of random maps over photograph-like pictures, held in memory, with 200 scalars that are known: neither reading the
files of a run nor computing its scalars is timed. Of the browser: seconds until every picture is there, milliseconds of
script in a move of the slider (median and worst), and how many frames a second appear while the slider moves in every
frame, as traced by the browser itself.

    python -m tests.benchmarks.page
    python -m tests.benchmarks.page --no-browser --images 16 --snapshots 60 --methods 2 --grid 14
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.benchmarks.snapshot import smooth_images
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.page.document import render_page
from vit_explain_callback.system.files import write_text
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.run import Run
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.visualization.overlay import range_of, unnormalise

# Images, snapshots, methods, patches along a side.
SIZES = [(16, 12, 2, 14), (16, 60, 2, 14), (16, 240, 2, 14), (64, 60, 2, 14), (64, 60, 3, 37), (64, 300, 3, 37)]
_MOVES = 120
# Moves the slider in every frame, and notes the milliseconds of script and the milliseconds between frames.
_SLIDE = """async (moves) => {
    const scripts = [];
    const frame = () => new Promise(requestAnimationFrame);
    for (let i = 0; i < moves; i++) {
        state.position = i % positions.length;
        const begun = performance.now();
        renderNow();
        for (let tick = 0; tick < 5; tick++) await null; // tiles are drawn when their pictures are known to be there
        scripts.push(performance.now() - begun);
        await frame();
    }
    return scripts;
}"""


def made_up(images: int, snapshots: int, methods: int, grid: int) -> Run:
    """A run with random maps."""
    generator = torch.Generator().manual_seed(0)
    pixels = smooth_images(images, 224).tensors[0]
    pictures = [unnormalise(image, *range_of(image[None])) for image in pixels]
    taken = []
    for index in range(snapshots):
        maps = {f"method_{m}": torch.rand(images, grid, grid, generator=generator) ** 3 for m in range(methods)}
        logits = torch.randn(images, 10, generator=generator)
        taken.append(Snapshot(10 * index, Explanation(maps, logits, torch.arange(images) % 10)))
    return Run(Path("benchmark"), Probe(None, pictures, torch.arange(images) % 10), taken)


def write(run: Run, file: Path) -> dict[str, float]:
    """Write its page; seconds and bytes."""
    rows = [
        {"explain/probe/accuracy": 0.5, **{f"value_{tag}": float(tag) for tag in range(200)}} for _ in run.snapshots
    ]
    begun = time.perf_counter()
    with mock.patch.object(Run, "scalars", rows):
        write_text(file, render_page(run))
    return {"data": time.perf_counter() - begun, "bytes": file.stat().st_size}


def slide(file: Path, chromium: str) -> dict[str, float]:
    """Open the page and move its slider; seconds to open, milliseconds of script, frames a second."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1366, "height": 768})
        begun = time.perf_counter()
        tab.goto(f"file://{file}")
        tab.evaluate("Promise.all(pictures).then(() => null)")  # else it would be handed over
        opened = time.perf_counter() - begun
        browser.start_tracing(page=tab, categories=["disabled-by-default-devtools.timeline.frame"])
        scripts = sorted(tab.evaluate(_SLIDE, _MOVES))
        frames = frame_times(json.loads(browser.stop_tracing()))
        browser.close()
    rate = (len(frames) - 1) / (frames[-1] - frames[0]) if len(frames) > 1 else 0.0
    return {"open": opened, "script": scripts[len(scripts) // 2], "worst": scripts[-1], "rate": rate}


def frame_times(trace: dict[str, Any]) -> list[float]:
    """Seconds at which frames were drawn."""
    return sorted(event["ts"] / 1e6 for event in trace["traceEvents"] if event["name"] == "DrawFrame")


def line(size: Sequence[int], found: dict[str, float]) -> str:
    images, snapshots, methods, grid = size
    text = f"{images:4d} × {snapshots:3d} × {methods} of {grid:2d} × {grid:2d}: {found['data']:6.2f} s"
    text += f" {found['bytes'] / 1e6:7.2f} MB"
    if "open" in found:
        text += f"; opens in {found['open']:.1f} s, script {found['script']:.1f} ms (worst {found['worst']:.0f} ms)"
        text += f", {found['rate']:.0f} frames a second"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int)
    parser.add_argument("--snapshots", type=int, default=60)
    parser.add_argument("--methods", type=int, default=2)
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--no-browser", action="store_true")
    args = parser.parse_args(arguments)
    chromium = None if args.no_browser else shutil.which("chromium")
    print("images × snapshots × methods of patches: seconds and size of the page")
    for size in [(args.images, args.snapshots, args.methods, args.grid)] if args.images else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "page.html"
            found = write(made_up(*size), file)
            print(line(size, found | ({} if chromium is None else slide(file, chromium))), flush=True)


if __name__ == "__main__":
    main()

"""A run as one self-contained HTML page, from the raw maps that it saved."""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

from vit_explain_callback.tracking.pictures import animations, filmstrip_tag
from vit_explain_callback.tracking.run import load_run
from vit_explain_callback.tracking.scalars import STATISTICS, region_tag
from vit_explain_callback.visualization.curves import Curves, block_figure, drift_figure, line_figure
from vit_explain_callback.visualization.encode import png

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #202020; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; }
img { max-width: 100%; } .row { display: flex; flex-wrap: wrap; gap: 8px; } .row img { width: calc(16.6% - 8px); }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 10px; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f7f7f7; }
"""


def page(run: Path) -> str:
    """The HTML page of a run.

    Raises:
        FileNotFoundError: If nothing was saved there.
    """
    found = load_run(run)
    probe, history = found.probe, found.history
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in found.scalars:
        for tag, value in row.items():
            curves.setdefault(tag, []).append((int(row["step"]), value))
    del curves["step"]
    parts = [f"<h1>Explanation drift: {html.escape(run.resolve().name)}</h1>"]
    parts.append(f"<pre>{html.escape(found.summary)}</pre>")
    parts += ["<h2>Predictions and faithfulness</h2>", _picture(_summary(curves, list(history.now.maps)), "curves")]
    if f"{STATISTICS}/drift_blocks/spearman/block_01" in curves:
        panels = {
            "rank correlation of the readout's row": f"{STATISTICS}/drift_blocks/spearman",
            "attention entropy": f"{STATISTICS}/attention/entropy",
            "attention distance (pixels)": f"{STATISTICS}/attention/distance",
            "share on sinks": f"{STATISTICS}/attention/sink_share",
        }
        parts += ["<h2>Blocks</h2>", _picture(block_figure(curves, panels), "values by block and step")]
    pictures = found.pictures
    moving_pictures = dict(animations(history, probe))
    for method in history.now.maps:
        parts += [f"<h2>{html.escape(method)}</h2>", _picture(drift_figure(curves, method), "drift by step")]
        if probe.regions:
            panels_of = {
                statistic.replace("_", " "): {name: region_tag(name, method, statistic) for name in probe.regions}
                for statistic in ("lift", "pointing_game", "auroc")
            }
            parts.append(_picture(line_figure(curves, panels_of), "regions by step"))
        parts.append(_picture(png(pictures[filmstrip_tag(method)]), "filmstrip"))
        for kind in ("overlay", "overlay_change"):
            tags = [tag for tag in pictures if tag.startswith(f"explain/{kind}/{method}/")]
            parts.append(f'<div class="row">{"".join(_picture(png(pictures[tag]), tag) for tag in tags)}</div>')
        moving = [gif for tag, gif in moving_pictures.items() if tag.startswith(f"explain/overlay_animation/{method}/")]
        parts.append(f'<div class="row">{"".join(_picture(gif, "animation", "gif") for gif in moving)}</div>')
    parts += ["<h2>Every scalar</h2>", _table(curves)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Explanation drift</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(curves: Curves, methods: list[str]) -> bytes:
    panels = {
        "probe": {
            name.replace("_", " "): f"explain/probe/{name}"
            for name in ("accuracy", "target_probability", "changed_predictions")
            if f"explain/probe/{name}" in curves
        },
        "map entropy": {method: f"explain/map/entropy/{method}" for method in methods},
    }
    gains = {name: f"explain/faithfulness/{name}" for name in [*methods, "random"]}
    if gains["random"] in curves:
        panels["faithfulness (SRG)"] = gains
    return line_figure(curves, panels)


def _table(curves: Curves) -> str:
    rows = ["<tr><th>tag</th><th>first</th><th>last</th><th>lowest</th><th>highest</th></tr>"]
    for tag, points in sorted(curves.items()):
        known = [value for _, value in points if math.isfinite(value)] or [math.nan]
        cells = (points[0][1], points[-1][1], min(known), max(known))
        rows.append(f"<tr><td>{html.escape(tag)}</td>{''.join(f'<td>{cell:.4g}</td>' for cell in cells)}</tr>")
    return f"<details><summary>{len(curves)} tags</summary><table>{''.join(rows)}</table></details>"


def _picture(data: bytes, text: str, kind: str = "png") -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'

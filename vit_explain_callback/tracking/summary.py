"""Summarise a run in at most 15 lines, with no claim that its numbers do not carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import UNCHANGED, spearman
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.snapshot import Snapshot

_LINES = 15


def summary(history: History, probe: Probe) -> str:
    """Which images, blocks and regions changed most, when, whether predictions did, and whether maps are faithful.

    Args:
        history: The snapshots of the run.
        probe: Its images; their labels, regions and names of classes.

    Returns:
        At most 15 lines.
    """
    regions, class_names = probe.regions, probe.class_names
    lines = [_heading(history), _predictions(history, probe)]
    last = [*_blocks(history), "Drift says that maps changed, not that the change is for the worse."]
    parts = [_method(history, method, regions, class_names) for method in history.baseline.maps]
    for index, part in enumerate(parts):
        left_out = len(parts) - index
        if len(lines) + len(part) + len(last) + (left_out > 1) > _LINES:
            lines.append(f"{left_out} of {len(parts)} methods are left out here.")
            break
        lines += part
    return "\n".join([*lines, *last])


def _heading(history: History) -> str:
    images = len(history.now.target)
    steps = f"steps {history.baseline.step} to {history.now.step}"
    return f"Explanation drift of {images} probe images over {history.count} snapshots, {steps}"


def _predictions(history: History, probe: Probe) -> str:
    now, baseline, labels = history.now, history.baseline, probe.labels
    if probe.regression:
        before, after = (one.logits.gather(1, one.target[:, None]).mean().item() for one in (baseline, now))
        return f"mean output {before:.3g} → {after:.3g}"
    changed = int((now.prediction != baseline.prediction).sum())
    parts = [f"predictions: {changed} of {len(now.target)} changed"]
    if labels is not None:
        known = labels >= 0
        before, after = ((one.prediction == labels)[known].double().mean().item() for one in (baseline, now))
        parts.append(f"accuracy {before:.2f} → {after:.2f}")
    before, after = (snapshot.target_probability.mean().item() for snapshot in (baseline, now))
    return ", ".join([*parts, f"target probability {before:.2f} → {after:.2f}"])


def _method(
    history: History, method: str, regions: Mapping[str, Tensor], class_names: Sequence[str] | None
) -> list[str]:
    now, baseline = history.now, history.baseline
    by_image = now.drift_from(baseline, method, "spearman")
    known = by_image.isfinite()
    if not known.any():
        return [f"{method}: no drift can be measured, the maps are degenerate"]
    mean = by_image[known].mean().item()
    lines = [f"{method}: rank correlation with the baseline {mean:.2f}{_on_scale(baseline, method, mean)}"]
    worst = int(by_image.nan_to_num(math.inf).argmin())
    old, new = (_name(int(snapshot.prediction[worst]), class_names) for snapshot in (baseline, now))
    prediction = f"still predicted {new}" if old == new else f"predicted {old}, now {new}"
    lines.append(f"  most in image {worst} ({by_image[worst]:.2f}, {prediction}){_when(history, method)}")
    if faithful := _faithfulness(history, method):
        lines.append(f"  {faithful}")
    if regions:
        lines.append(f"  {_regions(now, baseline, method, regions)}")
    return lines


def _on_scale(baseline: Snapshot, method: str, mean: float) -> str:
    bars = baseline.scale(method, "spearman")
    if bars is None:
        return ""
    text = f"; mirrored images {bars[0]:.2f}, different images {bars[1]:.2f}"
    share = on_scale(mean, *bars, UNCHANGED["spearman"])
    if not math.isfinite(share):
        return text
    return f"{text}: {share:.0%} of the way between" if share > 0 else f"{text}: within the noise"


def _when(history: History, method: str) -> str:
    steps = [
        (torch.nanmean(spearman(later.maps[method], earlier.maps[method])).item(), earlier.step, later.step)
        for earlier, later in pairwise(history.snapshots)
    ]
    steps = [step for step in steps if math.isfinite(step[0])]
    if not steps:
        return ""
    _, start, end = min(steps)
    return f"; fastest between steps {start} and {end}"


def _faithfulness(history: History, method: str) -> str:
    if not history.checked or method not in history.checked[0].gains:
        return ""
    before, after = (known.gains[method].nanmean().item() for known in (history.checked[0], history.checked[-1]))
    gains = history.checked[-1].gains
    better = gains[method] - gains["random"]
    better = better[better.isfinite()]
    if len(better) < 2:
        return f"faithfulness (SRG) {before:.2f} → {after:.2f}"
    margin = 1.96 * better.std().item() / math.sqrt(len(better))
    against = f"{better.mean().item():+.2f} ± {margin:.2f} against a random order"
    holds = "more faithful than chance" if better.mean().item() > margin else "not told from chance"
    return f"faithfulness (SRG) {before:.2f} → {after:.2f}, {against}: {holds}"


def _regions(now: Snapshot, baseline: Snapshot, method: str, regions: Mapping[str, Tensor]) -> str:
    changes = []
    for name, masks in regions.items():
        before, after = (
            region_statistics(snapshot.maps[method], masks)["lift"].nanmean().item() for snapshot in (baseline, now)
        )
        changes.append((abs(math.log(max(after, 1e-3) / max(before, 1e-3))), f"{name} {before:.1f} → {after:.1f}"))
    changes.sort(reverse=True)
    return "lift (1 = its share of the image): " + ", ".join(text for _, text in changes[:4])


def _blocks(history: History) -> list[str]:
    now, baseline = history.now.blocks, history.baseline.blocks
    if now is None or baseline is None:
        return []
    means = [
        torch.nanmean(spearman(now.rows[:, block], baseline.rows[:, block])).item()
        for block in range(now.rows.shape[1])
    ]
    known = [(mean, block + 1) for block, mean in enumerate(means) if math.isfinite(mean)]
    if not known:
        return []
    (most, first), (least, second) = min(known), max(known)
    return [
        f"blocks: what the readout attends to changed most in block {first} of {len(means)} (rank correlation "
        f"{most:.2f}), least in block {second} ({least:.2f})"
    ]


def _name(index: int, class_names: Sequence[str] | None) -> str:
    return str(class_names[index]) if class_names is not None and index < len(class_names) else f"class {index}"

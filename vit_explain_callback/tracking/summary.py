"""Summarise a run in at most ten lines, with no claim that its numbers do not carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import METRICS, spearman
from vit_explain_callback.metrics.localisation import lift
from vit_explain_callback.metrics.margin import margin
from vit_explain_callback.metrics.reference import on_scale
from vit_explain_callback.tracking.history import History
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.visualization.captions import class_name
from vit_explain_callback.visualization.selection import most_changed

_LINES = 10
_NAMES = 3
_ROUNDING = 1e-6  # of a rank correlation
_FACTOR = 2  # of a lift
_NO_GAIN = 0.01  # what is printed as 0.00 or 0.01


def summary(history: History, probe: Probe) -> str:
    """Whether the model changed where it looks, by more than noise, when, on which images; whether to trust the maps.

    Drift is more than noise where the images drifted further than their maps move at the baseline under a change that
    should not matter (see `metrics.reference.nudged`), on average by more than the margin of the 95 % interval of
    Student's t; no more than noise where they drifted less by as much; else it cannot be told. A region has moved where
    its mean lift at least doubled or halved, by more than that margin.

    Args:
        history: The snapshots of the run.
        probe: Its images; their labels, regions and names of classes.

    Returns:
        At most 10 lines.
    """
    changes = sorted((_change(history, probe, method) for method in history.baseline.maps), key=_by_change)
    known = [change for change in changes if math.isfinite(change.mean)]
    first = [_headline(history, changes)]
    if history.count == 1:
        return "\n".join([*first, *_trust(history, [change.method for change in changes])])
    last: list[str] = []
    if known and _has_changed(known[0]):
        last += [*_when(history, known[0].method), _images(history, probe, known[0])]
    last += [_outputs(history, probe), *_trust(history, [change.method for change in changes])]
    if known:
        last += _regions(history, probe, known[0].method)
    last += _blocks(history) if any(map(_has_changed, known)) else []
    room = _LINES - len(first) - len(last)
    methods = [_method(change) for change in changes]
    if len(methods) > room:
        methods = [*methods[: room - 1], f"  and {len(methods) - room + 1} more methods"]
    return "\n".join([*first, *methods, *last])


@dataclass(frozen=True)
class _Change:
    """How far the maps of one method are from the baseline's.

    Attributes:
        method: Its name.
        by_image: (B,) rank correlations with the baseline; NaN where there is none.
        mean: Of those that are known.
        levels: Rank correlation under noise and between different images, or None where they were not measured.
        beyond_noise: Whether the drift is more than noise; None where that cannot be told.
        regions: Those whose lift at least doubled or halved.
    """

    method: str
    by_image: Tensor
    mean: float
    levels: tuple[float, float] | None
    beyond_noise: bool | None
    regions: Sequence[str]


def _change(history: History, probe: Probe, method: str) -> _Change:
    baseline = history.baseline
    by_image = history.now.drift_from(baseline, method, "spearman")
    levels, beyond_noise = baseline.scale(method, "spearman"), None
    if baseline.reliability is not None:
        noise = METRICS["spearman"](baseline.maps[method], baseline.reliability.nudged[method])
        beyond_noise = _is_more(noise - by_image)
        if beyond_noise is False and not _is_scale(levels):
            beyond_noise = None
    regions = [name for name, masks in probe.regions.items() if _has_moved(history, method, masks)]
    return _Change(method, by_image, torch.nanmean(by_image).item(), levels, beyond_noise, regions)


def _is_more(excess: Tensor) -> bool | None:
    """Whether it is above 0 on average over the images, or not above it; None where neither can be told."""
    error, mean = margin(excess), torch.nanmean(excess).item()
    if error is None or -error + _ROUNDING < mean <= error:
        return None
    return mean > error


def _has_moved(history: History, method: str, masks: Tensor) -> bool:
    """Whether the lift of a region at least doubled or halved, and on the images alike.

    The noise is no measure here: a region such as a watermark in a corner has its place, which a mirror moves.
    """
    before, now = (lift(one.maps[method], masks) for one in (history.baseline, history.now))
    low, high = sorted([torch.nanmean(before).item(), torch.nanmean(now).item()])
    moved = _is_more(now - before) is True or _is_more(before - now) is True
    return moved and high >= _FACTOR * low


def _is_scale(levels: tuple[float, float] | None) -> bool:
    """Whether noise and unrelated maps are apart, so that drift can be called little."""
    return levels is not None and math.isfinite(on_scale(1.0, *levels, METRICS["spearman"].unchanged))


def _has_changed(change: _Change) -> bool:
    return change.mean < 1 - _ROUNDING


def _by_change(change: _Change) -> tuple[bool, bool, bool, float]:
    """Sorts what changed most first: beyond noise, then in a region, then the rest, then what is not known."""
    mean = change.mean if math.isfinite(change.mean) else 0.0
    return not math.isfinite(change.mean), not change.beyond_noise, not change.regions, mean


def _headline(history: History, changes: Sequence[_Change]) -> str:
    images, step = len(history.now.target), history.now.step
    what = f"({_count(images, 'image')}, {history.count} snapshots, steps {history.baseline.step} to {step})"
    if history.count == 1:
        return f"Whether the model changed where it looks is not known: there is one snapshot only, at step {step}."
    known = [change for change in changes if math.isfinite(change.mean)]
    noise = _noise(history)
    moved = [change.method for change in known if change.beyond_noise]
    still = [change.method for change in known if change.beyond_noise is False]
    unsure = [change.method for change in known if change.beyond_noise is None and _has_changed(change)]
    if not known:
        return f"Whether the model changed where it looks cannot be told: the maps are degenerate {what}."
    if moved:
        but = f", not in those of {_names(still)}" if still else ""
        return f"The model changed where it looks, by more than {noise}, in the maps of {_names(moved)}{but} {what}."
    if known[0].regions:
        lifts = f"the lift of {_names(known[0].regions)} at least doubled or halved in the maps of {known[0].method}"
        return f"The model changed where it looks: {lifts} {what}."
    if still and unsure:
        return (
            f"The maps of {_names(still)} changed by no more than {noise}; of {_names(unsure)} it is not clear {what}."
        )
    if still:
        return f"The model looks where it looked before: the maps changed by no more than {noise} {what}."
    if not any(map(_has_changed, known)):
        return f"The model looks where it looked before: the order of the patches is the same {what}."
    return f"The maps changed; whether by more than noise cannot be told, as {_why_not(history)} {what}."


def _noise(history: History) -> str:
    """What the noise is that was measured at the baseline."""
    known = history.baseline.reliability
    return f"noise (shift, grain{', mirror' if known is not None and known.mirror else ''})"


def _why_not(history: History) -> str:
    if history.baseline.reliability is None:
        return "the noise was not measured"
    if len(history.now.target) == 1:
        return "one image is too few"
    if any(_is_scale(history.baseline.scale(method, "spearman")) for method in history.baseline.maps):
        return "it is about as much as noise, and the images are few"
    return "noise moves the maps as far as another image does"


def _method(change: _Change) -> str:
    if not math.isfinite(change.mean):
        return f"  {change.method}: no drift can be measured, the maps are degenerate"
    text = f"  {change.method}: rank correlation with the baseline {change.mean:.2f}"
    if change.levels is None or not all(map(math.isfinite, change.levels)):
        return text
    noise, unrelated = change.levels
    share = on_scale(change.mean, noise, unrelated, METRICS["spearman"].unchanged)
    if math.isfinite(share) and share > 0:
        return f"{text}, {share:.0%} of the way from noise ({noise:.2f}) to another image ({unrelated:.2f})"
    return f"{text}; noise {noise:.2f}, another image {unrelated:.2f}"


def _when(history: History, method: str) -> list[str]:
    steps = [
        (torch.nanmean(spearman(later.maps[method], earlier.maps[method])).item(), earlier.step, later.step)
        for earlier, later in pairwise(history.snapshots)
    ]
    steps = [step for step in steps if math.isfinite(step[0])]
    if len(steps) < 2:
        return []
    _, start, end = min(steps)
    return [f"When: most between steps {start} and {end} ({method})."]


def _images(history: History, probe: Probe, change: _Change) -> str:
    worst = most_changed(1 - change.by_image, _NAMES)
    parts = [f"{index} ({change.by_image[index]:.2f}{_said_of(history, probe, index)})" for index in worst]
    return f"Images: most in image {', '.join(parts)}, counted from 0 ({change.method})."


def _said_of(history: History, probe: Probe, index: int) -> str:
    """The predicted class of an image, before and now."""
    if probe.regression:
        return ""
    old, new = (int(one.prediction[index]) for one in (history.baseline, history.now))
    name = class_name(old, probe.class_names)
    return f", {name}" if old == new else f", {name}, now {class_name(new, probe.class_names)}"


def _outputs(history: History, probe: Probe) -> str:
    ends = (history.baseline, history.now)
    if probe.regression:
        before, after = (one.logits.gather(1, one.target[:, None]).double().mean().item() for one in ends)
        return f"Output: mean {before:.3g} → {after:.3g}."
    changed = int((history.now.prediction != history.baseline.prediction).sum())
    parts = [f"{changed} of {len(history.now.target)} changed"]
    if probe.labels is not None and (known := probe.labels >= 0).any():
        before, after = ((one.prediction == probe.labels)[known].double().mean().item() for one in ends)
        parts.append(f"accuracy {before:.2f} → {after:.2f}")
    before, after = (one.target_probability(probe.multilabel).mean().item() for one in ends)
    return f"Predictions: {', '.join([*parts, f'target probability {before:.2f} → {after:.2f}'])}."


def _trust(history: History, methods: Sequence[str]) -> list[str]:
    """Which methods are more faithful than chance, by their gain over a random order."""
    if not history.checked or "random" not in history.checked[-1].gains:
        return []
    gains = history.checked[-1].gains
    known = [gain[gain.isfinite()] for gain in gains.values()]
    if all(len(gain) and (gain.abs() < _NO_GAIN).all() for gain in known):
        why = "the target's probability does not depend on what is taken away: try the other `removal`"
        return [f"Can the maps be trusted? Not known, as {why}."]
    faithful: list[str] = []
    others: list[str] = []
    unknown: list[str] = []
    for method in methods:
        better = gains[method] - gains["random"]
        error = margin(better)
        if error is None:
            unknown.append(method)
        else:
            mean = torch.nanmean(better).item()
            (faithful if mean > error else others).append(f"{method} ({mean:+.2f} ± {error:.2f})")
    parts = [f"more faithful than chance: {_names(faithful)}"] if faithful else []
    parts += [f"not told from chance: {_names(others)}"] if others else []
    parts += [f"not known: {_names(unknown)}"] if unknown else []
    images = _count(int(gains["random"].isfinite().sum()), "image")
    return [f"Can the maps be trusted (SRG over a random order, {images})? {'; '.join(parts)}."]


def _regions(history: History, probe: Probe, method: str) -> list[str]:
    changes = []
    for name, masks in probe.regions.items():
        lifts = [lift(one.maps[method], masks) for one in (history.baseline, history.now)]
        before, after = (torch.nanmean(of_images).item() for of_images in lifts)
        if math.isfinite(before) and math.isfinite(after):
            size = abs(math.log(max(after, 1e-3) / max(before, 1e-3)))
            changes.append((size, f"{name} {before:.1f} → {after:.1f}"))
    changes.sort(reverse=True)
    if not changes:
        return []
    return [f"Regions (lift, 1 = their share of the image, {method}): {', '.join(text for _, text in changes[:4])}."]


def _blocks(history: History) -> list[str]:
    drift = history.block_drift.get(history.now.step)
    means = [] if drift is None else drift.tolist()
    known = [(mean, block) for block, mean in enumerate(means, start=1) if math.isfinite(mean)]
    if len(known) < 2:
        return []
    (most, first), (least, second) = min(known), max(known)
    return [
        f"Blocks: attention changed most in block {first} of {len(means)} (rank correlation {most:.2f}), least in "
        f"block {second} ({least:.2f})."
    ]


def _names(names: Sequence[str]) -> str:
    if len(names) > _NAMES:
        return f"{', '.join(names[:_NAMES])} and {len(names) - _NAMES} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"

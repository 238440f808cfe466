"""A snapshot: an explanation after some optimiser steps, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_explain_callback.explanation import Explanation, check_explanation, side_names, tensors_under
from vit_explain_callback.metrics.attention import BlockStatistics
from vit_explain_callback.metrics.drift import METRICS, DriftMetric
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.metrics.probability import class_probabilities
from vit_explain_callback.metrics.reference import noise_floor, unrelated_level
from vit_explain_callback.system.files import check_dtype, check_tensors, read_json, read_tensors, write_tensors

_LARGEST_STEP = 2**53


@dataclass(frozen=True)
class Reliability:
    """How far a snapshot's maps can be trusted; tensors on the CPU.

    Attributes:
        nudged: Pooled maps of the images after a change that should not matter, see `metrics.reference.nudged`, by
            method name, (B, grid_h, grid_w); mirrored back.
        gains: Symmetric relevance gain by method name, and of a `"random"` order, (B,); NaN for images that were not
            measured. Empty if faithfulness was not measured.
        mirror: Whether the change included a mirror.
    """

    nudged: dict[str, Tensor]
    gains: dict[str, Tensor]
    mirror: bool = False


@dataclass(frozen=True)
class Snapshot:
    """An explanation of the probe images after some optimiser steps; tensors on the CPU.

    Attributes:
        step: Number of optimiser steps before it.
        explanation: Explanation of the probe images, without the images.
        reliability: How far its maps can be trusted; None if not measured.
    """

    step: int
    explanation: Explanation
    reliability: Reliability | None = None
    _scales: dict[tuple[str, str], tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def maps(self) -> dict[str, Tensor]:
        """Raw maps by method name, (B, grid_h, grid_w)."""
        return self.explanation.maps

    @property
    def logits(self) -> Tensor:
        """(B, C)."""
        return self.explanation.logits

    @property
    def target(self) -> Tensor:
        """(B,) classes that the gradients are of."""
        return self.explanation.target

    @property
    def blocks(self) -> BlockStatistics | None:
        """What each block attends to, or None."""
        return self.explanation.blocks

    @property
    def prediction(self) -> Tensor:
        """(B,) predicted classes."""
        return self.explanation.prediction

    def target_probability(self, multilabel: bool = False) -> Tensor:
        """(B,) probability of the target class, in [0, 1]."""
        return class_probabilities(self.logits, multilabel).gather(1, self.target[:, None])[:, 0]

    def drift_from(self, reference: Snapshot, method: str, metric: str | DriftMetric) -> Tensor:
        """(B,) values of a drift metric for each image."""
        return _as_metric(metric)(pooled(self.maps[method]), pooled(reference.maps[method]))

    def block_drift_from(self, reference: Snapshot, metric: str) -> Tensor | None:
        """(L,) means over the images of a drift metric of what each block's readout attends to, in float64.

        None if one of the snapshots has no blocks.
        """
        if self.blocks is None or reference.blocks is None:
            return None
        rows, other = self.blocks.rows, reference.blocks.rows
        values = METRICS[metric]
        return torch.stack([torch.nanmean(values(rows[:, block], other[:, block])) for block in range(rows.shape[1])])

    def scale(self, method: str, metric: str | DriftMetric) -> tuple[float, float] | None:
        """Noise floor and unrelated level of a drift metric; None if noise was not measured."""
        if self.reliability is None:
            return None
        metric = _as_metric(metric)
        key = method, metric.name
        if key not in self._scales:  # every later snapshot asks the baseline for it
            maps = pooled(self.maps[method])
            level = unrelated_level(maps, metric)
            self._scales[key] = noise_floor(maps, self.reliability.nudged[method], metric), level
        return self._scales[key]

    def pooled(self) -> Snapshot:
        """The snapshot with pooled maps; see `metrics.maps.pooled`."""
        maps = {name: pooled(each) for name, each in self.maps.items()}
        return replace(self, explanation=replace(self.explanation, maps=maps))

    def save(self, path: Path) -> None:
        """Write a safetensors file: the tensors of `state_dict`, and `step` in its metadata."""
        state = self.state_dict()
        step = str(state.pop("step"))
        write_tensors(path, state, {"step": step})

    def save_checked(self, path: Path) -> None:
        """Add the reliability to a file that was saved before; its maps stay unchanged."""
        saved = Snapshot.load(path) if path.is_file() else self
        replace(saved, reliability=self.reliability).save(path)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another kind of file, or has been changed.
        """
        tensors, metadata = read_tensors(path)
        return cls.from_state({**tensors, "step": read_json(path, metadata, "step")}, path)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the step: for a checkpoint that loads with `weights_only=True`.

        The names are those of `Explanation.tensors`, and `nudged/{method}`, `mirror`, `gain/{method}`.
        """
        state: dict[str, Any] = {"step": self.step, **self.explanation.tensors()}
        if self.reliability is not None:
            for group, part in (("nudged", self.reliability.nudged), ("gain", self.reliability.gains)):
                state |= {f"{group}/{name}": value for name, value in part.items()}
            state["mirror"] = torch.tensor(self.reliability.mirror)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], source: str | Path = "the state of a snapshot") -> Snapshot:
        """Rebuild a snapshot from its `state_dict`.

        Args:
            state: The `state_dict`.
            source: Where it was read from, for the error.

        Raises:
            ValueError: If something is missing or has been changed.
        """
        step = state.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _LARGEST_STEP:
            raise ValueError(f"Expected `step` in {source} to be a number of optimiser steps, but got {step!r:.80}.")
        tensors = {name: value for name, value in state.items() if name != "step"}
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"Expected `{name}` in {source} to be a tensor, but got {type(value).__name__}.")
        _check(source, tensors)
        tensors["target"] = tensors["target"].long()
        nudged = tensors_under("nudged", tensors)
        gains = tensors_under("gain", tensors)
        reliability = Reliability(nudged, gains, bool(tensors["mirror"])) if nudged else None
        return cls(step, Explanation.from_tensors(tensors), reliability)


def _as_metric(metric: str | DriftMetric) -> DriftMetric:
    return METRICS[metric] if isinstance(metric, str) else metric


def _check(source: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not make a snapshot."""
    methods = list(tensors_under("map", tensors))
    if not methods:
        raise ValueError(f"Expected {source} to hold `map/…` of at least one method, but it does not.")
    check_explanation(source, tensors, methods)
    # A baseline and a regression have noise alone.
    groups = {name: tensors_under(name, tensors) for name in ("nudged", "gain")}
    expected = {"nudged": set(methods), "gain": {*methods, "random"}} if groups["nudged"] or groups["gain"] else {}
    shapes: dict[str, tuple[str, ...]] = {f"map/{name}": ("B", *side_names(name)) for name in methods}
    for group, names in expected.items():
        if group == "gain" and not groups[group]:
            continue
        shapes |= {f"{group}/{name}": ("B", *(side_names(name) if group == "nudged" else ())) for name in names}
    pooled_maps = {f"map/{name}": pooled(tensors[f"map/{name}"]) for name in methods}  # like the nudged ones
    check_tensors(source, {**tensors, **pooled_maps}, shapes)
    if expected:
        check_tensors(source, tensors, {"mirror": ()})
        check_dtype(source, tensors, "mirror", (torch.bool,))
    for name in ("logits", *(f"map/{name}" for name in methods), *shapes):
        check_dtype(source, tensors, name, (torch.float32, torch.float64))
    unknown = [f"{group}/{name}" for group, part in groups.items() for name in part if f"{group}/{name}" not in shapes]
    if unknown:
        raise ValueError(f"Expected {source} to hold reliability of its own methods, but got `{unknown[0]}`.")

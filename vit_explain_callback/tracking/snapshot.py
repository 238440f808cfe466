"""One look at the model: a snapshot, its file, and the history of snapshots that the pictures are made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_explain_callback._files import read_tensors, write_tensors
from vit_explain_callback.metrics.attention import BlockStatistics


@dataclass(frozen=True)
class Checks:
    """What tells how far a snapshot's maps can be trusted; tensors on the CPU.

    Attributes:
        mirrored: Maps of the mirrored images, mirrored back, by method name, (B, grid_h, grid_w).
        gains: Symmetric relevance gain by method name, and of a `"random"` order, (B,).
    """

    mirrored: dict[str, Tensor]
    gains: dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What the model looked at after some optimiser steps; tensors on the CPU.

    Attributes:
        step: Optimiser steps taken before it.
        maps: Raw maps by method name, (B, grid_h, grid_w).
        logits: (B, C).
        target: (B,) classes that the gradients are of.
        blocks: What each block attends to, or None.
        checks: How far the maps can be trusted, or None where that was not looked into.
    """

    step: int
    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor
    blocks: BlockStatistics | None = None
    checks: Checks | None = None

    @property
    def prediction(self) -> Tensor:
        """(B,) predicted classes."""
        return self.logits.argmax(dim=1)

    @property
    def target_probability(self) -> Tensor:
        """(B,) probability of the target class, in [0, 1]."""
        return self.logits.double().softmax(dim=1).gather(1, self.target[:, None])[:, 0]

    def save(self, path: Path) -> None:
        """Write a safetensors file: the tensors of `state_dict`, and `step` in its metadata.

        The file appears whole or not at all, also if the process is killed.
        """
        state = self.state_dict()
        step = str(state.pop("step"))
        write_tensors(path, state, {"step": step})

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what `save` wrote."""
        tensors, metadata = read_tensors(path)
        return cls.from_state({"step": int(metadata["step"]), **tensors})

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the step: for a checkpoint that loads with `weights_only=True`.

        The names are `map/{method}`, `logits`, `target`; `block/{statistic}`; `mirrored/{method}`, `gain/{method}`.
        """
        state = {"step": self.step, "logits": self.logits, "target": self.target}
        groups: dict[str, dict[str, Tensor]] = {"map": self.maps}
        if self.blocks is not None:
            groups["block"] = vars(self.blocks)
        if self.checks is not None:
            groups |= {"mirrored": self.checks.mirrored, "gain": self.checks.gains}
        return state | {f"{group}/{name}": value for group, part in groups.items() for name, value in part.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot that gave this `state_dict`."""

        def group(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        blocks, mirrored = group("block/"), group("mirrored/")
        return cls(
            state["step"],
            group("map/"),
            state["logits"],
            state["target"],
            BlockStatistics(**blocks) if blocks else None,
            Checks(mirrored, group("gain/")) if mirrored else None,
        )


@dataclass
class History:
    """The snapshots of a run, baseline first; thinned out as it grows, evenly in the logarithm of the step.

    Attributes:
        capacity: Snapshots kept at most. The baseline and the latest two are always among them.
        snapshots: Those kept, oldest first.
        count: Snapshots taken, kept or not.
        fingerprint: Of the probe batch, or None before it is known.
    """

    capacity: int = 48
    snapshots: list[Snapshot] = field(default_factory=list)
    count: int = 0
    fingerprint: str | None = None

    @property
    def baseline(self) -> Snapshot:
        """The first snapshot."""
        return self.snapshots[0]

    @property
    def previous(self) -> Snapshot:
        """The one before the latest; the first if there is only that."""
        return self.snapshots[max(0, len(self.snapshots) - 2)]

    @property
    def now(self) -> Snapshot:
        """The latest snapshot."""
        return self.snapshots[-1]

    @property
    def checked(self) -> list[Checks]:
        """The checks that are known: those of the baseline, and the latest."""
        return [snapshot.checks for snapshot in self.snapshots if snapshot.checks is not None]

    def add(self, snapshot: Snapshot) -> None:
        """Append the latest snapshot, and let go of the most crowded old one if there are too many.

        Of what only the first and the latest are asked for, blocks and checks, those between are let go too.
        """
        self.snapshots.append(snapshot)
        self.count += 1
        for index in range(1, len(self.snapshots) - 1):
            old = self.snapshots[index]
            checks = None if any(later.checks for later in self.snapshots[index + 1 :]) else old.checks
            self.snapshots[index] = replace(old, blocks=None, checks=checks)
        if len(self.snapshots) > self.capacity:
            # The one before the latest is what the next drift is measured against.
            del self.snapshots[_most_crowded(self.snapshots[:-1])]

    def columns(self, count: int) -> list[Snapshot]:
        """At most `count` snapshots to show: baseline, some between it and now, spaced by the log of the step, now."""
        shown = list(self.snapshots)
        while len(shown) > max(2, count):
            del shown[_most_crowded(shown)]
        return shown

    def clear(self) -> None:
        """Forget everything."""
        self.snapshots, self.count, self.fingerprint = [], 0, None

    def update_latest(self, checks: Checks) -> None:
        """Give the latest snapshot its checks."""
        self.snapshots[-1] = replace(self.now, checks=checks)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        snapshots = [snapshot.state_dict() for snapshot in self.snapshots]
        return {"count": self.count, "fingerprint": self.fingerprint, "snapshots": snapshots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.count = state["count"]
        self.fingerprint = state["fingerprint"]
        self.snapshots = [Snapshot.from_state(snapshot) for snapshot in state["snapshots"]]


def _most_crowded(snapshots: Sequence[Snapshot]) -> int:
    """Index of the snapshot, neither first nor last, whose neighbours lie closest in log(1 + steps since the first)."""
    place = [math.log1p(snapshot.step - snapshots[0].step) for snapshot in snapshots]
    return min(range(1, len(place) - 1), key=lambda index: place[index + 1] - place[index - 1])

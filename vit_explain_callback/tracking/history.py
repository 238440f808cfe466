"""The snapshots of a run: which are kept as it grows, and which are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot


@dataclass
class History:
    """The snapshots of a run, baseline first; thinned out as it grows, evenly in the logarithm of the step.

    Attributes:
        capacity: Snapshots kept at most. The baseline and the latest two are always among them.
        snapshots: Those kept, oldest first.
        count: Snapshots taken, kept or not.
        block_drift: (L,) mean rank correlation of what each block's readout attends to with the baseline's, by step, of
            each snapshot that is kept; float64. Empty where no blocks were measured.
    """

    capacity: int = 48
    snapshots: list[Snapshot] = field(default_factory=list)
    count: int = 0
    block_drift: dict[int, Tensor] = field(default_factory=dict)

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
    def checked(self) -> list[Reliability]:
        """The reliability that is known: of the baseline, and the latest."""
        return [snapshot.reliability for snapshot in self.snapshots if snapshot.reliability is not None]

    def add(self, snapshot: Snapshot) -> None:
        """Append the latest snapshot, and let go of the most crowded old one if there are too many.

        Maps are kept as they are measured, so that those of pixels do not fill the memory and the checkpoints.
        Of what only the first and the latest are asked for, blocks and reliability, those between are let go too.
        """
        self.snapshots.append(snapshot.pooled())
        self.count += 1
        drift = snapshot.block_drift_from(self.baseline, "spearman")
        if drift is not None:
            self.block_drift[snapshot.step] = drift
        for index in range(1, len(self.snapshots) - 1):
            old = self.snapshots[index]
            known_later = any(later.reliability for later in self.snapshots[index + 1 :])
            explanation = replace(old.explanation, blocks=None)
            self.snapshots[index] = Snapshot(old.step, explanation, None if known_later else old.reliability)
        if len(self.snapshots) > self.capacity:
            # The one before the latest is what the next drift is measured against.
            gone = self.snapshots.pop(_most_crowded(self.snapshots[:-1]))
            self.block_drift.pop(gone.step, None)

    def check_grids(self, explanation: Explanation) -> None:
        """Refuse maps that have another grid than the baseline's, as a function may give.

        Raises:
            RuntimeError: If there are such.
        """
        for name, maps in explanation.maps.items() if self.count else ():
            grid, known = pooled(maps).shape[1:], self.baseline.maps[name].shape[1:]
            if grid != known:
                raise RuntimeError(
                    f"Expected maps of `{name}` with {known[0]}x{known[1]} cells, as at the baseline, but got "
                    f"{grid[0]}x{grid[1]}: drift is measured on one grid."
                )

    def columns(self, count: int) -> list[Snapshot]:
        """At most `count` snapshots to show: baseline, some between it and now, spaced by the log of the step, now."""
        shown = list(self.snapshots)
        while len(shown) > max(2, count):
            del shown[_most_crowded(shown)]
        return shown

    def drop_latest(self) -> None:
        """Let go of the latest snapshot."""
        self.block_drift.pop(self.snapshots.pop().step, None)
        self.count -= 1

    def update_latest(self, reliability: Reliability) -> None:
        """Give the latest snapshot its reliability."""
        self.snapshots[-1] = replace(self.now, reliability=reliability)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        snapshots = [snapshot.state_dict() for snapshot in self.snapshots]
        return {"count": self.count, "snapshots": snapshots, "block_drift": dict(self.block_drift)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: If it is not that.
        """
        count, states = state.get("count"), state.get("snapshots")
        if not isinstance(states, list) or not all(isinstance(one, Mapping) for one in states):
            raise ValueError(f"Expected `snapshots` to be a list of states, but got {type(states).__name__}.")
        if type(count) is not int or not len(states) <= count < 2**53 or (count and not states):
            raise ValueError(f"Expected `count` to be that of {len(states)} snapshots or more, but got {count!r:.80}.")
        snapshots = [Snapshot.from_state(one, f"snapshot {index}") for index, one in enumerate(states)]
        check_alike(snapshots, [f"snapshot {index}" for index in range(len(snapshots))])
        self.count, self.snapshots = count, snapshots
        self.block_drift = _block_drift(state.get("block_drift", {}))


def check_alike(snapshots: Sequence[Snapshot], sources: Sequence[str | Path]) -> None:
    """Refuse snapshots that cannot be of one run; `sources` say for the error where each was read from.

    Raises:
        ValueError: If their steps do not rise, or images, methods, grids or classes are not those of the first.
    """
    for index, (snapshot, source) in enumerate(zip(snapshots, sources, strict=True)):
        first, found = _forms(snapshots[0]), _forms(snapshot)
        blocks = snapshots[0].blocks is not None and snapshot.blocks is not None  # not kept of every snapshot
        for name in [name for name in (*first, *found) if blocks or not name.startswith("block/")]:
            if first.get(name) != found.get(name):
                raise ValueError(
                    f"Expected `{name}` in {source} to be {first.get(name, 'absent')} as in {sources[0]}, but got "
                    f"{found.get(name, 'none')}."
                )
        if index and snapshot.step < snapshots[index - 1].step:
            before = snapshots[index - 1].step
            raise ValueError(f"Expected `step` in {source} of {before} or more, but got {snapshot.step}.")


def _block_drift(found: object) -> dict[int, Tensor]:
    """The drift of the blocks in a state; none where that holds something else, as it is only drawn."""
    if not isinstance(found, Mapping):
        return {}
    return {step: row for step, row in found.items() if isinstance(step, int) and isinstance(row, Tensor)}


def _forms(snapshot: Snapshot) -> dict[str, str]:
    tensors = snapshot.explanation.tensors()
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def _most_crowded(snapshots: Sequence[Snapshot]) -> int:
    """Index of the snapshot, neither first nor last, whose neighbours lie closest in log(1 + steps since the first)."""
    place = [math.log1p(snapshot.step - snapshots[0].step) for snapshot in snapshots]
    return min(range(1, len(place) - 1), key=lambda index: place[index + 1] - place[index - 1])

"""The snapshots of a run: which are kept as it grows, and which are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

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

        Of what only the first and the latest are asked for, blocks and reliability, those between are let go too.
        """
        self.snapshots.append(snapshot)
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
        """Take over what `state_dict` gave."""
        self.count, self.block_drift = state["count"], dict(state.get("block_drift", {}))
        self.snapshots = [Snapshot.from_state(snapshot) for snapshot in state["snapshots"]]


def _most_crowded(snapshots: Sequence[Snapshot]) -> int:
    """Index of the snapshot, neither first nor last, whose neighbours lie closest in log(1 + steps since the first)."""
    place = [math.log1p(snapshot.step - snapshots[0].step) for snapshot in snapshots]
    return min(range(1, len(place) - 1), key=lambda index: place[index + 1] - place[index - 1])

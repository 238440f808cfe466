"""The snapshots of a run: which ones are stored as it grows, and which ones are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.tracking.snapshot import Reliability, Snapshot
from vit_explain_callback.tracking.thinning import thinned


@dataclass
class History:
    """The snapshots of a run, baseline first; thinned out as it grows, evenly in the logarithm of the step.

    Attributes:
        capacity: Maximum number of stored snapshots. The baseline and the latest two are always stored.
        snapshots: The stored snapshots, oldest first.
        count: Number of snapshots taken, stored or not.
        block_drift: (L,) mean rank correlation with the baseline of what each block's readout attends to, by step, for
            each stored snapshot; float64. Empty if no blocks were measured.
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
        """The snapshot before the latest; the first if there is only one."""
        return self.snapshots[max(0, len(self.snapshots) - 2)]

    @property
    def now(self) -> Snapshot:
        """The latest snapshot."""
        return self.snapshots[-1]

    @property
    def checked(self) -> list[Reliability]:
        """The stored reliabilities: of the baseline, and the latest."""
        return [snapshot.reliability for snapshot in self.snapshots if snapshot.reliability is not None]

    def add(self, snapshot: Snapshot) -> None:
        """Append the latest snapshot; drop the old snapshot with the closest neighbours when over capacity.

        Maps are stored pooled, so that pixel maps do not fill memory and checkpoints. Blocks and reliability are
        needed only of the first and the latest snapshot, so those in between are dropped.
        """
        self.snapshots.append(snapshot.pooled())
        self.count += 1
        drift = snapshot.block_drift_from(self.baseline, "spearman")
        if drift is not None:
            self.block_drift[snapshot.step] = drift
        for index in range(1, len(self.snapshots) - 1):
            old = self.snapshots[index]
            has_later = any(later.reliability for later in self.snapshots[index + 1 :])
            explanation = replace(old.explanation, blocks=None)
            self.snapshots[index] = Snapshot(old.step, explanation, None if has_later else old.reliability)
        if len(self.snapshots) > self.capacity:
            # The next drift is measured against the latest snapshot, and this one's against the one before it.
            stored = thinned([one.step for one in self.snapshots], self.capacity, last=2)
            self.snapshots = [self.snapshots[index] for index in stored]
            steps = {one.step for one in self.snapshots}
            self.block_drift = {step: row for step, row in self.block_drift.items() if step in steps}

    def check_grids(self, explanation: Explanation) -> None:
        """Refuse maps on another grid than the baseline's, which a function may return.

        Raises:
            RuntimeError: If there are any.
        """
        for name, maps in explanation.maps.items() if self.count else ():
            grid, first = pooled(maps).shape[1:], self.baseline.maps[name].shape[1:]
            if grid != first:
                raise RuntimeError(
                    f"Expected maps of `{name}` with {first[0]}x{first[1]} cells, as at the baseline, but got "
                    f"{grid[0]}x{grid[1]}: drift is measured on one grid."
                )

    def columns(self, count: int) -> list[Snapshot]:
        """At most `count` snapshots to show: the baseline, some spaced by the logarithm of the step, the latest."""
        return [self.snapshots[index] for index in thinned([one.step for one in self.snapshots], count)]

    def drop_latest(self) -> None:
        """Drop the latest snapshot."""
        self.block_drift.pop(self.snapshots.pop().step, None)
        self.count -= 1

    def update_latest(self, reliability: Reliability) -> None:
        """Set the reliability of the latest snapshot."""
        self.snapshots[-1] = replace(self.now, reliability=reliability)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        snapshots = [snapshot.state_dict() for snapshot in self.snapshots]
        return {"count": self.count, "snapshots": snapshots, "block_drift": dict(self.block_drift)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`.

        Raises:
            ValueError: If it is none.
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
    """Refuse snapshots that cannot belong to one run; `sources` name the file of each for the error.

    Raises:
        ValueError: If steps do not rise, or if images, methods, grids or classes differ from those of the first.
    """
    for index, (snapshot, source) in enumerate(zip(snapshots, sources, strict=True)):
        first, forms = _forms(snapshots[0]), _forms(snapshot)
        blocks = snapshots[0].blocks is not None and snapshot.blocks is not None  # not every snapshot has them
        for name in [name for name in (*first, *forms) if blocks or not name.startswith("block/")]:
            if first.get(name) != forms.get(name):
                raise ValueError(
                    f"Expected `{name}` in {source} to be {first.get(name, 'absent')} as in {sources[0]}, but got "
                    f"{forms.get(name, 'none')}."
                )
        if index and snapshot.step < snapshots[index - 1].step:
            before = snapshots[index - 1].step
            raise ValueError(f"Expected `step` in {source} of {before} or more, but got {snapshot.step}.")


def _block_drift(value: object) -> dict[int, Tensor]:
    """The drift of the blocks in a state; empty if that holds something else, as it is only drawn."""
    if not isinstance(value, Mapping):
        return {}
    return {step: row for step, row in value.items() if isinstance(step, int) and isinstance(row, Tensor)}


def _forms(snapshot: Snapshot) -> dict[str, str]:
    tensors = snapshot.explanation.tensors()
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}

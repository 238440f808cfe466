"""Tell the user what the maps have to be read with, each notice once a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vit_explain_callback.tracking.scalars import STATISTICS

_SINK_LIFT = 8.0


class Notices:
    """Finds in the scalars of a snapshot what to warn of, and remembers what it has found.

    Args:
        methods: Names of the methods.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods
        self._found: set[tuple[str, str]] = set()

    def of(self, values: Mapping[str, float]) -> Iterator[str]:
        """What is new in a snapshot, of which every scalar is given."""
        for method in self._methods:
            degenerate = values[f"{STATISTICS}/map/{method}/degenerate"]
            if degenerate > 0 and self._is_new(method, "degenerate"):
                yield (
                    f"{degenerate:.0%} of the `{method}` maps are degenerate (flat, zero or not finite), so check that "
                    "the weights are finite, and for gradient rollout that the classifier is not all zero, as a new "
                    "one may be before its first step. Until then their drift is NaN."
                )
            sinks = values.get(f"explain/map/sink_lift/{method}", 0)
            if sinks > _SINK_LIFT and self._is_new(method, "sinks"):
                yield (
                    f"a later `start_block` shows more of the `{method}` maps, as the 1 % of patches that receive the "
                    f"most attention have {sinks:.0f} times their share of them, like artifact tokens "
                    "(arXiv:2309.16588)."
                )

    def _is_new(self, method: str, kind: str) -> bool:
        new = (method, kind) not in self._found
        self._found.add((method, kind))
        return new

"""Warn of what limits how the maps can be read, each notice once per run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vit_explain_callback.tracking import tags

_SINK_LIFT = 8.0


class Notices:
    """Derives warnings from the scalars of a snapshot, each one once.

    Args:
        methods: Names of the methods.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods
        self._reported: set[tuple[str, str]] = set()

    def of(self, values: Mapping[str, float]) -> Iterator[str]:
        """The new notices for a snapshot, from all its scalars."""
        for method in self._methods:
            degenerate = values[tags.map_statistic(method, "degenerate")]
            if degenerate > 0 and self._is_new(method, "degenerate"):
                yield (
                    f"{degenerate:.0%} of the `{method}` maps are degenerate (flat, zero or not finite), so their "
                    "drift is NaN. Check that the weights are finite and, for gradient rollout, that the classifier is "
                    "not all zero, as a new one may be before its first step."
                )
            sinks = values.get(tags.map_statistic(method, "sink_lift"), 0)
            if sinks > _SINK_LIFT and self._is_new(method, "sinks"):
                yield (
                    f"the 1 % of patches that receive the most attention hold {sinks:.0f} times their share of the "
                    f"`{method}` maps, like artifact tokens (arXiv:2309.16588). A later `start_block` shows more."
                )

    def _is_new(self, method: str, kind: str) -> bool:
        new = (method, kind) not in self._reported
        self._reported.add((method, kind))
        return new

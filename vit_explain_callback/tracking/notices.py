"""What a user should be told of the maps, each once a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_SINK_LIFT = 8.0


class Notices:
    """Finds in the scalars of a snapshot what to warn of, and remembers what it has found.

    Args:
        methods: Names of the methods.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods
        self._found: set[tuple[str, str]] = set()

    def of(self, scalars: Mapping[str, float]) -> Iterator[str]:
        """What is new in a snapshot."""
        for method in self._methods:
            degenerate = scalars[f"map_stats/{method}/degenerate"]
            if degenerate > 0 and self._is_new(method, "degenerate"):
                yield (
                    f"{degenerate:.0%} of the `{method}` maps are degenerate (flat, zero or not finite); their drift "
                    "is NaN. `map_stats` counts them from here on."
                )
            sinks = scalars.get(f"map_stats/{method}/sink_lift", 0)
            if sinks > _SINK_LIFT and self._is_new(method, "sinks"):
                yield (
                    f"the 1 % of patches that receive the most attention have {sinks:.0f} times their share of the "
                    f"`{method}` maps, as artifact tokens do (arXiv:2309.16588). A later `start_layer` shows the rest."
                )

    def _is_new(self, method: str, kind: str) -> bool:
        new = (method, kind) not in self._found
        self._found.add((method, kind))
        return new

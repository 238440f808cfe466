"""How far the maps of a run can be trusted: what is measured of it, with which snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.faithfulness import Removal, random_maps
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.tracking.distributed import Ranks, gains_together, mirrored_together, passes_of_gains
from vit_explain_callback.tracking.progress import Advance
from vit_explain_callback.tracking.snapshot import Reliability

RemovalOrAuto: TypeAlias = Removal | Literal["auto"]
_CONTROL = "random"


class Checks:
    """Measures the noise of maps, and their faithfulness.

    The baseline has its noise measured alone, in one pass more, as training waits for it. Faithfulness is looked at in
    the snapshot after it and in every so manieth, and at the end; that of a random order, the control, once a run.

    Args:
        every: Snapshots between those that are checked; None: none is.
        removal: How faithfulness takes patches away; `"auto"` is `"tokens"` where the model allows it. None where there
            are no probabilities to measure it by.
        batch_size: Images in one pass.
        ranks: Place of this process.
    """

    def __init__(self, every: int | None, removal: RemovalOrAuto | None, batch_size: int | None, ranks: Ranks) -> None:
        self._every, self._removal = every, removal
        self._batch_size, self._ranks = batch_size, ranks

    def are_due(self, number: int) -> bool:
        """Whether the snapshot of this number is checked, the baseline being 0."""
        return self._every is not None and (number == 0 or number % self._every == 1 % self._every)

    def are_missing(self, known: Reliability | None) -> bool:
        """Whether the last snapshot is still to be checked."""
        return self._every is not None and (known is None or (self._removal is not None and not known.gains))

    def passes(self, methods: int, known: Sequence[Reliability], with_gains: bool) -> int:
        """Passes over images that `of` makes."""
        if not with_gains or self._removal is None:
            return 1
        return 1 + passes_of_gains(methods + (_control(known) is None))

    def of(
        self,
        explainer: Explainer,
        images: Tensor,
        explanation: Explanation,
        known: Sequence[Reliability],
        with_gains: bool,
        advance: Advance = lambda: None,
    ) -> Reliability:
        """Measure an explanation.

        Args:
            explainer: Of the model.
            images: (B, C, H, W).
            explanation: Of them.
            known: What was measured before in the run, the latest last.
            with_gains: Whether to measure faithfulness too.
            advance: Called after each of the `passes`.

        Raises:
            Exception: What the model raised on any process.
        """
        mirrored = mirrored_together(self._ranks, explainer, images, explanation.target, self._batch_size)
        advance()
        if not with_gains or self._removal is None:
            return Reliability(mirrored, {})
        orders = {name: pooled(maps) for name, maps in explanation.maps.items()}
        control = _control(known)
        if control is None:
            height, width = next(iter(orders.values())).shape[1:]
            orders[_CONTROL] = random_maps(len(images), (height, width))
        gains = self._gains(explainer, images, orders, explanation.target, advance)
        return Reliability(mirrored, gains if control is None else {**gains, _CONTROL: control})

    def _gains(
        self, explainer: Explainer, images: Tensor, orders: dict[str, Tensor], target: Tensor, advance: Advance
    ) -> dict[str, Tensor]:
        def measured(removal: Removal) -> dict[str, Tensor]:
            return gains_together(self._ranks, explainer, images, orders, target, self._batch_size, removal, advance)

        if self._removal == "auto":
            try:
                gains = measured("tokens")
            except Exception:  # whatever a model does that is given fewer tokens than it expects
                gains = measured("mean_colour")
                self._removal = "mean_colour"
            else:
                self._removal = "tokens"
            return gains
        assert self._removal is not None
        return measured(self._removal)


def _control(known: Sequence[Reliability]) -> Tensor | None:
    return next((one.gains[_CONTROL] for one in reversed(known) if _CONTROL in one.gains), None)

"""Measure how far the maps of a run can be trusted, and decide with which snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.faithfulness import (
    SHARES,
    Removal,
    mean_colour,
    random_maps,
    symmetric_relevance_gain,
)
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.metrics.reference import nudged, output_holds
from vit_explain_callback.system.terminal import Advance
from vit_explain_callback.tracking.distributed import Ranks, explain_together
from vit_explain_callback.tracking.errors import Guard, warn
from vit_explain_callback.tracking.settings import RemovalOrAuto
from vit_explain_callback.tracking.snapshot import Reliability

CONTROL = "random"
MOST_CHECKED = 8
"""Images whose faithfulness is measured: the first ones of the probe."""
_PAINTED = "faithfulness is measured with patches painted over from here on, and not with their tokens left out"


class ReliabilityMeter:
    """Measures the noise of maps, and their faithfulness.

    Only noise is measured of the baseline, as training waits for it: one more explanation. Faithfulness is measured
    with the next snapshot, with every `every`-th one from there, and at the end; that of a random order, the control,
    once per run.

    Args:
        every: Snapshots between two checks; None: none is checked.
        removal: How faithfulness removes patches; `"auto"` is `"tokens"` if the model allows it. None if there are no
            probabilities to measure it by.
        batch_size: Images per pass.
        ranks: The processes.
        guard: Keeps a failing check from losing the snapshot's maps.

    Attributes:
        removal: How patches are removed; no longer `"auto"` once that was measured. Tokens are left out as long as this
            is measured to remove nothing else; after that, patches are painted over.
    """

    def __init__(
        self,
        every: int | None,
        removal: RemovalOrAuto | None,
        batch_size: int | None,
        ranks: Ranks,
        guard: Guard | None = None,
        multilabel: bool = False,
    ) -> None:
        self.removal, self._multilabel = removal, multilabel
        self._every, self._batch_size, self._ranks = every, batch_size, ranks
        self._guard = guard or Guard("raise")
        self._control: Tensor | None = None

    def are_due(self, number: int) -> bool:
        """Whether the snapshot of this number is checked, the baseline being 0."""
        return self._every is not None and (number == 0 or number % self._every == 1 % self._every)

    def are_missing(self, reliability: Reliability | None) -> bool:
        """Whether the last snapshot is still to be checked."""
        return self._every is not None and (reliability is None or (self.removal is not None and not reliability.gains))

    def resume(self, removal: object, reliability: Reliability | None) -> None:
        """Take over the control of the resumed run, unless it removed patches in another way."""
        if self.removal == "auto" and removal in ("mean_colour", "tokens"):
            self.removal = removal
        if self.removal == removal and reliability is not None:
            self._control = reliability.gains.get(CONTROL)

    def passes(self, methods: int, with_gains: bool) -> int:
        """Number of passes over the images that `of` makes, without those over a few images."""
        orders = methods + (self._control is None)
        return 1 + (2 * len(SHARES) * orders if with_gains and self.removal is not None else 0)

    def of(
        self,
        explainer: Explainer,
        images: Tensor,
        explanation: Explanation,
        baseline: Reliability | None,
        with_gains: bool,
        advance: Advance = lambda: None,
    ) -> Reliability | None:
        """Measure an explanation; None if that fails, and only the noise if faithfulness fails.

        Args:
            explainer: Explains the model.
            images: (B, C, H, W).
            explanation: Their explanation.
            baseline: Reliability of the baseline; None if this is the baseline.
            with_gains: Whether to measure faithfulness too.
            advance: Called after each of the `passes`.

        Raises:
            Exception: Whatever the model raised on any process, with `on_error="raise"`.
        """
        noise = partial(self._noise, explainer, images, explanation, baseline)
        reliability = self._guard.attempt("cannot measure how far noise moves the maps", noise)
        if reliability is None:
            return None
        advance()
        gains = None
        if with_gains and self.removal is not None:
            work = partial(self._gains, explainer, images, explanation, advance)
            gains = self._guard.attempt("cannot measure the faithfulness of the maps", work)
        return replace(reliability, gains=gains or {})

    def _noise(
        self, explainer: Explainer, images: Tensor, explanation: Explanation, baseline: Reliability | None
    ) -> Reliability:
        mirror = self._allows_mirror(explainer, images, explanation) if baseline is None else baseline.mirror
        maps = {name: pooled(each) for name, each in explanation.maps.items()}
        changed = nudged(images, common_grid(maps), mirror)
        moved = explain_together(self._ranks, explainer, changed, explanation.target, self._batch_size).maps
        back = {name: pooled(each.flip(-1) if mirror else each) for name, each in moved.items()}
        return Reliability(back, {}, mirror)

    def _allows_mirror(self, explainer: Explainer, images: Tensor, explanation: Explanation) -> bool:
        """Whether the model's outputs hardly change when the images are mirrored; a few images tell."""
        few = images[:MOST_CHECKED]

        def work() -> bool:
            mirrored = explainer.logits(few.flip(-1), batch_size=self._batch_size).cpu()
            return output_holds(explanation.logits[: len(few)], mirrored)

        return self._ranks.together(work)[0]

    def _gains(
        self, explainer: Explainer, images: Tensor, explanation: Explanation, advance: Advance
    ) -> dict[str, Tensor]:
        """Gains of the maps and of the control, (B,), NaN for images that are not measured."""
        maps = {name: pooled(each) for name, each in explanation.maps.items()}
        removal, few = self._removal(explainer, images, maps), slice(0, MOST_CHECKED)
        orders = {name: each[few] for name, each in maps.items()}
        random = random_maps(len(images[few]), common_grid(maps))
        orders |= {} if self._control is not None else {CONTROL: random}
        work = partial(self._gains_together, explainer, images[few], orders, explanation.target[few], advance)
        try:
            gains = work(removal)
        except ValueError as error:
            if removal != "tokens" or self._guard.on_error == "raise":
                raise
            orders[CONTROL], removal = random, "mean_colour"
            gains = work(removal)  # if that fails too, the tokens were not the reason
            self._guard.failed(f"{_PAINTED}, as the model does not do without them", error)
            self._paint_over()
        rest = torch.full((len(images) - len(images[few]),), torch.nan, dtype=torch.float64)
        by_order = {name: torch.cat([gain, rest]) for name, gain in gains.items()}
        if self._control is not None and CONTROL not in by_order:
            by_order[CONTROL] = self._control
        if self.removal == removal:
            self._control = by_order[CONTROL]
        return by_order

    def _removal(self, explainer: Explainer, images: Tensor, maps: Mapping[str, Tensor]) -> Removal:
        """How to remove patches this time; measured each time, as blocks can learn where their tokens are."""
        if self.removal not in ("auto", "tokens"):
            return "mean_colour"
        can: list[bool | None] = [False]  # for maps of a function, whose cells are not tokens
        if len({each.shape[1:] for each in maps.values()}) == 1:
            can = self._ranks.together(lambda: explainer.can_leave_out_tokens(images, common_grid(maps)))
        if False in can:
            if self.removal == "tokens":
                warn(f"{_PAINTED}: the model's blocks know where their tokens are, and would mistake other places.")
            self._paint_over()
        elif None not in can:
            self.removal = "tokens"
        return "tokens" if self.removal == "tokens" else "mean_colour"

    def _paint_over(self) -> None:
        self.removal, self._control = "mean_colour", None

    def _gains_together(
        self,
        explainer: Explainer,
        images: Tensor,
        orders: Mapping[str, Tensor],
        target: Tensor,
        advance: Advance,
        removal: Removal,
    ) -> dict[str, Tensor]:
        """Gains by order; each process measures its share of the images."""
        share, batch_size = self._ranks.share(len(images)), self._batch_size
        explainer = explainer.starting_at(share.start)

        def remove_and_advance(images: Tensor, removed: Tensor) -> Tensor:
            if removal == "tokens":
                logits = explainer.logits_without(images, removed, batch_size=batch_size)
            else:
                logits = mean_colour(partial(explainer.logits, batch_size=batch_size))(images, removed)
            advance()
            return logits

        def measure_share() -> dict[str, Tensor]:
            share_orders = {name: share.of(order) for name, order in orders.items()}
            gains = symmetric_relevance_gain(
                remove_and_advance, share.of(images), share_orders, share.of(target), multilabel=self._multilabel
            )
            return {name: gain[: share.num_counted] for name, gain in gains.items()}

        parts = self._ranks.together(measure_share)
        parts = parts if self._ranks.divided else parts[:1]
        return {name: torch.cat([part[name] for part in parts]) for name in orders}


def common_grid(maps: Mapping[str, Tensor]) -> tuple[int, int]:
    """Grid (grid_h, grid_w) of maps by name: that of the first."""
    height, width = next(iter(maps.values())).shape[1:]
    return height, width

"""Divide the work of a snapshot among the processes of a run, which fail together instead of waiting."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.metrics.faithfulness import (
    MOST_CHECKED,
    SHARES,
    Removal,
    mean_colour,
    symmetric_relevance_gain,
)
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.tracking.guard import raised_by_us
from vit_explain_callback.tracking.progress import Advance

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of the run.

    Attributes:
        rank: Of this process, 0 … count - 1.
        count: Number of processes.
        divided: Whether each holds the whole model, and so can take a share of the images. Else the parameters are
            sharded, and every process must take part in every forward pass.
    """

    rank: int = 0
    count: int = 1
    divided: bool = True

    def share(self, count: int) -> slice:
        """Which of `count` images this process takes; contiguous, in the order of the ranks."""
        if not self.divided:
            return slice(0, count)
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every process and give all of them all results, in the order of the ranks.

        Raises:
            Exception: What `work` raised, here or else on the first process on which it failed: on every process, so
                that none waits for another.
        """
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self.count == 1:
                raise
            failure = error
        if self.count == 1:
            return [result]  # type: ignore[list-item]
        outcomes: list[Any] = [None] * self.count
        sent = (result, _sendable(failure), failure is not None and raised_by_us(failure))
        torch.distributed.all_gather_object(outcomes, sent)
        for _, failed, ours in outcomes:
            if failed is not None:
                failed.raised_by_us = ours
                raise failed if failure is None else failure
        return [value for value, _, _ in outcomes]


def explain_together(
    ranks: Ranks,
    explainer: Explainer,
    images: Tensor,
    target: int | Tensor | None,
    batch_size: int | None,
    block_statistics: bool = False,
) -> Explanation:
    """Explain images, each process its share; every process gets the whole explanation, on the CPU.

    Raises:
        Exception: What the explainer raised on any of them.
    """
    share = ranks.share(len(images))
    own_target = target[share] if isinstance(target, Tensor) else target

    def explain_share() -> Explanation | None:
        own = images[share]
        # Without the images: every process has them already.
        explained = explainer(own, own_target, batch_size, block_statistics, share.start) if len(own) else None
        return explained and replace(explained, images=None).cpu()

    parts = [part for part in ranks.together(explain_share) if part is not None]
    return Explanation.joined(parts) if ranks.divided else parts[0]


def mirrored_together(
    ranks: Ranks, explainer: Explainer, images: Tensor, target: Tensor, batch_size: int | None
) -> dict[str, Tensor]:
    """Maps of the mirrored images, mirrored back, as they are measured, by method name.

    Raises:
        Exception: What the model raised on any process.
    """
    mirrored = explain_together(ranks, explainer, images.flip(-1), target, batch_size).maps
    return {name: pooled(found.flip(-1)) for name, found in mirrored.items()}


def gains_together(
    ranks: Ranks,
    explainer: Explainer,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor,
    batch_size: int | None,
    removal: Removal,
    advance: Advance = lambda: None,
) -> dict[str, Tensor]:
    """Measure the faithfulness of maps on the first `MOST_CHECKED` images, each process its share.

    Args:
        ranks: Place of this process.
        explainer: Of the model.
        images: (B, C, H, W).
        maps: What orders the patches, by name, (B, grid_h, grid_w).
        target: (B,) classes.
        batch_size: Images per pass.
        removal: How patches are taken away.
        advance: Called after each of the `passes_of_gains`.

    Returns:
        (B,) by name, NaN for the images that are not looked at.

    Raises:
        Exception: What the model raised on any process.
    """
    share = ranks.share(len(images))
    looked_at = -(-min(len(images), MOST_CHECKED) * (share.stop - share.start) // len(images))
    part = slice(share.start, share.start + looked_at)

    def remove_and_advance(images: Tensor, taken: Tensor) -> Tensor:
        if removal == "tokens":
            logits = explainer.logits_without(images, taken, batch_size, share.start)
        else:
            logits = mean_colour(partial(explainer.logits, batch_size=batch_size, first=share.start))(images, taken)
        advance()
        return logits

    def measure_share() -> dict[str, Tensor]:
        if share.start == share.stop:
            return {}
        own = {name: order[part] for name, order in maps.items()}
        found = symmetric_relevance_gain(remove_and_advance, images[part], own, target[part])
        rest = torch.full((share.stop - part.stop,), torch.nan, dtype=torch.float64)
        return {name: torch.cat([gain, rest]) for name, gain in found.items()}

    parts = [found for found in ranks.together(measure_share) if found]
    parts = parts if ranks.divided else parts[:1]
    return {name: torch.cat([found[name] for found in parts]) for name in maps}


def passes_of_gains(orders: int) -> int:
    """Passes that `gains_together` makes, over at most `MOST_CHECKED` images."""
    return 2 * len(SHARES) * orders


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))  # of a class that cannot be pickled
    return error

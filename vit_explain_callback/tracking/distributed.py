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
    SHARES,
    Removal,
    Remover,
    mean_colour,
    random_maps,
    symmetric_relevance_gain,
)
from vit_explain_callback.metrics.maps import pooled
from vit_explain_callback.tracking.guard import raised_by_us
from vit_explain_callback.tracking.progress import Advance
from vit_explain_callback.tracking.snapshot import Reliability

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


def check_together(
    ranks: Ranks,
    explainer: Explainer,
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor,
    batch_size: int | None,
    removal: Removal | None = "mean_colour",
    advance: Advance = lambda: None,
) -> Reliability:
    """Explain the mirrored images and measure the faithfulness of `maps`, each process its share.

    Maps are taken as they are measured; the random order, the control, has the grid of the first of them.

    Without a `removal`, as where there are no probabilities, faithfulness is left out. `advance` is called
    after each of the `passes_of_checks`.

    Raises:
        Exception: What the model raised on any of them.
    """
    mirrored = explain_together(ranks, explainer, images.flip(-1), target, batch_size).maps
    advance()
    maps = {name: pooled(each) for name, each in maps.items()}
    grid = next(iter(maps.values())).shape[1:]
    ordered = {**maps, "random": random_maps(len(images), (grid[0], grid[1]))}
    mirrored = {name: pooled(found.flip(-1)) for name, found in mirrored.items()}
    if removal is None:
        return Reliability(mirrored, {})
    share = ranks.share(len(images))

    def measure_share() -> dict[str, Tensor]:
        own = {name: order[share] for name, order in ordered.items()}
        if removal == "tokens":
            remove: Remover = partial(explainer.logits_without, batch_size=batch_size, first=share.start)
        else:
            remove = mean_colour(partial(explainer.logits, batch_size=batch_size, first=share.start))

        def remove_and_advance(images: Tensor, taken: Tensor) -> Tensor:
            logits = remove(images, taken)
            advance()
            return logits

        own_images, own_target = images[share], target[share]
        return symmetric_relevance_gain(remove_and_advance, own_images, own, own_target) if len(own_images) else {}

    parts = [part for part in ranks.together(measure_share) if part]
    parts = parts if ranks.divided else parts[:1]
    gains = {name: torch.cat([part[name] for part in parts]) for name in ordered}
    return Reliability(mirrored, gains)


def passes_of_checks(methods: int, removal: Removal | None) -> int:
    """Passes that `check_together` makes over the images of a process: the mirrored ones, and those of faithfulness."""
    return 1 if removal is None else 1 + 2 * len(SHARES) * (methods + 1)


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))  # of a class that cannot be pickled
    return error

"""Divide the work of a snapshot among the processes of a run, which fail together instead of waiting."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.tracking.guard import raised_by_us

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


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))  # of a class that cannot be pickled
    return error

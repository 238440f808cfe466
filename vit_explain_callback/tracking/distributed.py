"""The processes of a run: how they divide the work of a snapshot, and how they fail together instead of waiting."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed

from vit_explain_callback.lightning._compat import DDPStrategy, DeepSpeedStrategy, Trainer

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

    @classmethod
    def of(cls, trainer: Trainer) -> Ranks:
        """The processes of a trainer whose strategy is set up.

        Raises:
            ValueError: If its processes divide the heads of each attention among them.
        """
        strategy = trainer.strategy
        mesh = getattr(strategy, "_device_mesh", None)  # of `ModelParallelStrategy`, public only inside the module
        if mesh is not None and mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "Expected every process to compute all heads of an attention, but the strategy's `tensor_parallel_size`"
                f" is {mesh['tensor_parallel'].size()}: no process sees a whole attention matrix. Explain checkpoints "
                "of this run with `explain` instead."
            )
        whole_model = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        return cls(trainer.global_rank, trainer.world_size, trainer.world_size == 1 or whole_model)

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
        torch.distributed.all_gather_object(outcomes, (result, _sendable(failure)))
        failures = [failed for failed in (failure, *(sent for _, sent in outcomes)) if failed is not None]
        if failures:
            raise failures[0]
        return [value for value, _ in outcomes]


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))  # of a class that cannot be pickled
    return error

"""Keep the processes of a run in step while they run a model, so that none waits for one that failed.

A model's forward may hold collective operations, in which each process waits for all others. Before each of them, after
each part of a batch and at the end, the processes therefore tell one another where they are, in a process group of
their own: it cannot be mistaken for what the model or the training sends. All of them draw the same conclusion: go on,
do this part again in halves, or stop.

So a process that fails inside a forward, or out of memory, lets none wait. What is left:

- A process that is killed or interrupted is waited for until the group's timeout, as in training.
- A collective that only some of the processes take part in, or at different times, stops the work on all of them.
- Operations that do not go through torch's dispatcher, MPI called by hand say, are not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from vit_explain_callback.vit.in_parts import OutOfMemoryElsewhere, agreeing

Place: TypeAlias = Literal["collective", "part", "end", "out of memory", "failed"]
_GO_ON: tuple[Place, ...] = ("collective", "part", "end")
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Stopped(BaseException):
    """All processes stop, as one of them failed or is elsewhere; no `Exception`, as a model might catch it."""


class Meeting:
    """The processes of a run while they do the same work, once.

    Args:
        group: Process group of all of them that nothing else uses.

    Attributes:
        stopped: Whether all processes know that the work cannot be done.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.stopped = False
        self._group, self._is_telling = group, False

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, the processes meet before each collective of the model, and after each part of a batch."""
        with _BeforeCollectives(self), agreeing(self._ran_out):
            yield

    def tell(self, place: Place) -> None:
        """Tell the others where this process is, and learn where they are.

        Raises:
            OutOfMemoryElsewhere: If the part is to be done again in halves.
            Stopped: If the work cannot be done.
        """
        places = set() if self.stopped else set(self.gathered(place))
        if len(places) == 1 and places <= {*_GO_ON}:
            return
        if "out of memory" in places and places <= {"collective", "part", "out of memory"}:
            raise OutOfMemoryElsewhere
        self.stopped = True
        raise Stopped

    def before_collective(self) -> None:
        """Meet the others, unless the collective is one of ours."""
        if not self._is_telling:
            self.tell("collective")

    def gathered(self, value: Any) -> list[Any]:
        """What each process gives, in the order of the ranks."""
        values: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        self._is_telling = True
        try:
            torch.distributed.all_gather_object(values, value, self._group)
        finally:
            self._is_telling = False
        return values

    def _ran_out(self, here: bool) -> bool:
        try:
            self.tell("out of memory" if here else "part")
        except OutOfMemoryElsewhere:
            return True
        return False


class _BeforeCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager in which the processes meet before each collective operation."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._meeting = meeting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _NAMESPACES and "wait" not in func.__name__:
            self._meeting.before_collective()
        return func(*args, **(kwargs or {}))


_made: list[Any] = []  # the run's own process group, and ours beside it


def own_group() -> torch.distributed.ProcessGroup:
    """A process group that nothing else uses, made once by all processes together; on the CPU where it can be."""
    world = torch.distributed.group.WORLD
    if not _made or _made[0] is not world:
        backend = "gloo" if torch.distributed.is_gloo_available() else None
        _made[:] = [world, torch.distributed.new_group(backend=backend)]
    group: torch.distributed.ProcessGroup = _made[1]
    return group

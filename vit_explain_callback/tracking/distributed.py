"""Share the work of a snapshot among the processes of a run, which make the same passes and fail together."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vit_explain_callback.explainer import Explainer
from vit_explain_callback.explanation import Explanation
from vit_explain_callback.tracking.errors import raised_by_us
from vit_explain_callback.vit.session import OutOfMemoryElsewhere, agreeing

Place: TypeAlias = Literal["collective", "part", "end", "out of memory", "failed"]
_GO_ON: tuple[Place, ...] = ("collective", "part", "end")
T = TypeVar("T")
_groups: list[Any] = []  # the process group of the run, and ours beside it
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Stopped(BaseException):
    """All processes stop, as one failed or is at another place; not an `Exception`, which a model might catch."""


class Meeting:
    """The processes of a run while they do the same work.

    Args:
        group: A process group of all of them that nothing else uses.

    Attributes:
        stopped: Whether all processes know that the work cannot be done.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.stopped = False
        self._group, self._is_telling = group, False

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Let the processes meet before each collective of the model, and after each part of a batch."""
        with _BeforeCollectives(self), agreeing(self._ran_out):
            yield

    def tell(self, place: Place) -> None:
        """Tell the others where this process is, and learn where they are.

        Raises:
            OutOfMemoryElsewhere: If the part must be repeated in halves.
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
        """Meet the others, unless the collective is ours."""
        if not self._is_telling:
            self.tell("collective")

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
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


def own_group() -> torch.distributed.ProcessGroup:
    """A process group that nothing else uses, created once by all processes together; on the CPU if possible."""
    world = torch.distributed.group.WORLD
    if not _groups or _groups[0] is not world:
        backend = "gloo" if torch.distributed.is_gloo_available() else None
        _groups[:] = [world, torch.distributed.new_group(backend=backend)]
    group: torch.distributed.ProcessGroup = _groups[1]
    return group


@dataclass(frozen=True)
class Ranks:
    """The processes of the run, and which of them this one is.

    Attributes:
        rank: Rank of this process, 0 … count - 1.
        count: Number of processes.
        divided: Whether each holds the whole model and can take a share of the images. Otherwise parameters are
            sharded, and every process must take part in every forward pass.
    """

    rank: int = 0
    count: int = 1
    divided: bool = True

    def share(self, count: int) -> Share:
        """The share of `count` images that this process takes; all of them if they are not divided."""
        if not self.divided:
            return Share(0, count, count)
        size = -(-count // self.count)
        return Share(self.rank * size, size, count)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every process and return all results on each, by rank.

        The processes stay in step, so that none waits for one that failed.

        Raises:
            Exception: The error of the first process on which `work` failed, raised on every process.
            RuntimeError: If the processes did not make the same passes with the same collectives.
        """
        if self.count == 1:
            return [work()]
        meeting = Meeting(own_group())
        result, failure = _in_step(meeting, work)
        outcomes = meeting.gathered((result, _sendable(failure), failure is not None and raised_by_us(failure)))
        for rank, (_, failed, ours) in enumerate(outcomes):
            if failed is not None:
                failed.raised_by_us = ours
                raise failure if failure is not None and rank == self.rank else failed
        if meeting.stopped:
            raise RuntimeError(
                "Expected every process to run the model equally often, with the same collective operations, but they "
                "did not. If the model or its step does so on some processes only, pass a `forward=` that does not."
            )
        return [pickle.loads(result) for result, _, _ in outcomes]

    def alike(self, work: Callable[[], T]) -> T:
        """Do the same `work` on every process and return this one's result; it fails on all processes or on none.

        Raises:
            Exception: As `together`.
        """
        results: list[T] = []
        self.together(lambda: results.append(work()))
        return results[0]


@dataclass(frozen=True)
class Share:
    """The images that one process takes: equally many for each, so that all make the same passes.

    Attributes:
        start: Index of the first image.
        size: Number of images in the share.
        count: Number of images in all; a share that reaches beyond them wraps around to the first images.
    """

    start: int
    size: int
    count: int

    @property
    def num_counted(self) -> int:
        """Number of images of the share that count; the results of the others are discarded."""
        return max(0, min(self.size, self.count - self.start))

    def of(self, whole: Tensor) -> Tensor:
        """The share of a tensor, (B, …)."""
        if self.num_counted == self.size:
            return whole[self.start : self.start + self.size]
        return whole[torch.arange(self.start, self.start + self.size) % self.count]


def explain_together(
    ranks: Ranks,
    explainer: Explainer,
    images: Tensor,
    target: int | Tensor | None,
    batch_size: int | None,
    block_statistics: bool = False,
) -> Explanation:
    """Explain images, each process a share; every process gets the whole explanation, on the CPU.

    Raises:
        Exception: Whatever the explainer raised on any process.
    """
    share = ranks.share(len(images))
    share_target = share.of(target) if isinstance(target, Tensor) else target

    def explain_share() -> Explanation:
        options: Any = {"batch_size": batch_size, "block_statistics": block_statistics}
        # Without the images: every process has them already.
        explain_part = explainer.starting_at(share.start)
        explained = explain_part(share.of(images), share_target, keep_images=False, **options)
        return _first(explained.cpu(), share.num_counted)

    parts = ranks.together(explain_share)
    return Explanation.joined(parts) if ranks.divided else parts[0]


def _in_step(meeting: Meeting, work: Callable[[], object]) -> tuple[bytes, Exception | None]:
    """The pickled result of `work`, or its error; all processes know which of the two."""
    result, failure = b"", None
    try:
        with meeting.in_step():
            result = pickle.dumps(work())
    except Exception as error:
        failure = error
    except OutOfMemoryElsewhere:
        failure = RuntimeError("Out of memory on another process.")
    except Stopped:
        pass
    with suppress(Stopped):
        meeting.tell("end" if failure is None else "failed")
    return result, failure


def _first(explanation: Explanation, count: int) -> Explanation:
    """The explanation of the first `count` images."""
    if count == len(explanation.logits):
        return explanation
    parts = Explanation.from_tensors({name: part[:count] for name, part in explanation.tensors().items()})
    return replace(explanation, maps=parts.maps, logits=parts.logits, target=parts.target, blocks=parts.blocks)


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))  # its class cannot be pickled
    return error

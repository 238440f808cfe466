"""Put a hook of the callback under its guard: what goes wrong in it stops no run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from vit_explain_callback.tracking.guard import Guard


class _Guarded(Protocol):
    guard: Guard


C = TypeVar("C", bound=_Guarded)
P = ParamSpec("P")
T = TypeVar("T")
_BEFORE_TRAINING = ("on_train_start",)  # where a refusal of ours still stops the run


def guarded(hook: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T | None]:
    """A hook that gives None where it fails, which is said once.

    Args:
        hook: A method of a callback that has a `guard`.
    """

    @wraps(hook)
    def attempt(self: C, *args: P.args, **kwargs: P.kwargs) -> T | None:
        what = f"`{hook.__name__}` of the callback failed"
        return self.guard.attempt(what, partial(hook, self, *args, **kwargs), may_refuse=hook.__name__ in _BEFORE_TRAINING)

    return attempt


"""Put a hook of the callback under its guard: what goes wrong in it stops no run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

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
        name = hook.__name__
        work = partial(hook, self, *args, **kwargs)
        return self.guard.attempt(f"`{name}` of the callback failed", work, may_refuse=name in _BEFORE_TRAINING)

    return cast("Callable[Concatenate[C, P], T | None]", attempt)

"""Keep our own failures from stopping a run, and warn of each one once."""

from __future__ import annotations

import dis
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from types import TracebackType
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast

import torch.distributed

from vit_explain_callback.system.files import savable
from vit_explain_callback.system.terminal import print_line, redacted

T = TypeVar("T")
OnError = Literal["warn", "raise"]

_REFUSALS = (ValueError, TypeError, ImportError)  # other errors are faults, ours too, and stop no run
_VARYING = re.compile(r"[\w.+-]*\d[\w.+-]*|\b(?:nan|inf)\b")  # numbers, addresses, and names with a number in them
_SERIES = re.compile(r"0(?:[\s,()\[\]]+0)+")
_MOST_OF_ONE_PLACE = 3
_BEFORE_TRAINING = ("on_train_start",)  # our refusals still stop the run here


def warn(message: str) -> None:
    """Warn on the first process of the run, at the line that called this; never raise.

    Lightning's own function needs Lightning, which a plain loop does without. If the user turned warnings into errors,
    ours is still only shown: a notice does not stop a run.
    """
    if not _is_first_process():
        return
    text = savable(f"ViTExplainCallback: {redacted(message)}")
    try:
        warnings.warn(text, UserWarning, stacklevel=2)
    except Exception:  # from a filter "error", or from the user's `showwarning`
        _show(text)


def _show(text: str) -> None:
    """Show a warning past filters that would raise it."""
    caller = sys._getframe(2)  # the caller of `warn`
    try:
        warnings.showwarning(UserWarning(text), UserWarning, caller.f_code.co_filename, caller.f_lineno)
    except Exception:  # a closed stream, or one of the user's
        with suppress(Exception):
            print_line(text, sys.__stderr__)


def _is_first_process() -> bool:
    """Whether this is the first process; before there is a process group, `torchrun` says so."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of this package raised an error, and not code that it called.

    An error of the user's code without a frame of its own, such as a `__new__` with too few arguments, appears in a
    frame of ours, but not at a `raise`.
    """
    if (ours := getattr(error, "raised_by_us", None)) is not None:  # decided on another process
        return bool(ours)
    place = _innermost(error)
    if place is None or not str(place.tb_frame.f_globals.get("__name__")).startswith("vit_explain_callback."):
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def is_refusal(error: BaseException) -> bool:
    """Whether an error says that the user's configuration cannot work."""
    return isinstance(error, _REFUSALS) and raised_by_us(error)


class Guard:
    """Does optional work: a failure is reported once for each kind of work, and the run continues.

    Args:
        on_error: `"warn"` reports a failure and continues, `"raise"` raises it.
    """

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self._reported: set[str] = set()
        self._places: Counter[tuple[type, str, int] | None] = Counter()

    def attempt(self, what: str, work: Callable[[], T], may_refuse: bool = False) -> T | None:
        """Return what `work` returns, or None if it fails.

        Args:
            what: Beginning of the warning, as in "cannot write to the disk".
            work: The work.
            may_refuse: Whether to raise our own refusals.
        """
        try:
            return work()
        except Exception as error:
            if may_refuse and is_refusal(error):
                raise
            self.failed(what, error, what)
            return None

    def failed(self, what: str, error: Exception, kind: str | None = None, cure: str = "") -> None:
        """Report a failure, once for each kind; by default, errors that differ only in numbers are of one kind.

        Args:
            what: Beginning of the warning.
            error: The error.
            kind: Name of the kind.
            cure: What the user can do about it, in sentences.

        Raises:
            Exception: The error itself, with `on_error="raise"`.
        """
        if self.on_error == "raise":
            raise error
        if self._is_new(error) if kind is None else kind not in self._reported:
            self._reported.add(_normalised(error) if kind is None else kind)
            warn(
                f"{what}: {_in_words(error)}. Training continues; this is reported once. {cure}{' ' * bool(cure)}Pass "
                "`on_error='raise'` for a traceback."
            )

    def _is_new(self, error: Exception) -> bool:
        """Whether an error is of a new kind; a line of code has at most a few kinds."""
        place = _innermost(error)
        line = None if place is None else (type(error), place.tb_frame.f_code.co_filename, place.tb_lineno)
        if _normalised(error) in self._reported or self._places[line] >= _MOST_OF_ONE_PLACE:
            return False
        self._places[line] += line is not None
        return True


def _normalised(error: Exception) -> str:
    """An error in words, without numbers, which differ from one time to the next."""
    return _SERIES.sub("0", _VARYING.sub("0", _in_words(error)))


def _in_words(error: Exception) -> str:
    try:
        return repr(error)
    except Exception:  # a class of the user's
        return type(error).__name__


def _innermost(error: BaseException) -> TracebackType | None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


class _Guarded(Protocol):
    guard: Guard


C = TypeVar("C", bound=_Guarded)
P = ParamSpec("P")


def guarded(hook: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T | None]:
    """Decorate a hook: if it fails, it returns None and the failure is reported once.

    Args:
        hook: A method of a callback that has a `guard`.
    """

    @wraps(hook)
    def attempt(self: C, *args: P.args, **kwargs: P.kwargs) -> T | None:
        name = hook.__name__
        work = partial(hook, self, *args, **kwargs)
        return self.guard.attempt(f"`{name}` of the callback failed", work, may_refuse=name in _BEFORE_TRAINING)

    return cast("Callable[Concatenate[C, P], T | None]", attempt)

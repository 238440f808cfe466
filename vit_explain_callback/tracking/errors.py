"""Keep a failure of ours from stopping a run, and warn of it once."""

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

from vit_explain_callback._files import savable
from vit_explain_callback._terminal import print_line, redacted


def warn(message: str) -> None:
    """Give a warning on the first process of the run; it names the line that called this, and never raises.

    Lightning's own way needs Lightning to be imported, which a loop of one's own does without. Where the user has made
    errors of warnings, ours is shown all the same: a notice stops no run.
    """
    if not _is_first_process():
        return
    text = savable(f"ViTExplainCallback: {redacted(message)}")
    try:
        warnings.warn(text, UserWarning, stacklevel=2)
    except Exception:  # of a filter "error", or of a `showwarning` of the user's
        _show(text)


def _show(text: str) -> None:
    """Show a warning past the filters, which ask to raise it."""
    caller = sys._getframe(2)  # of `warn`
    try:
        warnings.showwarning(UserWarning(text), UserWarning, caller.f_code.co_filename, caller.f_lineno)
    except Exception:  # of a stream that is closed, or of the user's
        with suppress(Exception):
            print_line(text, sys.__stderr__)


def _is_first_process() -> bool:
    """Whether it is; before there is a process group, `torchrun` says it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


T = TypeVar("T")
OnError = Literal["warn", "raise"]

_REFUSALS = (ValueError, TypeError, ImportError)  # errors of other kinds are faults, ours too, and stop no run
_VARYING = re.compile(r"[\w.+-]*\d[\w.+-]*|\b(?:nan|inf)\b")  # numbers, addresses, and names with a number in them
_SERIES = re.compile(r"0(?:[\s,()\[\]]+0)+")
_MOST_OF_ONE_PLACE = 3


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` of this package made an error: not what the package called, and not Python inside of it.

    What the user's code does without a frame of its own, as a `__new__` that is called with too few arguments, is found
    in a frame of ours; but not at a `raise`.
    """
    if (known := getattr(error, "raised_by_us", None)) is not None:  # on another process
        return bool(known)
    place = _innermost(error)
    if place is None or not str(place.tb_frame.f_globals.get("__name__")).startswith("vit_explain_callback."):
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def is_refusal(error: BaseException) -> bool:
    """Whether an error says that what the user asks for cannot work."""
    return isinstance(error, _REFUSALS) and raised_by_us(error)


class Guard:
    """Does work that a run can do without: where it fails, that is said once for each kind of work.

    Args:
        on_error: `"warn"` says it and goes on, `"raise"` lets the error through.
    """

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self._said: set[str] = set()
        self._places: Counter[tuple[type, str, int] | None] = Counter()

    def attempt(self, what: str, work: Callable[[], T], may_refuse: bool = False) -> T | None:
        """Do `work` and give what it gives, None where it fails.

        Args:
            what: How a warning begins, as in "cannot write to the disk".
            work: What to do.
            may_refuse: Whether a refusal of ours goes through.
        """
        try:
            return work()
        except Exception as error:
            if may_refuse and is_refusal(error):
                raise
            self.failed(what, error, what)
            return None

    def failed(self, what: str, error: Exception, kind: str | None = None, cure: str = "") -> None:
        """Say that something failed, once for each kind; by default, a kind of error: the same but for its numbers.

        Args:
            what: How the warning begins.
            error: What was raised.
            kind: What is not to be said twice.
            cure: What else the user can do, as sentences.

        Raises:
            Exception: The error itself, with `on_error="raise"`.
        """
        if self.on_error == "raise":
            raise error
        if self._is_new(error) if kind is None else kind not in self._said:
            self._said.add(_normalised(error) if kind is None else kind)
            warn(
                f"pass `on_error='raise'` to stop here and see where; {what}, and training goes on"
                f": {_in_words(error)}. {cure}{' ' * bool(cure)}The same is not said again."
            )

    def _is_new(self, error: Exception) -> bool:
        """Whether an error is of another kind than those before; of one line of code, only the first few are."""
        place = _innermost(error)
        line = None if place is None else (type(error), place.tb_frame.f_code.co_filename, place.tb_lineno)
        if _normalised(error) in self._said or self._places[line] >= _MOST_OF_ONE_PLACE:
            return False
        self._places[line] += line is not None
        return True


def _normalised(error: Exception) -> str:
    """An error in words, without what differs from one time to the next."""
    return _SERIES.sub("0", _VARYING.sub("0", _in_words(error)))


def _in_words(error: Exception) -> str:
    try:
        return repr(error)
    except Exception:  # of a class of the user's
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

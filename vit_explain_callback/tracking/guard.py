"""Keep a failure of ours from stopping a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, TypeVar

from vit_explain_callback.tracking.warning import warn

T = TypeVar("T")
OnError = Literal["warn", "raise"]


def raised_by_us(error: BaseException) -> bool:
    """Whether it was code of this package that raised an error, and not what the package called."""
    if (known := getattr(error, "raised_by_us", None)) is not None:  # on another process
        return bool(known)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("vit_explain_callback.")


class Guard:
    """Does work that a run can do without: where it fails, that is said once for each kind of work.

    Args:
        on_error: `"warn"` says it and goes on, `"raise"` lets the error through.
    """

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self._said: set[str] = set()

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Do `work` and give what it gives, None where it fails.

        `what` is how a warning begins, as in "cannot write to the disk".
        """
        try:
            return work()
        except Exception as error:
            self.failed(what, error, what)
            return None

    def failed(self, what: str, error: Exception, kind: str | None = None) -> None:
        """Say that something failed, once for each kind; by default, a kind of error: the same but for its numbers.

        Raises:
            Exception: The error itself, with `on_error="raise"`.
        """
        if self.on_error == "raise":
            raise error
        kind = re.sub(r"\d+", "0", repr(error)) if kind is None else kind
        if kind not in self._said:
            self._said.add(kind)
            warn(
                f"pass `on_error='raise'` to stop here and see where; {what}, and training goes on"
                f": {error!r}. The same is not said again."
            )

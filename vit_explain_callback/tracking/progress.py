"""Show the progress of what takes longer than two seconds, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Advance = Callable[[], object]
"""Notes that one unit of the work is done."""

SECONDS = 2.0


@contextmanager
def progress(what: str, units: int, shown: bool) -> Iterator[Advance]:
    """A bar for some units of work; gone at its end, and never there for work of less than two seconds.

    Args:
        what: Is done, in a few words.
        units: Of work, such as passes.
        shown: Whether to show it at all.
    """
    stream = sys.stderr
    if not shown or stream is None or stream.closed:
        yield lambda: None
        return
    with tqdm(total=units, desc=what, unit="pass", leave=False, delay=SECONDS, file=stream) as bar:
        yield bar.update

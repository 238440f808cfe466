"""Print lines and progress on a terminal that may be ascii, closed or full; no name steers it, no secret gets there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_REDACTED = "***"
_URL = r"(?i)\b([a-z][a-z0-9+.-]+:/{1,2}"  # `Path` makes one slash of two
_SECRET = (
    r"[\w.-]*(?:(?<!class_)(?<!cls_)token|secret|passw(?:or)?d|pwd|(?:api|access|account|private)[_-]?key|credentials?"
    r"|signature|sig)"
)
_VALUE = r"[^\s'\",;&)}\]]+"
_REDACTIONS = (
    _URL + r"(?!/))[^\s'\"<>]*@",  # `user:password@` of a URL; a password may hold slashes
    _URL + r"[^\s'\"<>?]*\?)[^\s'\"<>]+",  # its query
    rf"(?i)\b({_SECRET}['\"]?\s*=\s*['\"]?){_VALUE}",  # `api_key=…`
    rf"(?i)(['\"]{_SECRET}['\"]\s*:\s*['\"])[^'\"]+",  # `{{"token": "…"}}`
    rf"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?){_VALUE}",
    r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{8,}",
)


def redacted(text: str) -> str:
    """The text without passwords, tokens and queries of URLs, and without values that are named as secrets.

    Example:
        >>> redacted("https://me:hunter2@host/run?api_key=abc is not on this machine")
        'https://***@host/run?*** is not on this machine'
    """
    for pattern in _REDACTIONS:
        text = re.sub(pattern, rf"\1{_REDACTED}{'@' * pattern.endswith('@')}", text)
    return text


def printable(text: str) -> str:
    """The text with control characters and bytes that are no UTF-8 spelt out: they are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(path: object) -> str:
    """A path as one word for the shell of this system."""
    return subprocess.list2cmdline([str(path)]) if sys.platform == "win32" else shlex.quote(str(path))


def print_line(text: str, stream: TextIO | None) -> None:
    """Print a line if the stream is there; what its encoding lacks becomes a question mark.

    Raises:
        OSError: If it cannot be written.
    """
    if stream is None or getattr(stream, "closed", False):
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = printable(text).encode(encoding, "replace").decode(encoding)
    print(line, file=stream, flush=True)


def announce(text: str) -> None:
    """Print lines on standard output, if they can be written: a run goes on without them.

    A progress bar of tqdm's is taken away for them, and comes back below.
    """
    from tqdm import tqdm  # late, as the command's help needs no bar

    with suppress(Exception), tqdm.external_write_mode(sys.stdout):
        for line in redacted(text).splitlines():
            print_line(line, sys.stdout)


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
    from tqdm import tqdm

    stream = sys.stderr
    if not shown or stream is None or stream.closed:
        yield lambda: None
        return
    with tqdm(total=units, desc=what, unit="pass", leave=False, delay=SECONDS, file=stream) as bar:
        yield bar.update

"""Print lines and progress on any terminal, without control characters and without secrets."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_REDACTED = "***"
_URL = r"(?i)\b([a-z][a-z0-9+.-]+:/{1,2}"  # `Path` turns two slashes into one
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
    """Redact passwords, tokens and queries of URLs, and values that are named as secrets.

    Example:
        >>> redacted("https://me:hunter2@host/run?api_key=abc is not on this machine")
        'https://***@host/run?*** is not on this machine'
    """
    for pattern in _REDACTIONS:
        text = re.sub(pattern, rf"\1{_REDACTED}{'@' * pattern.endswith('@')}", text)
    return text


def printable(text: str) -> str:
    """Escape control characters and bytes that are not UTF-8: the terminal shows them and does not obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(path: object) -> str:
    """Quote a path for the shell of this system."""
    return subprocess.list2cmdline([str(path)]) if sys.platform == "win32" else shlex.quote(str(path))


def print_line(text: str, stream: TextIO | None) -> None:
    """Print a line if the stream is open; characters outside its encoding become question marks.

    Raises:
        OSError: If it cannot be written.
    """
    if stream is None or getattr(stream, "closed", False):
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = printable(text).encode(encoding, "replace").decode(encoding)
    print(line, file=stream, flush=True)


def announce(text: str) -> None:
    """Print lines on standard output; the run continues if that fails.

    A tqdm progress bar is cleared first and redrawn below the lines.
    """
    from tqdm import tqdm  # late: the command's help needs no bar

    with suppress(Exception), tqdm.external_write_mode(sys.stdout):
        for line in redacted(text).splitlines():
            print_line(line, sys.stdout)


Advance = Callable[[], object]
"""Called when one unit of work is done."""

SECONDS = 2.0


@contextmanager
def progress(what: str, units: int, shown: bool) -> Iterator[Advance]:
    """Show a progress bar, which disappears at the end and never appears for work of less than two seconds.

    Args:
        what: Description of the work, in a few words.
        units: Number of units of work, such as forward passes.
        shown: Whether to show the bar at all.
    """
    from tqdm import tqdm

    stream = sys.stderr
    if not shown or stream is None or stream.closed:
        yield lambda: None
        return
    with tqdm(total=units, desc=what, unit="pass", leave=False, delay=SECONDS, file=stream) as bar:
        yield bar.update

"""Print lines on a terminal that may be ascii, closed or full, and that no name must steer; secrets are left out."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import suppress
from typing import TextIO

_SECRET = r"[\w.-]*(?:(?<!class_)(?<!cls_)token|secret|passw(?:or)?d|pwd|(?:api|access|account|private)[_-]?key|credentials?|signature|sig)"
_REDACTED = "***"
_REDACTIONS = (
    # `user:password@` of a URL, also where `Path` has made one slash of two, and where a slash is in the password
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]+:/{1,2}(?!/))[^\s'\"<>]*@"), rf"\1{_REDACTED}@"),
    # every value in the query of a URL
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]+:/{1,2}[^\s'\"<>?]*)\?[^\s'\"<>]*"), rf"\1?{_REDACTED}"),
    # `api_key=…`, `"token": "…"`, `Authorization: Bearer …`
    (re.compile(rf"(?i)\b({_SECRET}['\"]?\s*=\s*['\"]?)[^\s'\",;&)}}\]]+"), rf"\1{_REDACTED}"),
    (re.compile(rf"(?i)(['\"]{_SECRET}['\"]\s*:\s*['\"])[^'\"]+"), rf"\1{_REDACTED}"),
    (re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\",;]+"), rf"\1{_REDACTED}"),
    (re.compile(r"\b((?:Bearer|Basic)\s+)(?!\*)[\w.~+/=-]{8,}"), rf"\1{_REDACTED}"),
)


def redacted(text: str) -> str:
    """The text without passwords, tokens and queries of URLs, and without values that are named as secrets.

    Example:
        >>> redacted("https://me:hunter2@host/run?api_key=abc is not on this machine")
        'https://***@host/run?*** is not on this machine'
    """
    for pattern, replacement in _REDACTIONS:
        text = pattern.sub(replacement, text)
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

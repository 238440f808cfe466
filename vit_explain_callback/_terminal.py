"""Print lines on a terminal that may be ascii, closed or full, and that no name must steer."""

from __future__ import annotations

import shlex
import subprocess
import sys
from contextlib import suppress
from typing import TextIO


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

    with suppress(OSError), tqdm.external_write_mode(sys.stdout):
        for line in text.splitlines():
            print_line(line, sys.stdout)

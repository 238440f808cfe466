"""Print lines on a terminal that may be ascii, closed or full, and that files must not steer."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

_WIDEST = 40  # characters of a cell


def printable(text: str) -> str:
    """The text with control characters and bytes that are no UTF-8 spelt out: they are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print a line on standard output, if there is one; what its encoding lacks becomes a question mark."""
    _print(text, sys.stdout)


def complain(text: str) -> None:
    """Print one line on standard error, named as the command's."""
    _print(f"vit-explain: {' '.join(text.split())}", sys.stderr)


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    line = printable(text).encode(encoding, "replace").decode(encoding)
    # What could not be written stays in the buffer: `finish_output` finds it.
    with suppress(OSError, ValueError):
        print(line, file=stream, flush=True)


def finish_output() -> bool:
    """Whether standard output took everything, or its reader has seen enough; else the reason is said."""
    if sys.stdout is None or sys.stdout.closed:
        return True
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        complain(f"standard output cannot be written: {error.strerror}")
        return False
    return True


def _discard_output() -> None:
    """Send what is left in the buffer nowhere, so that Python does not try once more when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; long cells are shortened, but for those of the last column."""
    cells = [[*(shortened(cell, _WIDEST) for cell in row[:-1]), printable(row[-1])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def shortened(text: str, longest: int) -> str:
    """The printable text, of `longest` characters at most."""
    text = printable(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"

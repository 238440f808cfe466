"""Print lines on a terminal that may be ascii, closed or full, and that files must not steer."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from vit_explain_callback._terminal import print_line, printable

_WIDEST = 40  # characters of a cell


def print_output(text: str) -> None:
    """Print a line on standard output, if there is one; what its encoding lacks becomes a question mark.

    Raises:
        OSError: If it cannot be written. A reader that has seen enough is no error.
    """
    try:
        print_line(text, sys.stdout)
    except BrokenPipeError:
        return
    except OSError as error:
        raise OSError(f"Standard output cannot be written: {error.strerror}.") from error


def print_error(text: str) -> None:
    """Print one line on standard error, named as the command's, if it can be written."""
    with suppress(OSError):
        print_line(f"vit-explain: {' '.join(text.split())}", sys.stderr)


def discard_unwritten() -> None:
    """Forget what standard output did not take, so that Python does not try once more, and fail, when it ends."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; long cells are shortened, but for those of the last column."""
    cells = [[*(shortened(cell, _WIDEST) for cell in row[:-1]), printable(row[-1])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def shortened(text: str, longest: int) -> str:
    """The printable text, of `longest` characters at most."""
    text = printable(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"

"""Print results and errors of the command, whatever the terminal can show."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from vit_explain_callback.system.terminal import print_line, printable

_MAX_CELL = 40  # characters


def print_output(text: str) -> None:
    """Print a line on standard output, if it is open; characters outside its encoding become question marks.

    Raises:
        OSError: If it cannot be written. A closed pipe is not an error.
    """
    try:
        print_line(text, sys.stdout)
    except BrokenPipeError:
        return
    except OSError as error:
        raise OSError(f"Standard output cannot be written: {error.strerror}.") from error


def print_error(text: str) -> None:
    """Print one line on standard error, after the command's name, if it can be written."""
    with suppress(OSError):
        print_line(f"vit-explain: {' '.join(text.split())}", sys.stderr)


def discard_unwritten() -> None:
    """Drop unwritten output, so that Python does not try again, and fail, at exit."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns; long cells are shortened, except in the last column."""
    cells = [[*(shortened(cell, _MAX_CELL) for cell in row[:-1]), printable(row[-1])] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def shortened(text: str, longest: int) -> str:
    """Make text printable and at most `longest` characters long."""
    text = printable(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"

"""The entry point of `vit-explain`; it loads torch only when there is work to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vit_explain_callback.cli.parser import parse
from vit_explain_callback.cli.terminal import discard_unwritten, print_error

_WRONG = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line; default: that of the process.

    Returns:
        The exit status: 0 on success, 2 if an input cannot be used or standard output cannot be written, 130 after
        Ctrl-C.
    """
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    finally:
        discard_unwritten()


def _run(words: Sequence[str]) -> int:
    try:
        args = parse(words)
        from vit_explain_callback.cli.subcommands import run

        return run(args)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print_error(str(error))
        return _WRONG
    except KeyboardInterrupt:
        print_error("interrupted")
        return _INTERRUPTED

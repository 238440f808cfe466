"""Warn once a run, not once a process, in any training loop."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress

import torch.distributed

from vit_explain_callback._files import savable
from vit_explain_callback._terminal import print_line, redacted


def warn(message: str) -> None:
    """Give a warning on the first process of the run; it names the line that called this, and never raises.

    Lightning's own way needs Lightning to be imported, which a loop of one's own does without. Where the user has made
    errors of warnings, ours is shown all the same: a notice stops no run.
    """
    if not _is_first_process():
        return
    text = savable(f"ViTExplainCallback: {redacted(message)}")
    try:
        warnings.warn(text, UserWarning, stacklevel=2)
    except Exception:  # of a filter "error", or of a `showwarning` of the user's
        _show(text)


def _show(text: str) -> None:
    """Show a warning past the filters, which ask to raise it."""
    caller = sys._getframe(2)  # of `warn`
    try:
        warnings.showwarning(UserWarning(text), UserWarning, caller.f_code.co_filename, caller.f_lineno)
    except Exception:  # of a stream that is closed, or of the user's
        with suppress(Exception):
            print_line(text, sys.__stderr__)


def _is_first_process() -> bool:
    """Whether it is; before there is a process group, `torchrun` says it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"

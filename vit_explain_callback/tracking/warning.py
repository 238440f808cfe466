"""Warn once a run, not once a process, in any training loop."""

from __future__ import annotations

import os
import warnings

import torch.distributed


def warn(message: str) -> None:
    """Give a warning on the first process of the run; it names the line that called this.

    Lightning's own way needs Lightning to be imported, which a loop of one's own does without.
    """
    if _is_first_process():
        warnings.warn(f"ViTExplainCallback: {message}", UserWarning, stacklevel=2)


def _is_first_process() -> bool:
    """Whether it is; before there is a process group, `torchrun` says it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
